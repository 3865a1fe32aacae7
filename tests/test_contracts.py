"""What must hold for every architecture (docs/architecture.md, contracts)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import COVERING, SPECS, every_architecture, params_of, tokens

from jaxllm import cache
from jaxllm.config import MoE
from jaxllm.leaves import Adapted, dense, is_weight, quantise
from jaxllm.mesh import make_mesh
from jaxllm.params import map_params, unstack
from jaxllm.records import Inputs, inputs
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout, storage_shardings
from jaxllm.transformer import forward, logits, transformer_params

PLAIN = Runtime()


@partial(jax.jit, static_argnames=("name", "runtime"))
def run(params, batch, name, runtime=PLAIN):
    return logits(params, SPECS[name], forward(params, SPECS[name], batch, runtime).hidden_BTD, runtime)


@partial(jax.jit, static_argnames=("name", "runtime"))
def value_and_grad(params, ids, name, runtime):
    """The mean square of the logits, and its gradient."""

    def loss(params):
        out = forward(params, SPECS[name], inputs(ids), runtime)
        return jnp.mean(jnp.square(logits(params, SPECS[name], out.hidden_BTD, runtime)))

    return jax.value_and_grad(loss)(params)


def same(want, got):
    """Values to 1e-5; gradients to 2e-5 of the parameter's largest, or 2e-7 of the largest of all."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want[1]))
    for a, b in zip(*(jax.tree.leaves(jax.device_get(tree)) for tree in (got[1], want[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(float(np.abs(b).max()), 0.01 * largest))


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(jnp.abs(want).max()))


def test_covering_toys_exist():
    assert set(COVERING) <= SPECS.keys()


@pytest.mark.parametrize("name", SPECS)
def test_in_brief(name, getkey):
    """Causality, padding, segments and cached decoding of every architecture, in two compilations."""
    spec, params, T = SPECS[name], params_of(name), 20
    a, b = np.asarray(tokens(getkey(), 2, T))
    ids, segment, position = np.zeros((5, T), np.int32), np.zeros((5, T), np.int32), np.zeros((5, T), np.int32)
    rows = [[(0, a)], [(7, a[:13])], [(0, a[:13])], [(0, a[:9]), (9, b[:11])], [(0, b)]]
    for row, texts in enumerate(rows):
        for number, (start, text) in enumerate(texts, 1):
            place = slice(start, start + len(text))
            ids[row, place], segment[row, place], position[row, place] = text, number, np.arange(len(text))

    @jax.jit
    def whole(params, batch):
        out = forward(params, spec, batch, PLAIN, cache.init(spec, 5, 0, jnp.float32))
        return logits(params, spec, out.hidden_BTD, PLAIN), out.rows

    @jax.jit
    def step(params, caches, start):
        slot = start + jnp.broadcast_to(jnp.arange(4), (5, 4))
        now = jnp.take_along_axis(jnp.asarray(ids), slot, 1)
        out = forward(params, spec, Inputs(now, slot, slot_BT=slot), PLAIN, caches)
        rows_B = jnp.full(5, start), jnp.full(5, 4)
        return logits(params, spec, out.hidden_BTD, PLAIN), cache.commit(caches, out.rows, *rows_B)

    full, new = whole(params, Inputs(*map(jnp.asarray, (ids, position)), segment_BT=jnp.asarray(segment)))
    close(full[1, 7:], full[0, :13])
    close(full[2, :13], full[0, :13])
    close(full[3, :9], full[0, :9])
    close(full[3, 9:], full[4, :11])
    caches = cache.commit(cache.init(spec, 5, T, jnp.float32), new, jnp.zeros(5, jnp.int32), jnp.full(5, 12))
    for start in (12, 16):
        got, caches = step(params, caches, start)
        close(got[::4], full[::4, start : start + 4])


@every_architecture
def test_causal_by_gradient(name, getkey):
    spec, params, t = SPECS[name], params_of(name), 9
    embeds = jax.random.normal(getkey(), (1, 20, spec.dim))

    @jax.jit
    @jax.grad
    def sensitivity(embeds):
        batch = Inputs(None, jnp.arange(20)[None], embeds_BTD=embeds)
        out = logits(params, spec, forward(params, spec, batch, PLAIN).hidden_BTD, PLAIN)
        return jnp.sum(jnp.square(out[:, t]))

    grads = jnp.abs(sensitivity(embeds)[0]).sum(-1)
    assert jnp.all(grads[t + 1 :] == 0.0), "a later token reaches an earlier prediction"
    assert grads[t] > 0
    assert grads[t - 1] > 0


@every_architecture
def test_cached_decoding_equals_the_full_forward(name, getkey):
    """Ragged prompts, one token at a time, past every window; then three tokens at once of which one is accepted."""
    spec, params = SPECS[name], params_of(name)
    ids, B, T = tokens(getkey(), 2, 26), 2, 26
    full = run(params, inputs(ids), name)
    lengths = jnp.array([7, 4])
    segment = (jnp.arange(7)[None] < lengths[:, None]).astype(jnp.int32)
    prompt = replace(inputs(ids[:, :7]), segment_BT=segment)
    rows = forward(params, spec, prompt, PLAIN, cache.init(spec, B, 0, jnp.float32)).rows
    caches = cache.commit(cache.init(spec, B, T, jnp.float32), rows, jnp.zeros(B, jnp.int32), lengths)

    @jax.jit
    def step(caches, start, count, width):
        slot = start[:, None] + jnp.arange(width.shape[0])[None]
        ids_now = jnp.take_along_axis(ids, jnp.minimum(slot, T - 1), 1)
        out = forward(params, spec, Inputs(ids_now, slot, slot_BT=slot), PLAIN, caches)
        return logits(params, spec, out.hidden_BTD, PLAIN), cache.commit(caches, out.rows, start, count)

    start, one = lengths, jnp.ones(B, jnp.int32)
    for width in [1] * 12 + [3] * 6:
        got, caches = step(caches, start, one, jnp.zeros(width))
        for b in range(B):
            for i in range(width):
                if start[b] + i < T:
                    close(got[b, i], full[b, start[b] + i])
        start = start + 1


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_are_invisible(name, side, getkey):
    params, ids = params_of(name), tokens(getkey(), 2, 18)
    alone = run(params, inputs(ids[:1, :13]), name)[0]
    real = np.zeros((2, 18), np.int32)
    where = slice(5, 18) if side == "left" else slice(0, 13)
    real[0, where], real[1] = 1, 1
    batch = jnp.where(real > 0, 0, 3) + jnp.zeros_like(ids)
    batch = batch.at[0, where].set(ids[0, :13]).at[1].set(ids[1])
    got = run(params, inputs(batch, real), name)
    close(got[0, where], alone)
    close(got[1], run(params, inputs(ids[1:]), name)[0])
    assert jnp.isfinite(got).all(), "padding must not make NaN"


@every_architecture
def test_segments_do_not_leak(name, getkey):
    spec, params, ids = SPECS[name], params_of(name), tokens(getkey(), 1, 22)
    parts = (slice(0, 9), slice(9, 20))
    segment, position = np.zeros((1, 22), np.int32), np.zeros((1, 22), np.int32)
    for i, part in enumerate(parts, 1):
        segment[0, part], position[0, part] = i, np.arange(part.stop - part.start)
    packed = run(params, Inputs(ids, jnp.asarray(position), segment_BT=jnp.asarray(segment)), name)
    for part in parts:
        close(packed[0, part], run(params, inputs(ids[:, part]), name)[0])
    embeds = jax.random.normal(getkey(), (1, 22, spec.dim))

    @jax.grad
    def sensitivity(embeds):
        batch = Inputs(None, jnp.asarray(position), embeds_BTD=embeds, segment_BT=jnp.asarray(segment))
        return jnp.sum(jnp.square(forward(params, spec, batch, PLAIN).hidden_BTD[:, parts[1]]))

    assert jnp.all(sensitivity(embeds)[0, parts[0]] == 0.0)


@every_architecture
def test_how_never_changes_what(name, getkey):
    """Scan, unrolled, list of layers, remat policies and attention backends: one function, one gradient."""
    params, ids = params_of(name), tokens(getkey(), 2, 17)
    want = value_and_grad(params, ids, name, PLAIN)
    close(run(unstack(params), inputs(ids), name), run(params, inputs(ids), name))
    for other in [
        Runtime(remat="full", offload=("stream",)),
        Runtime(remat="attention", unroll=True),
        Runtime(remat="dots", attention="reference"),
        Runtime(remat=("query", "latent", "attention_out", "gate"), offload=("up",)),
    ]:
        same(want, value_and_grad(params, ids, name, other))


SHARDED = ("toy_gemma2_2b", "toy_deepseek_v3")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHARDED else pytest.mark.slow) for n in SPECS])
def test_sharded_equals_unsharded(name, getkey):
    """Rows over four devices, heads, experts' widths and the vocabulary over two, weights in shares of all eight."""
    spec, params, ids = SPECS[name], params_of(name), tokens(getkey(), 8, 16)
    layout = Layout(tensor=2, zero=3, replicate_below=0)
    mesh = make_mesh(layout, jax.devices())
    want = value_and_grad(params, ids, name, PLAIN)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, storage_shardings(transformer_params(spec), layout, mesh))
        same(want, value_and_grad(placed, ids, name, Runtime(layout=layout)))


