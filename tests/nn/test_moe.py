"""Mixtures of experts: against a naive transcription, three computations alike, capacity, statistics, balance."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import GLU, GQA, MLP, Block, MoE, RMSNorm, Rope, Router, Transformer, decoder
from jaxllm.leaves import Adapted, dense, quantise
from jaxllm.mesh import make_mesh
from jaxllm.nn.dispatch import room
from jaxllm.nn.moe import capacity, correct_routers, moe, route, statistics
from jaxllm.nn.moe import ffn_params as params_of
from jaxllm.params import map_params
from jaxllm.records import inputs
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout, use
from jaxllm.transformer import forward, transformer_params

D, E = 12, 8
DENSE, GROUPED = Runtime(experts="dense"), Runtime(experts="grouped")
SWIGLU = GLU(10, "silu")
MIXTURES = {
    "softmax": MoE(SWIGLU, E, Router(3)),
    "softmax not renormalised": MoE(SWIGLU, E, Router(2, renormalise=False, scale=1.5)),
    "one expert": MoE(MLP(10, "relu"), E, Router(1, renormalise=False)),
    "all experts": MoE(SWIGLU, E, Router(E)),
    "groups by their best": MoE(SWIGLU, E, Router(3, renormalise=False, groups=4, top_groups=2)),
    "sigmoid": MoE(SWIGLU, E, Router(2, "sigmoid", scale=2.5)),
    "groups by their best two, corrected": MoE(
        SWIGLU, E, Router(3, "sigmoid", True, 2.5, correction=True, groups=4, top_groups=2, group_score="top2")
    ),
    "biases, clipped": MoE(GLU(10, "silu", True, limit=0.5, offset=1.0, beta=1.702), E, Router(2, bias=True)),
    "shared": MoE(SWIGLU, E, Router(2), shared=GLU(7)),
    "gated shared": MoE(MLP(10, "gelu", bias=True), E, Router(2), shared=MLP(7, "relu"), shared_gate=True),
}
every_mixture = pytest.mark.parametrize("cfg", MIXTURES.values(), ids=MIXTURES)


def drawn(tree, rng):
    """Parameters of every kind with noise, made without a compilation."""
    return map_params(lambda p: jnp.asarray(rng.normal(0, 0.4, p.shape), jnp.float32), tree)


@pytest.fixture
def made():
    """(parameters, x [2, 11, D])"""

    def make(cfg):
        rng = np.random.default_rng(5)
        return drawn(params_of(cfg, D), rng), jnp.asarray(rng.normal(size=(2, 11, D)), jnp.float32)

    return make


def close(got, want, atol=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol * max(1.0, float(np.abs(want).max())))


# -------------------------------------------------------------------- a naive transcription, token by token, in float64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_expert(p, cfg, x):
    def linear(name, x):
        return x @ p[name]["kernel"] + p[name].get("bias", 0.0)

    up = linear("up", x)
    if isinstance(cfg, MLP):
        act = np.maximum(up, 0) if cfg.act == "relu" else 0.5 * up * (1 + np.vectorize(math.erf)(up / 2**0.5))
        return linear("down", act)
    gate = linear("gate", x)
    if cfg.limit is not None:
        gate, up = np.minimum(gate, cfg.limit), np.clip(up, -cfg.limit, cfg.limit)
    return linear("down", gate * sigmoid(cfg.beta * gate) * (up + cfg.offset))


def naive_route(p, cfg, x):
    """[(expert, weight)] of one token: DeepSeek-V3 technical report, eq. 12-16, and what others leave out of it."""
    logits = x @ p["kernel"] + p.get("bias", 0.0)
    score = sigmoid(logits) if cfg.score == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    worth = score + p.get("correction", 0.0)
    size = len(worth) // cfg.groups
    groups = [worth[g * size : (g + 1) * size] for g in range(cfg.groups)]
    value = [g.max() if cfg.group_score == "best" else np.sort(g)[-2:].sum() for g in groups]
    best = np.argsort(value)[::-1][: cfg.top_groups]
    allowed = [e for e in range(len(worth)) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -worth[e])[: cfg.top_k]
    total = sum(score[e] for e in chosen) if cfg.renormalise else 1.0
    return [(e, cfg.scale * score[e] / total) for e in chosen]


def naive(p, cfg, x_BTD):
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
    out = np.zeros(x_BTD.shape)
    for at in np.ndindex(x_BTD.shape[:2]):
        x = np.asarray(x_BTD[at], np.float64)
        for e, weight in naive_route(p["router"], cfg.router, x):
            out[at] += weight * naive_expert(jax.tree.map(lambda w, e=e: w[e], p["experts"]), cfg.expert, x)
        if cfg.shared is not None:
            gate = sigmoid(x @ p["shared_gate"]["kernel"]) if cfg.shared_gate else 1.0
            out[at] += gate * naive_expert(p["shared"], cfg.shared, x)
    return out


@every_mixture
def test_against_the_naive_transcription(cfg, made):
    p, x = made(cfg)
    close(jax.jit(lambda p, x: moe(p, cfg, x, None, GROUPED)[0])(p, x), naive(p, cfg, x))


# ---------------------------------------------------------------------------------------- one function, computed thrice


@pytest.mark.parametrize("name", ["softmax", "all experts", "groups by their best two, corrected", "biases, clipped"])
def test_dense_grouped_and_ample_buffers_agree(name, made):
    cfg = MIXTURES[name]
    p, x = made(cfg)

    def both(cfg, runtime):
        def f(p, x):
            y, stats = moe(p, cfg, x, None, runtime)
            return jnp.sum(jnp.sin(y)) + stats["balance"] + stats["z"], y

        return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(p, x)

    want = both(cfg, DENSE)
    for got in (both(cfg, GROUPED), both(replace(cfg, capacity=float(E)), GROUPED)):
        jax.tree.map(close, got, want)
    if "correction" in p["router"]:
        assert not want[1][0]["router"]["correction"].any(), "no gradient trains the correction"


@pytest.mark.parametrize("capacity", [None, float(E)], ids=["dense, grouped", "buffers"])
def test_experts_may_be_quantised_or_adapted(capacity, made, getkey):
    cfg = replace(MIXTURES["softmax"], capacity=capacity)
    p, x = made(cfg)
    ranks = {"gate": (E, D), "up": (E, D), "down": (E, 10)}

    def lora(name, w):
        a, b = jax.random.normal(getkey(), (*ranks[name], 2)), jax.random.normal(getkey(), (2, w.shape[2]))
        return Adapted(w, a, b, jnp.array(0.5))

    for change in (lora, lambda name, w: quantise(w, (1,))):
        changed = p | {"experts": {n: {"kernel": change(n, w["kernel"])} for n, w in p["experts"].items()}}
        equal = map_params(lambda _, w: dense(w, jnp.float32), params_of(cfg, D), changed)
        want = moe(equal, cfg, x, None, DENSE)[0]
        for runtime in (DENSE, GROUPED):
            close(moe(changed, cfg, x, None, runtime)[0], want, 1e-4)


ON_A_MESH = [
    Layout(zero=3),
    Layout(tensor=2, zero=0),
    Layout(tensor=2, replica=2, zero=1),
    Layout(expert=8, zero=0, spare=0.25),  # not enough room: several rounds
    pytest.param(Layout(expert=2, tensor=2, zero=1, split_stream=True), marks=pytest.mark.slow),
    pytest.param(Layout(expert=2, sequence=2, tensor=2, zero=3, spare=0.01), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", ON_A_MESH)
def test_on_a_mesh(layout, made):
    cfg = MIXTURES["biases, clipped"]
    p, _ = made(cfg)
    x, runtime = jax.random.normal(jax.random.key(3), (8, 8, D)), Runtime(layout=layout)

    def f(p, x, runtime):
        ready = use(params_of(cfg, D), p, runtime.layout, "float32")
        return jnp.sum(jnp.sin(moe(ready, cfg, x, None, runtime)[0]))

    both = jax.jit(jax.value_and_grad(f, (0, 1)), static_argnums=2)
    want = both(p, x, GROUPED)
    with jax.set_mesh(make_mesh(layout)):
        got = both(p, x, runtime)
    jax.tree.map(close, got, want)


def test_all_tokens_may_go_to_one_device(made):
    """The worst case of an exchange: correct, in as many rounds as it takes."""
    cfg = MIXTURES["one expert"]
    p, _ = made(cfg)
    p["router"]["kernel"] = jnp.zeros((D, E)).at[:, 5].set(1.0)
    x = jnp.abs(jax.random.normal(jax.random.key(3), (8, 8, D)))
    want = moe(p, cfg, x, None, DENSE)[0]
    layout = Layout(expert=8, spare=1.25)
    assert room(layout.spare, 64, 8) == 16
    with jax.set_mesh(make_mesh(layout)):
        got = jax.jit(lambda p, x: moe(p, cfg, x, None, Runtime(layout=layout))[0])(p, x)
    close(got, want)


def test_experts_that_do_not_divide_are_refused(made):
    cfg = MIXTURES["softmax"]
    p, _ = made(cfg)
    layout = Layout(expert=3, data=1)
    with jax.set_mesh(make_mesh(layout, jax.devices()[:3])), pytest.raises(ValueError, match="must divide experts=8"):
        moe(p, cfg, jnp.zeros((3, 2, D)), None, Runtime(layout=layout))


# ------------------------------------------------------------------------------------------------------------- capacity


def naive_kept(expert_BTk, real_BT, places):
    """Which choices find a place: first come, first served, row by row."""
    kept = np.zeros(expert_BTk.shape, bool)
    for b, row in enumerate(expert_BTk):
        taken = dict.fromkeys(range(E), 0)
        for t, i in np.ndindex(row.shape):
            if real_BT[b, t]:
                kept[b, t, i] = taken[row[t, i]] < places
                taken[row[t, i]] += 1
    return kept


def test_a_full_expert_drops_those_who_come_late(made):
    cfg = replace(MIXTURES["softmax"], capacity=0.4)
    p, x = made(cfg)
    real = np.ones((2, 11), bool)
    real[0, :4], real[1, 8:] = False, False
    assert capacity(cfg, 11) == 2  # ceil(0.4 * 11 * 3 / 8)
    r = route(p["router"], cfg.router, x)
    kept = naive_kept(np.asarray(r.expert_BTk), real, 2)
    assert 0 < (~kept[real]).sum() < real.sum() * 3, "the case must drop some, not all"
    want = np.zeros(x.shape)
    for b, t, i in zip(*np.nonzero(kept), strict=True):
        own = jax.tree.map(lambda w: np.asarray(w[r.expert_BTk[b, t, i]], np.float64), p["experts"])  # noqa: B023
        want[b, t] += float(r.weight_BTk[b, t, i]) * naive_expert(own, cfg.expert, np.asarray(x[b, t], np.float64))
    got = moe(p, cfg, x, jnp.asarray(real), GROUPED)[0]
    close(np.asarray(got)[real], want[real])


def test_padding_takes_no_place(made):
    cfg = replace(MIXTURES["softmax"], capacity=0.4)
    p, x = made(cfg)
    real = jnp.arange(11)[None] >= jnp.array([[5], [0]])
    noise = jnp.where(real[..., None], x, 100.0)
    a, b = (np.asarray(moe(p, cfg, y, real, GROUPED)[0]) for y in (x, noise))
    np.testing.assert_array_equal(a[np.asarray(real)], b[np.asarray(real)])


def test_dropping_is_causal(made):
    cfg = replace(MIXTURES["softmax"], capacity=0.5)
    p, x = made(cfg)
    whole = moe(p, cfg, x, None, GROUPED)[0]
    changed = moe(p, cfg, x.at[:, 6:].set(-x[:, 6:]), None, GROUPED)[0]
    np.testing.assert_array_equal(whole[:, :6], changed[:, :6])
    assert jnp.abs(whole[:, 6:] - changed[:, 6:]).max() > 0.1


# ----------------------------------------------------------------------------------------------------------- statistics


def test_balance_loss_is_the_reference_implementations(made):
    """Over one layer's tokens: E * sum over experts and places k of (share that chose e at k) * mean probability."""
    cfg = MIXTURES["softmax not renormalised"]
    p, x = made(cfg)
    real = np.ones((2, 11), bool)
    real[1, 7:] = False
    r = route(p["router"], cfg.router, x)
    stats = statistics(cfg, r, jnp.asarray(real))
    logits = np.asarray(r.logits_BTE, np.float64)[real]
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    share_kE = np.eye(E)[np.argsort(-prob, -1)[:, :2]].mean(0)
    np.testing.assert_allclose(stats["balance"], E * (share_kE * prob.mean(0)[None]).sum(), rtol=1e-5)
    np.testing.assert_allclose(stats["load"], share_kE.sum(0), atol=1e-6)
    np.testing.assert_allclose(stats["load"].sum(), 2.0, rtol=1e-6)
    np.testing.assert_allclose(stats["z"], (np.log(np.exp(logits).sum(-1)) ** 2).mean(), rtol=1e-5)


