"""Inside a block of a TPU kernel: the pieces of its variant, in an order that keeps both units busy.

A kernel says what it does with a query block (`Work`) and `compute` runs it for one visit: scores of later pieces are
begun before those of this one are absorbed, so that no unit waits for the other's result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxllm.kernels.call import Call, may_meet
from jaxllm.kernels.pattern import allowed, by_distance
from jaxllm.kernels.reference import MASKED
from jaxllm.kernels.schedule import FIRST, LAST, Piece, Schedule
from jaxllm.kernels.tpu_blocks import Guide, flat
from jaxllm.kernels.tpu_sizes import Tile


class Step(NamedTuple):
    """One grid step: its code, its blocks, its row's prefix, its head's slope, and key segments as a column."""

    code: Any
    query: Any
    key: Any
    prefix: Any
    slope: Any
    column: Any


def step_at(call: Call, guide: Guide, visits: int, head: Any, visit: Any, column: Any) -> Step:
    """The step at a visit of a query head (of B * N). visits: how many a head has."""
    at = flat(call, visits, head, visit)
    prefix = guide.prefix[head // call.N] if call.arrays.prefix else None
    slope = guide.slope[head % call.N] if call.alibi else None
    return Step(guide.code[at], guide.query[visit], guide.fetch[at], prefix, slope, column)


class Work(NamedTuple):
    """What a kernel does with a query block: begin, `score` and `absorb` each piece of each visit, end.

    absorb: gets the piece, and what `score` made of it.
    """

    begin: Callable[[], None]
    score: Callable[[Piece], tuple[Any, ...]]
    absorb: Callable[..., None]
    end: Callable[[], None]


def compute(call: Call, plan: Schedule, step: Step, ahead: int, segment: Any, work: Work) -> None:
    """Runs what the step's code says: `score` of later pieces before `absorb` of this one.

    A variant whose visits are all the first, or all the last, of their query block begins or ends it in the same
    stretch of code, where that overlaps with the products.
    """
    numbers = range(1, len(plan.variants) + 1)
    shared = {number: 0 if any(call.arrays) else _shared_edge(plan, number) for number in numbers}

    def body(number: int) -> None:
        variant, edge = plan.variants[number - 1], shared[number]
        if edge & FIRST:
            work.begin()
        if variant.arrays and segment is not None:
            step.column[...] = jnp.broadcast_to(segment[...], step.column.shape[::-1]).T
        pending = [work.score(piece) for piece in variant.pieces[:ahead]]
        for n, piece in enumerate(variant.pieces):
            pending += [work.score(later) for later in variant.pieces[n + ahead : n + ahead + 1]]
            work.absorb(piece, *pending.pop(0))
        if edge & LAST:
            work.end()

    def apart(edge: int) -> Any:
        """Whether this visit is at such an edge, and its variant does not see to it."""
        seen_to = [step.code >> 2 == number for number in numbers if shared[number] & edge]
        return reduce(lambda at, other: at & jnp.logical_not(other), seen_to, (step.code & edge) != 0)

    pl.when(apart(FIRST))(work.begin)
    for number in numbers:
        pl.when(step.code >> 2 == number)(partial(body, number))
    pl.when(apart(LAST))(work.end)


def _shared_edge(plan: Schedule, number: int) -> int:
    """The edges that all visits of a variant have in common."""
    edges = plan.visits.edge[plan.visits.variant == number]
    return int(np.bitwise_and.reduce(edges)) if edges.size else 0


def within(piece: Piece, tile: Tile) -> tuple[Any, Any]:
    """The piece's queries and keys in its block."""
    return pl.ds(piece.q, piece.queries), pl.ds(piece.k, tile.k)


def lean(call: Call, step: Step, piece: Piece, s: Array) -> Array:
    """Scores [keys, queries] of the piece, with slope * (key - query) added where there are slopes."""
    if not call.alibi:
        return s
    first = (step.key * call.block_k + piece.k) - (step.query * call.block_q + piece.q)
    distance = lax.broadcasted_iota(jnp.int32, s.shape, 0) - lax.broadcasted_iota(jnp.int32, s.shape, 1)
    return s + step.slope * (distance + first).astype(jnp.float32)


def hide(call: Call, step: Step, q_segment: Any, piece: Piece, s: Array) -> Array:
    """Scores [keys, queries] of the piece, with MASKED where the pair may not meet."""
    if piece.mask is None:
        return s
    q0, k0 = step.query * call.block_q + piece.q, step.key * call.block_k + piece.k
    q, k = (lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (1, 0))
    # one difference serves every piece, where only distances count
    seen = allowed(piece.mask, q - k + (q0 - k0), 0) if by_distance(piece.mask) else allowed(piece.mask, q + q0, k + k0)
    column = row = None
    if call.arrays.k_segment:
        column = step.column[pl.ds(piece.k, s.shape[0]), :]
        column = jnp.concatenate([column] * (piece.queries // column.shape[1]), axis=1)
    if q_segment is not None:
        row = q_segment[:, pl.ds(piece.q, piece.queries)]
    return jnp.where(may_meet(call, seen, k + k0, step.prefix, row, column), s, MASKED)
