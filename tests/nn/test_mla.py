"""Latent attention: a naive transcription, naive against absorbed, the size of its cache."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import cache
from jaxllm.config import MLA, MLP, Block, Local, RMSNorm, Rope, Transformer, Yarn, decoder
from jaxllm.nn.attention import Given, attention, attention_params
from jaxllm.nn.position import tables
from jaxllm.params import count, map_params
from jaxllm.records import Inputs, inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward, logits, transformer_params

D, N, R, NOPE, ROPE, VALUE = 20, 3, 10, 6, 4, 5
NORM = RMSNorm(1e-6)
PLAIN = Runtime()
VARIANTS = {
    "interleaved": MLA(N, None, R, NOPE, ROPE, VALUE, Rope(interleaved=True), NORM),
    "half-split, latent queries": MLA(N, 7, R, NOPE, ROPE, VALUE, Rope(), NORM),
    "biases, scale": MLA(N, 7, R, NOPE, ROPE, VALUE, Rope(100.0, interleaved=True), NORM, bias=True, scale=0.7),
    "window, yarn": MLA(N, None, R, NOPE, ROPE, VALUE, Rope(scaling=Yarn(4.0, 8)), NORM, Local(5)),
}
every_variant = pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)


def stacks_of(cfg):
    return decoder(Block(cfg, MLP(16), NORM), layers=2)


def drawn(tree, rng):
    """Parameters of every kind with noise, made without a compilation."""
    return map_params(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), tree)


def rms(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


def turned(cfg, x, cos, sin):
    """One vector with its pairs turned."""
    out, half = np.empty_like(x), len(x) // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if cfg.position.interleaved else (i, i + half)
        out[a], out[b] = x[a] * cos[i] - x[b] * sin[i], x[b] * cos[i] + x[a] * sin[i]
    return out


def naive(p, cfg, x_BTD, rotation):
    """DeepSeek-V2, eq. 37-47, a token and a head at a time."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
    cos, sin = (np.asarray(t, np.float64) for t in (rotation.cos, rotation.sin))
    scale = (NOPE + ROPE) ** -0.5 if cfg.scale is None else cfg.scale

    def down(name, x):
        return x @ p[name]["kernel"] + p[name].get("bias", 0.0)

    out = np.zeros(x_BTD.shape)
    for b, x_TD in enumerate(np.asarray(x_BTD, np.float64)):
        latent = rms(down("kv_down", x_TD), p["kv_norm"]["scale"])
        key_rope = [turned(cfg, k, cos[b, t], sin[b, t]) for t, k in enumerate(down("k_rope", x_TD))]
        low = x_TD if cfg.q_rank is None else rms(down("q_down", x_TD), p["q_norm"]["scale"])
        up = p["q" if cfg.q_rank is None else "q_up"]["kernel"]
        for t in range(len(x_TD)):
            seen = [s for s in range(t + 1) if not isinstance(cfg.pattern, Local) or t - s < cfg.pattern.window]
            for n in range(N):
                q = low[t] @ up[:, n]
                q = np.concatenate([q[:NOPE], turned(cfg, q[NOPE:], cos[b, t], sin[b, t])])
                keys = [np.concatenate([latent[s] @ p["k_up"]["kernel"][:, n], key_rope[s]]) for s in seen]
                score = np.exp([scale * q @ k for k in keys])
                values = [latent[s] @ p["v_up"]["kernel"][:, n] for s in seen]
                mixed = sum(w * v for w, v in zip(score / score.sum(), values, strict=True))
                out[b, t] += mixed @ p["o"]["kernel"][n]
    return out + p["o"].get("bias", 0.0)


@every_variant
def test_against_the_naive_transcription(cfg):
    rng = np.random.default_rng(3)
    p, x = drawn(attention_params(cfg, D), rng), jnp.asarray(rng.normal(size=(2, 9, D)), jnp.float32)
    positions = inputs(jnp.zeros((2, 9), jnp.int32))
    shared = tables({}, stacks_of(cfg), positions.position_BT)
    got, rows = jax.jit(lambda p, x: attention(p, cfg, x, Given(positions, shared, PLAIN, True)))(p, x)
    np.testing.assert_allclose(got, naive(p, cfg, x, shared.rotations[cfg.position, ROPE]), rtol=0, atol=1e-5)
    assert rows[0].shape == (2, 1, 9, R + ROPE), "one key for all heads"
    assert rows[1].size == 0


@pytest.mark.parametrize(
    ("name", "width"),
    [("interleaved", 1), ("half-split, latent queries", 3), ("biases, scale", 20), ("window, yarn", 3)],
)
def test_absorbed_equals_naive(name, width, getkey):
    """A forward over a filled cache, which stays in the latent, against the whole forward, which does not."""
    spec = Transformer(31, D, stacks_of(VARIANTS[name]), NORM, 64)
    params = drawn(transformer_params(spec), np.random.default_rng(4))
    ids, start = jax.random.randint(getkey(), (2, 9 + width), 0, 31), jnp.array([9, 9])

    @partial(jax.jit, static_argnames="spec")
    def run(params, spec, batch, caches=None):
        out = forward(params, spec, batch, PLAIN, caches)
        return logits(params, spec, out.hidden_BTD, PLAIN), out.rows

    whole = run(params, spec, inputs(ids))[0]
    rows = run(params, spec, inputs(ids[:, :9]), cache.init(spec, 2, 0, jnp.float32))[1]
    caches = cache.commit(cache.init(spec, 2, 32, jnp.float32, ring=False), rows, jnp.zeros(2, jnp.int32), start)
    slot = 9 + jnp.arange(width)[None] + jnp.zeros((2, 1), jnp.int32)
    got = run(params, spec, Inputs(ids[:, 9:], slot, slot_BT=slot), caches)[0]
    np.testing.assert_allclose(got, whole[:, 9:], rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(whole).max())))


def test_a_cache_holds_the_latent_and_one_rotated_key_per_token():
    spec = Transformer(31, D, stacks_of(VARIANTS["interleaved"]), NORM, 64)
    caches = cache.init(spec, 3, 50, jnp.bfloat16)
    numbers = sum(x.size for stack in caches for place in stack for x in (place.k, place.v))
    assert numbers == spec.layers * 3 * 50 * (R + ROPE)


def test_parameters():
    cfg = VARIANTS["half-split, latent queries"]
    want = D * 7 + 7 + 7 * N * (NOPE + ROPE) + D * (R + ROPE) + R + R * N * (NOPE + VALUE) + N * VALUE * D
    assert count(attention_params(cfg, D)) == want
    assert count(attention_params(replace(cfg, bias=True), D)) == want + 7 + R + ROPE + D
