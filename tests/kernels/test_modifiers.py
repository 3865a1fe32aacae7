"""ALiBi, relative biases and sinks: reference, chunked and decoding paths against a naive float64 oracle.

Gradients are checked along a random direction, against central differences of the oracle.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.cache import KV
from jaxllm.config import Alibi, Causal, Full, Local, RelativeBias
from jaxllm.kernels.attention import attention
from jaxllm.kernels.modifiers import Modifiers
from jaxllm.nn.attend import Scoring, self_attend
from jaxllm.nn.attention import Given
from jaxllm.nn.position import Tables, alibi_slopes
from jaxllm.records import Inputs, Mask
from jaxllm.runtime import Runtime
from tests.kernels import oracle

B, T, N, K, H = 2, 40, 6, 2, 16
SEGMENT = np.array([[1] * 24 + [2] * 16, [0] * 4 + [1] * 30 + [0] * 6], np.int32)
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((12, N))
SINKS = RNG.standard_normal(N) * 2
BLOOM, MPT = Alibi(), Alibi(6.0, "alternated", scale=0.7)
CASES = {
    "alibi": (Causal(), Modifiers(slopes_N=jnp.asarray(alibi_slopes(BLOOM, N)), alibi=BLOOM)),
    "scaled alibi": (Causal() & Local(20), Modifiers(slopes_N=jnp.asarray(alibi_slopes(MPT, N)), alibi=MPT)),
    "encoder's buckets": (Full(), Modifiers(table_RN=jnp.asarray(TABLE, jnp.float32), relative=RelativeBias(12, 30))),
    "decoder's buckets": (
        Causal(),
        Modifiers(table_RN=jnp.asarray(TABLE, jnp.float32), relative=RelativeBias(12, 30, causal=True)),
    ),
    "sinks": (Causal() & Local(9), Modifiers(sinks_N=jnp.asarray(SINKS, jnp.float32))),
    "alibi and sinks": (
        Causal(),
        Modifiers(slopes_N=jnp.asarray(alibi_slopes(BLOOM, N)), alibi=BLOOM, sinks_N=jnp.asarray(SINKS, jnp.float32)),
    ),
}
every = pytest.mark.parametrize("name", CASES)


def bucket_of(cfg, far):
    """T5's bucket of key - query, by walking up the boundaries."""
    half = cfg.buckets if cfg.causal else cfg.buckets // 2
    n = max(-far, 0) if cfg.causal else abs(far)
    exact = half // 2
    bounds = [exact * (cfg.furthest / exact) ** (j / (half - exact)) for j in range(1, half - exact)]
    at = n if n < exact else exact + sum(n >= bound - 1e-6 for bound in bounds)
    return at + (half if not cfg.causal and far > 0 else 0)


@cache
def pairs(name):
    """Which query meets which key [B, T, S], the bucket of every pair, and their distance [T, S]."""
    pattern, m = CASES[name]
    far = np.arange(T)[None, :] - np.arange(T)[:, None]
    at = None if m.relative is None else np.array([[bucket_of(m.relative, d) for d in row] for row in far])
    return oracle.dense(pattern, Mask(q_segment_BT=SEGMENT, k_segment_BS=SEGMENT), B, T, T), at, far


def naive(name, q, k, v, table, sinks):
    """Attention in float64, a head at a time."""
    m, (ok, at, far), out = CASES[name][1], pairs(name), np.zeros((B, T, N, H))
    for b, n in np.ndindex(B, N):
        scores = q[b, :, n] @ k[b, :, n // (N // K)].T * H**-0.5
        if m.alibi is not None:
            scores += float(m.slopes_N[n]) * m.alibi.scale * far
        if at is not None:
            scores += table[at, n]
        weights = np.where(ok[b], np.exp(scores), 0.0)
        total = weights.sum(1) + (np.exp(sinks[n]) if m.sinks_N is not None else 0.0)
        out[b, :, n] = weights @ v[b, :, n // (N // K)] / np.maximum(total, 1e-300)[:, None]
    return out


def arrays():
    return tuple(RNG.standard_normal((B, T, n, H)) for n in (N, K, K, N))


@every
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_values_and_gradients(name, backend):
    pattern, m = CASES[name]
    q, k, v, do = arrays()
    mask = Mask(q_segment_BT=jnp.asarray(SEGMENT), k_segment_BS=jnp.asarray(SEGMENT))

    @jax.jit
    def both(q, k, v, table, sinks, do):
        def run(q, k, v, table, sinks):
            own = replace(m, table_RN=table if m.relative else None, sinks_N=sinks if m.sinks_N is not None else None)
            return attention(q, k, v, pattern, mask, own, scale=H**-0.5, backend=backend)

        o, pull = jax.vjp(run, q, k, v, table, sinks)
        return o, pull(do)

    inputs = (q, k, v, TABLE, SINKS)
    got, gradients = both(*(jnp.asarray(x, jnp.float32) for x in (*inputs, do)))
    np.testing.assert_allclose(got, naive(name, *inputs), atol=3e-6)
    for i, gradient in enumerate(gradients):
        way, step = np.random.default_rng(i).standard_normal(inputs[i].shape), 1e-5
        ends = [
            (naive(name, *inputs[:i], inputs[i] + sign * step * way, *inputs[i + 1 :]) * do).sum() for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((np.asarray(gradient, np.float64) * way).sum()) == pytest.approx(slope, rel=2e-4, abs=2e-3)


@every
@pytest.mark.parametrize("count", [1, 5, 30])
def test_decoding_over_a_cache(name, count):
    """The last `count` tokens, with the others' keys and values in a cache that is longer than they are."""
    pattern, m = CASES[name]
    q, k, v, _ = arrays()
    whole = naive(name, q, k, v, TABLE, SINKS)
    old, room = T - count, 50

    def cached(x):
        rows = np.zeros((1, B, K, room, H))
        rows[0, :, :, :old] = x[:, :old].swapaxes(1, 2)
        return jnp.asarray(rows, jnp.float32)

    held = np.pad(SEGMENT[:, :old], ((0, 0), (0, room - old)))
    slots = jnp.asarray(np.broadcast_to(np.arange(room), (B, room)), jnp.int32)
    cache = KV(cached(k), cached(v), slots, jnp.asarray(held))
    new = [jnp.asarray(x[:, old:], jnp.float32) for x in (q, k, v)]
    slot = jnp.broadcast_to(jnp.arange(old, T), (B, count))
    inputs = Inputs(jnp.zeros((B, count), jnp.int32), slot, slot_BT=slot, segment_BT=jnp.asarray(SEGMENT[:, old:]))
    given = Given(inputs, Tables(), Runtime(), True)
    got = self_attend(*new, Scoring(pattern, H**-0.5, modifiers=m), given, (cache, 0))
    seen = pairs(name)[0][:, old:].any(2)
    np.testing.assert_allclose(got, whole[:, old:], atol=3e-6)
    assert (np.asarray(got)[~seen] == 0).all()