def test_balance_is_top_k_when_even():
    cfg = MoE(SWIGLU, 4, Router(2))
    router = {"kernel": jnp.concatenate([jnp.eye(4)] * 3) * 1e-4}
    x = jnp.eye(4)[None, :, jnp.arange(12) % 4]
    stats = statistics(cfg, route(router, cfg.router, x), None)
    np.testing.assert_allclose(stats["balance"], 2.0, rtol=1e-3)


def test_routers_are_float32_in_any_compute_dtype(made):
    cfg = MIXTURES["groups by their best two, corrected"]
    p, x = made(cfg)
    ready = use(params_of(cfg, D), p, None, "bfloat16")
    assert {w.dtype for w in jax.tree.leaves(ready["router"])} == {jnp.dtype("float32")}
    assert {w.dtype for w in jax.tree.leaves(ready["experts"])} == {jnp.dtype("bfloat16")}
    x = x.astype(jnp.bfloat16)
    got, want = route(ready["router"], cfg.router, x), route(p["router"], cfg.router, x.astype(jnp.float32))
    np.testing.assert_array_equal(got.weight_BTk, want.weight_BTk)
    assert moe(ready, cfg, x, None, GROUPED)[0].dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------------------------ balancing


def model():
    cfg = MoE(SWIGLU, E, Router(2, "sigmoid", correction=True))
    attn, norm = GQA(2, 2, 6, Rope()), RMSNorm()
    sparse, plain = Block(attn, cfg, norm), Block(attn, GLU(10), norm)
    stacks = (*decoder(plain, layers=1), *decoder(sparse, plain, sparse, layers=6))
    return Transformer(31, D, stacks, norm, 64)


