"""commit and reorder, on hand-made rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import cache
from jaxllm.cache import Rows
from jaxllm.config import GLU, GQA, And, Block, Causal, Full, Local, Or, RMSNorm, Transformer, decoder


def model(pattern):
    block = Block(GQA(2, 1, 4, pattern=pattern), GLU(8), RMSNorm())
    return Transformer(10, 8, decoder(block, layers=2), RMSNorm(), context=64)


def rows(first, length, B=2):
    """Rows whose k is the slot's number and whose v is minus that, in every layer."""
    slot = jnp.asarray(first)[:, None] + jnp.arange(length)[None]
    k = jnp.broadcast_to(slot[None, :, None, :, None].astype(jnp.float32), (2, B, 1, length, 4))
    return ((Rows(k, -k, jnp.ones((B, length), jnp.int32)),),)


def held(caches):
    """{slot: value} of each batch row."""
    kv = caches[0][0]
    out = []
    for b in range(kv.slot_BS.shape[0]):
        live = np.flatnonzero(kv.segment_BS[b])
        out.append({int(kv.slot_BS[b, s]): float(kv.k[1, b, 0, s, 0]) for s in live})
        assert jnp.array_equal(kv.k[:, b, :, live], -kv.v[:, b, :, live])
    return out


def test_rejected_and_overflowing_rows_are_dropped():
    """Verifying 4 tokens at slot 13 of 16: a clamped update would overwrite 12."""
    caches = cache.init(model(Full()), 2, 16, jnp.float32)
    caches = cache.commit(caches, rows([0, 0], 14), jnp.array([0, 0]), jnp.array([14, 13]))
    caches = cache.commit(caches, rows([14, 13], 4), jnp.array([14, 13]), jnp.array([4, 1]))
    assert held(caches) == [{s: float(s) for s in range(16)}, {s: float(s) for s in range(14)}]


def test_ring_keeps_the_window():
    caches = cache.init(model(Local(5)), 2, 64, jnp.float32)
    assert caches[0][0].ring
    assert caches[0][0].k.shape == (2, 2, 1, 5, 4)
    start = jnp.array([0, 0])
    caches = cache.commit(caches, rows([0, 0], 12), start, jnp.array([12, 7]))  # more rows than fit at once
    assert held(caches) == [{s: float(s) for s in range(7, 12)}, {s: float(s) for s in range(2, 7)}]
    caches = cache.commit(
        caches, rows([12, 7], 3), jnp.array([12, 7]), jnp.array([1, 0])
    )  # rejected rows change nothing
    assert held(caches) == [{s: float(s) for s in range(8, 13)}, {s: float(s) for s in range(2, 7)}]


def test_a_window_longer_than_the_cache_is_no_ring():
    caches = cache.init(model(Local(5)), 1, 4, jnp.float32)
    assert not caches[0][0].ring


def test_reorder_moves_whole_rows():
    caches = cache.init(model(Full()), 2, 8, jnp.float32)
    caches = cache.commit(caches, rows([0, 0], 6), jnp.array([0, 0]), jnp.array([6, 2]))
    got = held(cache.reorder(caches, jnp.array([1, 1])))
    assert got == [held(caches)[1]] * 2


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        (Full(), None),
        (Local(7), 7),
        (Local(7) & Causal(), 7),
        (And(Local(7), Local(3)), 3),
        (Or(Local(7), Full()), None),
    ],
)
def test_window(pattern, want):
    assert cache.window(pattern) == want


def test_empty_cache_takes_no_memory():
    assert cache.nbytes(cache.init(model(Full()), 4, 0, jnp.float32)) == 0