EAGER = ("toy_smollm2_135m", "toy_gemma2_2b")
"""Where eager is compared with jit by default: an operation at a time is slow."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in EAGER else pytest.mark.slow) for n in SPECS])
def test_eager_equals_jit(name, getkey):
    spec, params, batch = SPECS[name], params_of(name), inputs(tokens(getkey(), 2, 17))
    with jax.disable_jit():
        eager = logits(params, spec, forward(params, spec, batch, PLAIN).hidden_BTD, PLAIN)
    close(eager, run(params, batch, name))


def choosing_all(spec):
    """The spec with routers that choose every expert: rounding cannot change a choice."""

    def block(b):
        if not isinstance(b.ffn, MoE):
            return b
        router = replace(b.ffn.router, top_k=b.ffn.experts, groups=1, top_groups=1)
        return replace(b, ffn=replace(b.ffn, router=router))

    return replace(spec, stacks=tuple(replace(s, pattern=tuple(map(block, s.pattern))) for s in spec.stacks))


@every_architecture
def test_bfloat16_is_near(name, getkey):
    spec, params, batch = choosing_all(SPECS[name]), params_of(name), inputs(tokens(getkey(), 2, 17))

    @partial(jax.jit, static_argnames="runtime")
    def run(runtime):
        return logits(params, spec, forward(params, spec, batch, runtime).hidden_BTD, runtime)

    close(run(Runtime(compute_dtype="bfloat16")), run(PLAIN), 0.06)


@every_architecture
def test_any_weight_may_be_adapted_or_quantised(name, getkey):
    """Every kernel as int8, then as LoRA on int8, stacked: equal to the dense weights they stand for."""
    spec, params, ids = SPECS[name], params_of(name), tokens(getkey(), 2, 9)
    declared = transformer_params(spec)

    def int8(p, w):
        return quantise(w, tuple(range(1, w.ndim - 1))) if p.axes[0] == "layers" and w.ndim > 3 else w

    def lora(p, w):
        if p.axes[0] != "layers" or w.ndim < 3 or "head_dim" in p.axes[:2]:
            return w
        cut = 3 if p.axes[-1] == "embed" and w.ndim == 4 else 2
        if p.axes[1] in ("heads", "kv_heads") and p.axes[-1] == "head_dim":
            return w  # a bias
        a = jax.random.normal(getkey(), (*w.shape[:cut], 2)) * 0.1
        b = jax.random.normal(getkey(), (w.shape[0], 2, *w.shape[cut:])) * 0.1
        return Adapted(w, a, b, jnp.full(w.shape[0], 0.5))

    for change in (int8, lora):
        changed = map_params(change, declared, params)
        assert any(map(is_weight, jax.tree.leaves(changed, is_leaf=is_weight)))
        equal = map_params(lambda p, w: dense(w, jnp.float32), declared, changed)
        close(run(changed, inputs(ids), name), run(equal, inputs(ids), name), 1e-4)


@every_architecture
def test_taps_are_per_layer(name, getkey):
    spec, params, ids = SPECS[name], params_of(name), tokens(getkey(), 2, 8)

    @jax.jit
    def taps(params):
        return forward(params, spec, inputs(ids), Runtime(taps=("residual", "attn", "ffn"))).aux.taps

    found = taps(params)
    shape = (spec.layers, 2, 8, spec.dim)
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(("residual", "attn", "ffn"), shape)
    jax.tree.map(close, taps(unstack(params)), found)


def test_ids_outside_the_vocabulary_give_nan(getkey):
    name = "toy_gpt2_small"
    assert jnp.isnan(run(params_of(name), inputs(jnp.array([[1, 97]])), name)[0, 1]).all()


def test_prefix_tokens_see_each_other(getkey):
    name = next(iter(SPECS))
    params, ids = params_of(name), tokens(getkey(), 1, 12)
    prefix = jnp.array([6])
    out = run(params, inputs(ids, prefix_B=prefix), name)
    changed = run(params, inputs(ids.at[0, 5].add(1), prefix_B=prefix), name)
    assert jnp.abs(changed[0, 0] - out[0, 0]).max() > 1e-4, "inside the prefix an earlier token sees a later one"
    after = run(params, inputs(ids.at[0, 8].add(1), prefix_B=prefix), name)
    close(after[0, :8], out[0, :8], 1e-7)