def test_corrections_move_towards_equal_loads_layer_by_layer(getkey):
    spec = model()
    params = drawn(transformer_params(spec), np.random.default_rng(0))
    params = jax.tree_util.tree_map_with_path(lambda path, w: w * ("correction" not in str(path)), params)
    batch = inputs(jax.random.randint(getkey(), (2, 16), 0, 31))
    load = jax.jit(lambda params: forward(params, spec, batch, GROUPED).aux.experts["load"])(params)
    assert load.shape == (4, E), "one row per mixture, in the order of layers"
    moved = correct_routers(params, spec, load, 0.1)
    for row, (place, repeat) in enumerate([("0", 0), ("2", 0), ("0", 1), ("2", 1)]):
        got = moved["stacks"]["1"][place]["ffn"]["router"]["correction"][repeat]
        np.testing.assert_allclose(got, 0.1 * np.sign(2 / E - np.asarray(load[row])), atol=1e-6)
    back = jax.tree.map(lambda a, b: bool((a == b).all()), moved, params)
    assert sum(not same for same in jax.tree.leaves(back)) == 2, "nothing else moves"


def test_corrections_even_out_a_router_that_prefers_one_expert(getkey):
    spec = model()
    params = drawn(transformer_params(spec), np.random.default_rng(0))
    for place in ("0", "2"):
        params["stacks"]["1"][place]["ffn"]["router"]["correction"] = jnp.zeros((2, E)).at[:, 3].set(1.0)
    batch = inputs(jax.random.randint(getkey(), (4, 32), 0, 31))

    @jax.jit
    def step(params):
        load = forward(params, spec, batch, GROUPED).aux.experts["load"]
        return correct_routers(params, spec, load, 0.02), load

    loads = []
    for _ in range(80):
        params, load = step(params)
        loads.append(float(load.max()) * E / 2)
    assert loads[0] > 3.9, "every token chooses the preferred one"
    assert loads[-1] < 1.6
