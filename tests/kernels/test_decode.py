"""Decode attention, plain and kernel (interpreted), against a naive float64 oracle, for every kind of cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxllm import config
from jaxllm.cache import KV, Paged, quantise
from jaxllm.kernels import decode_tpu as kernel
from jaxllm.kernels.decode import New, reference
from jaxllm.kernels.decode_tpu import decode_tpu, refusal
from jaxllm.kernels.modifiers import NONE, Modifiers
from jaxllm.records import Mask
from tests.kernels import oracle

CAUSAL = config.Causal()
LENGTHS = (0, 1, 131, 256)  # tokens in the cache, of 256: none, one, no whole page, full


class Case(NamedTuple):
    """One call: T queries per row, N query and K kv heads of width H, values of width h in a latent cache."""

    T: int = 1
    N: int = 4
    K: int = 2
    H: int = 64
    dtype: str = "float32"
    kind: str = "dense"
    page: int = 16
    pattern: config.Pattern = CAUSAL
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    lengths: tuple[int, ...] = LENGTHS
    S: int = 256
    block: int = 2**17


CASES = {
    "dense": Case(),
    "mqa": Case(T=4, N=8, K=1, dtype="bfloat16"),
    "mha": Case(N=3, K=3, H=80, sinks=True, softcap=5.0),
    "odd": Case(T=2, S=40, lengths=(0, 1, 39, 40)),
    "window": Case(T=4, pattern=CAUSAL & config.Local(100), alibi=True),
    "ring": Case(T=4, kind="ring", S=256, pattern=CAUSAL & config.Local(200), lengths=(0, 255, 256, 1000)),
    "paged": Case(kind="paged", N=16, K=2),
    "paged bfloat16": Case(T=4, kind="paged", page=32, dtype="bfloat16", H=128, sinks=True),
    "latent": Case(T=4, kind="latent", K=1, H=160),
    "paged latent": Case(kind="paged latent", K=1, H=160, page=8),
    "int8": Case(kind="int8", T=2),
    "paged int8": Case(kind="paged int8", page=128),
}


def inputs(case, seed=0):
    """q, New, (cache, layer), and what the oracle reads: keys and values [B, S + T, K, H] and their mask."""
    rng, (B, S, T) = np.random.default_rng(seed), (len(case.lengths), case.S, case.T)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(case.dtype))
    latent, value = "latent" in case.kind, case.H // 2 if "latent" in case.kind else case.H
    length = np.array(case.lengths)[:, None]
    place = np.arange(S)[None]
    slot = (length - 1 - (length - 1 - place) % S if case.kind == "ring" else place + 0 * length).astype(np.int32)
    segment = ((slot >= 0) & (slot < length)).astype(np.int32)
    k, v = draw(B, S, case.K, case.H), draw(B, S, case.K, value)
    new_k, new_v = draw(B, T, case.K, case.H), draw(B, T, case.K, value)
    v, new_v = (k[..., :value], new_k[..., :value]) if latent else (v, new_v)
    new_slot = (length + np.arange(T)).astype(np.int32)
    new = New(jnp.asarray(new_k), jnp.asarray(new_v), jnp.asarray(new_slot), jnp.ones((B, T), jnp.int32))
    parts = [x.transpose(0, 2, 1, 3) for x in ([k] if latent else [k, v])]
    cached = store(case, parts, slot, segment, rng)
    if "int8" in case.kind:
        k, v = (np.asarray(q, np.float32) * np.asarray(s)[..., None] for q, s in map(quantise, (k, v)))
    mask = Mask(
        new_slot, np.concatenate([slot, new_slot], 1), np.ones((B, T)), np.concatenate([segment, np.ones((B, T))], 1)
    )
    joined = [
        np.concatenate([np.asarray(a, np.float64), np.asarray(b, np.float64)], 1) for a, b in ((k, new_k), (v, new_v))
    ]
    return jnp.asarray(draw(B, T, case.N, case.H)), new, (cached, 1), (*joined, mask)


def store(case, parts, slot, segment, rng):
    """The cache of two layers; NaN in the other one, and in pages that hold nothing."""
    names, scale = (jnp.asarray(slot), jnp.asarray(segment)), None
    if "int8" in case.kind:
        parts, scales = zip(*[quantise(jnp.asarray(x)) for x in parts], strict=True)
        scale = np.stack(scales, 2)  # [B, K, c, S]
    kv, B, S = np.stack(parts, 2), len(slot), case.S  # [B, K, c, S, H]
    size = case.page if "paged" in case.kind else np.gcd(S, 128)
    dead = ~segment.reshape(B, -1, size).any(2)
    two = lambda x: jnp.asarray(np.stack([np.full_like(x, np.nan if x.dtype != np.int8 else 127), x]))
    if "paged" not in case.kind:
        gone = np.repeat(dead, size, 1)
        if scale is None:
            kv = np.where(gone[:, None, None, :, None], np.nan, kv).astype(kv.dtype)
        else:
            scale = np.where(gone[:, None, None], np.nan, scale)
        k, v = kv[:, :, 0], kv[:, :, -1] if kv.shape[2] == 2 else kv[:, :, 0, :, :0]
        return KV(two(k), two(v), *names, None if scale is None else two(scale), case.kind == "ring")

    pages = rng.permutation(B * S // size + 3)[: B * S // size].reshape(B, -1)

    def pool(x):  # [B, K, c, S, w] to [P, K, c, size, w]
        cut = x.reshape(*x.shape[:3], -1, size, x.shape[-1]).transpose(0, 3, 1, 2, 4, 5)
        out = np.full((B * S // size + 3, *cut.shape[2:]), np.nan if x.dtype != np.int8 else 127).astype(x.dtype)
        out[pages[~dead]] = cut[~dead]
        return out

    table = jnp.asarray(pages, jnp.int32)
    return Paged(two(pool(kv)), table, *names, None if scale is None else two(pool(scale[..., None])[..., 0]))


def modifiers(case):
    sinks = jnp.linspace(-1, 2, case.N) if case.sinks else None
    slopes = jnp.linspace(0.01, 0.1, case.N) if case.alibi else None
    return Modifiers(slopes, sinks_N=sinks, alibi=config.Alibi() if case.alibi else None)


def wanted(case, q, joined):
    """A query at a time, in float64."""
    k, v, mask = joined
    ok, G, m = oracle.dense(case.pattern, mask, *q.shape[:2], k.shape[1]), case.N // case.K, modifiers(case)
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        s = case.H**-0.5 * k[b, ok[b, t], n // G] @ np.asarray(q[b, t, n], np.float64)
        s = s if case.softcap is None else case.softcap * np.tanh(s / case.softcap)
        if case.alibi:
            s = s + float(m.slopes_N[n]) * (mask.k_slot_BS[b, ok[b, t]] - mask.q_slot_BT[b, t])
        e, sink = np.exp(s), np.exp(float(m.sinks_N[n])) if case.sinks else 0.0
        out[b, t, n] = e @ v[b, ok[b, t], n // G] / (e.sum() + sink)
    return out


COVERING = ("mqa", "window", "paged", "latent", "int8")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in COVERING else pytest.mark.slow) for n in CASES])
def test_equals_the_oracle(name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(kernel, "BLOCK_BYTES", case.block)  # several blocks per row
    q, new, cached, joined = inputs(case)
    want = wanted(case, q, joined)
    options = {"scale": case.H**-0.5, "softcap": case.softcap}
    assert refusal(q, new, cached[0], case.pattern, modifiers(case)) is None
    got = decode_tpu(q, new, cached, case.pattern, modifiers(case), **options, interpret=pltpu.InterpretParams())
    tolerance = 2e-6 if case.dtype == "float32" else 1e-2
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max())
    clean = jax.tree.map(lambda x: jnp.nan_to_num(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, cached[0])
    plain = reference(q, new, (clean, 1), case.pattern, modifiers(case), **options, dtype=jnp.float32)
    np.testing.assert_allclose(np.asarray(plain, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max())


def test_refusals():
    q, new, (cache, _), _ = inputs(Case(kind="paged", page=24, S=192, lengths=(5,)))
    assert "pages of 24, which must be a power of two from 8 on" in refusal(q, new, cache, CAUSAL, NONE)
    with pytest.raises(ValueError, match=r"decode_tpu: rows come in pages of 24.*use the reference"):
        decode_tpu(q, new, (cache, 0), CAUSAL, scale=1.0)
    q, new, (cache, _), _ = inputs(Case(lengths=(5,)))
    assert "prefixes" in refusal(q, new._replace(prefix_B=jnp.ones(1, jnp.int32)), cache, CAUSAL, NONE)
    assert "Strided" in refusal(q, new, cache, config.Strided(4), NONE)
    assert "MiB of VMEM" in refusal(jnp.zeros((1, 16, 4096, 64)), new, cache, CAUSAL, NONE)
    rounded = Modifiers(jnp.ones(4), alibi=config.Alibi(rounded=True))
    assert "rounded=True" in refusal(q, new, cache, CAUSAL, rounded)
