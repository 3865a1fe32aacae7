"""What a kernel is told to visit, against the dense mask: nothing missing, nothing unmasked that should be."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import config
from jaxllm.kernels.pattern import allowed
from jaxllm.kernels.reference import Names
from jaxllm.kernels.schedule import PLAIN, SKIP, Arrays, Shape, choose, schedule
from jaxllm.records import Mask
from tests.kernels.oracle import dense
from tests.kernels.test_pattern import patterns

BLOCK, TILE, GRAIN = 8, 4, 2


def padded(x):
    return jnp.asarray(np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))), jnp.int32)


@st.composite
def masks(draw, B=2):
    """(T, S, arrays) with packed, padded or mixed-up segments and prefixes, or none."""
    T, S = (draw(st.sampled_from((1, 13, 24, 37))) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    both = lambda n: np.sort(rng.integers(0, 4, (B, n)), 1) if draw(st.booleans()) else rng.integers(0, 3, (B, n))
    prefix = rng.integers(0, S + 1, B).astype(np.int32) if draw(st.booleans()) else None
    k_segment = both(S) if draw(st.booleans()) else None
    q_segment = both(T) if k_segment is not None and draw(st.booleans()) else None
    return T, S, Mask(q_segment_BT=q_segment, k_segment_BS=k_segment, prefix_B=prefix)


@settings(max_examples=12, deadline=None)
@given(patterns, masks())
def test_visits_cover_the_mask_and_hide_what_they_must(pattern, drawn):
    T, S, mask = drawn
    shape = Shape(T, S, BLOCK, BLOCK, TILE, TILE, GRAIN)
    arrays = Arrays(mask.q_segment_BT is not None, mask.k_segment_BS is not None, mask.prefix_B is not None)
    plan = schedule(pattern, shape, arrays)
    segments = [None if s is None else padded(s) for s in (mask.q_segment_BT, mask.k_segment_BS)]
    prefix = None if mask.prefix_B is None else jnp.asarray(mask.prefix_B)
    code, fetch = choose(plan, shape, Names(None, None, *segments, prefix) if any(arrays) else None)
    ok = dense(pattern, mask, 2, T, S)
    for row in range(2):
        at = row % code.shape[0]
        seen, bare = paint(pattern, plan, np.asarray(code[at]) >> 2, np.asarray(fetch[at]), shape)
        assert not (ok[row] & ~seen[:T, :S]).any(), "a pair that may meet is not visited"
        assert not (bare[:T, :S] & ~ok[row]).any(), "a pair that may not meet is visited without a predicate"
        assert not bare[:, S:].any()


def paint(pattern, plan, variant, fetch, shape):
    """Which pairs of the padded [T, S] are computed, and which of them without a predicate."""
    nq, nk = shape.blocks
    seen, bare = np.zeros((2, nq * BLOCK, nk * BLOCK), bool)
    for i, j, v, asked in zip(plan.visits.q, plan.visits.k, variant, fetch, strict=True):
        if v == SKIP:
            continue
        assert asked == j, "a live visit must load its own keys"
        for piece in plan.variants[v - 1].pieces:
            q, k = i * BLOCK + piece.q, j * BLOCK + piece.k
            at = slice(q, q + piece.queries), slice(k, k + TILE)
            assert not seen[at].any(), "a pair is visited twice"
            seen[at] = True
            bare[at] |= piece.mask is None
            if piece.mask is not None:
                told, meant = (allowed(p, *np.ogrid[at]) for p in (piece.mask, pattern))
                assert (told == meant).all(), "a piece's own mask differs from the pattern there"
    return seen, bare


@settings(max_examples=60, deadline=None)
@given(patterns, st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_every_query_block_begins_and_ends_once(pattern, T, S, segments):
    plan = schedule(pattern, Shape(T, S, BLOCK, BLOCK, TILE, TILE, GRAIN), Arrays(segments, segments, False))
    q, edge = plan.visits.q, plan.visits.edge
    assert sorted(q[edge & 1 != 0]) == sorted(q[edge & 2 != 0]) == list(range(-(-T // BLOCK)))
    assert (np.diff(q) >= 0).all()


def test_the_diagonal_is_computed_by_halves():
    plan = schedule(config.Causal(), Shape(4096, 4096, 1024, 1024, 256, 128, 128), Arrays(False, False, False))
    plain, diagonal = plan.variants
    assert len(plan.visits.q) == 10 and len(plain.pieces) == 32
    masked = [piece.queries for piece in diagonal.pieces if piece.mask is not None]
    assert sum(piece.queries for piece in diagonal.pieces) == 18 * 256 and masked == [128] * 8
    assert (plan.visits.variant == PLAIN).sum() == 6


def test_spans_of_keys_share_the_visits():
    shape, none = Shape(64, 64, BLOCK, BLOCK, TILE, TILE, GRAIN), Arrays(False, False, False)
    whole = schedule(config.Causal(), shape, none).visits
    halves = [schedule(config.Causal(), shape, none, keys).visits for keys in ((0, 4), (4, 8))]
    live = [(q, k) for v in halves for q, k, n in zip(v.q, v.k, v.variant, strict=True) if n != SKIP]
    assert sorted(live) == sorted(zip(whole.q, whole.k, strict=True))
