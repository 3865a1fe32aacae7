"""What a blockwise kernel visits: a static list of blocks from the pattern, narrowed at run time by the mask's arrays.

Two sizes matter. A *block* is what a grid step loads; a *tile* is what it computes at once. A block is computed by one
of a few *variants*, each a list of its tiles that are not empty, so that a block on the diagonal skips the half above
it, and only tiles that the diagonal crosses pay for a predicate. A block that the pattern fills is computed plainly.

Run time chooses a variant per (row of the batch, visit): it skips blocks whose segments cannot meet, and computes
plainly those that one segment fills. A skipped visit asks for the key block that is already there: nothing is loaded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxllm import config
from jaxllm.kernels.pattern import Kind, kinds
from jaxllm.kernels.reference import Names

SKIP, PLAIN = 0, 1  # variant numbers with a fixed meaning; the others depend on the pattern
MOST_VARIANTS = 4  # beyond these the rarest masked variants are merged into one that checks every tile


class Shape(NamedTuple):
    """Lengths, and how they are cut. T, S: real lengths; the arrays are padded to whole blocks."""

    T: int
    S: int
    block_q: int
    block_k: int
    tile_q: int
    tile_k: int

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of query and key blocks."""
        return -(-self.T // self.block_q), -(-self.S // self.block_k)


class Arrays(NamedTuple):
    """Which arrays a mask has."""

    q_segment: bool
    k_segment: bool
    prefix: bool


class Variant(NamedTuple):
    """How a block is computed. tiles: (query tile, key tile, predicate needed?).  arrays: consult the mask's arrays."""

    tiles: tuple[tuple[int, int, bool], ...]
    arrays: bool


class Visits(NamedTuple):
    """Blocks in the order of the grid: by query block, then key block; every query block at least once. int32 [n].

    kind: by the pattern alone.  variant: its number, unless run time chooses SKIP or PLAIN.
    edge: 1 for the first visit of a query block + 2 for the last.
    """

    q: Int[np.ndarray, " n"]
    k: Int[np.ndarray, " n"]
    kind: Int[np.ndarray, " n"]
    variant: Int[np.ndarray, " n"]
    edge: Int[np.ndarray, " n"]


class Schedule(NamedTuple):
    """Visits, and the variants they name: number v is `variants[v - 1]`, the first is the plain one."""

    visits: Visits
    variants: tuple[Variant, ...]


@lru_cache(maxsize=64)
def schedule(pattern: config.Pattern, shape: Shape, arrays: Arrays, keys: tuple[int, int] | None = None) -> Schedule:
    """The schedule of one kernel call; of key blocks keys[0] .. keys[1] - 1 only, when given."""
    strict = _tile_kinds(pattern, shape)
    loose = np.where(_inside(shape), np.maximum(strict, Kind.MIXED), strict) if arrays.prefix else strict
    kind, wanted = _block_kinds(strict), _block_kinds(loose)
    if keys is not None:
        outside = (np.arange(kind.shape[1]) < keys[0]) | (np.arange(kind.shape[1]) >= keys[1])
        wanted = np.where(outside[None], Kind.EMPTY, wanted)
    variant, variants = _variants(loose, wanted, arrays)
    first_key = 0 if keys is None else keys[0]
    idle = np.logical_not(
        np.any(wanted > 0, axis=1, keepdims=True)
    )  # query blocks to be written, though they see nothing
    q, k = np.nonzero((wanted > 0) | (idle & (np.arange(kind.shape[1]) == first_key)))
    turn = np.asarray(np.diff(q, prepend=-1, append=-1) != 0)
    edge = turn[:-1] + 2 * turn[1:]
    return Schedule(Visits(*(x.astype(np.int32) for x in (q, k, kind[q, k], variant[q, k], edge))), variants)


def _tile_kinds(pattern: config.Pattern, shape: Shape) -> Int[np.ndarray, "nq nk rq rk"]:
    """Kinds of tiles by block. Queries past T count as queries; tiles of keys past S are empty."""
    (nq, nk), rq, rk = shape.blocks, shape.block_q // shape.tile_q, shape.block_k // shape.tile_k
    inner = kinds(pattern, nq * shape.block_q, shape.S, shape.tile_q, shape.tile_k)
    table = np.zeros((nq * rq, nk * rk), np.int32)
    table[:, : inner.shape[1]] = inner
    return table.reshape(nq, rq, nk, rk).transpose(0, 2, 1, 3)


def _inside(shape: Shape) -> Bool[np.ndarray, "nk _ rk"]:
    rk = shape.block_k // shape.tile_k
    starts = np.arange(shape.blocks[1] * rk) * shape.tile_k
    return (starts < shape.S).reshape(-1, 1, rk)


def _block_kinds(tiles: Int[np.ndarray, "nq nk rq rk"]) -> Int[np.ndarray, "nq nk"]:
    low, high = tiles.min((2, 3)), tiles.max((2, 3))
    return np.where(high == Kind.EMPTY, Kind.EMPTY, np.where(low == Kind.FULL, Kind.FULL, Kind.MIXED))


def _variants(
    tiles: Int[np.ndarray, "nq nk rq rk"], wanted: Int[np.ndarray, "nq nk"], arrays: Arrays
) -> tuple[Int[np.ndarray, "nq nk"], tuple[Variant, ...]]:
    """The number of each block's variant, and the variants."""
    rq, rk = tiles.shape[2:]
    found = [Variant(_listed(np.full((rq, rk), Kind.FULL)), False)]
    number = np.where(wanted == Kind.FULL, PLAIN, SKIP)
    if arrays.k_segment and (wanted == Kind.FULL).any():
        found.append(Variant(tuple((a, b, True) for a, b in np.ndindex(rq, rk)), True))
        number = np.where(wanted == Kind.FULL, len(found), number)
    mixed = wanted == Kind.MIXED
    if mixed.any():
        distinct, which, count = np.unique(
            tiles[mixed].reshape(-1, rq * rk), axis=0, return_inverse=True, return_counts=True
        )
        rank = np.argsort(np.argsort(-count, kind="stable"), kind="stable")
        rank = np.minimum(rank, MOST_VARIANTS - 1)
        number[mixed] = len(found) + 1 + rank[which.ravel()]
        for r in range(int(rank.max()) + 1):
            table = _merged(distinct[rank == r]).reshape(rq, rk)
            found.append(Variant(_listed(table, any(arrays)), any(arrays)))
    return number.astype(np.int32), tuple(found)


def _merged(tables: Int[np.ndarray, "m r"]) -> Int[np.ndarray, " r"]:
    """Tile kinds that are true of every table."""
    return np.where((tables == tables[0]).all(0), tables[0], Kind.MIXED)


def _listed(table: Int[np.ndarray, "rq rk"], arrays: bool = False) -> tuple[tuple[int, int, bool], ...]:
    return tuple((int(a), int(b), arrays or bool(table[a, b] == Kind.MIXED)) for a, b in np.argwhere(table))


def choose(plan: Schedule, shape: Shape, at: Names | None) -> tuple[Int[Array, "_ n"], Int[Array, "_ n"]]:
    """(code, fetch) per batch row and visit: 4 * variant + edge, and the key block to have loaded.

    at: segments padded with 0 to whole blocks and prefixes; None when the mask has no arrays: then one row serves all.
    """
    visits = plan.visits
    if at is None:
        return jnp.asarray(4 * visits.variant + visits.edge)[None], jnp.asarray(visits.k)[None]
    skip, plain = _run_time(visits, shape, at)
    masked = jnp.asarray(visits.variant)[None]
    variant = jnp.where(skip | (masked == SKIP), SKIP, jnp.where(plain, PLAIN, masked))
    live = variant != SKIP
    order = jnp.arange(len(visits.q))[None]
    latest = lax.cummax(jnp.where(live, order, -1), axis=1)
    source = jnp.where(latest >= 0, latest, jnp.argmax(live, axis=1, keepdims=True))
    return (4 * variant + visits.edge[None]).astype(jnp.int32), jnp.asarray(visits.k)[source]


def _run_time(visits: Visits, shape: Shape, at: Names) -> tuple[Bool[Array, "B n"], Bool[Array, "B n"]]:
    """Visits that the arrays empty, and those in which every pair may meet."""
    kind = jnp.asarray(visits.kind)[None]
    skip, plain = jnp.zeros((1, 1), bool), kind == Kind.FULL
    if at.prefix_B is not None:
        start = visits.k[None] * shape.block_k
        prefix = at.prefix_B[:, None]
        skip = (kind == Kind.EMPTY) & (start >= prefix)
        plain = plain | ((start + shape.block_k <= prefix) & (start + shape.block_k <= shape.S))
    if at.k_segment_BS is not None:
        k_range = _segment_range(at.k_segment_BS, shape.block_k)
        k_low, k_high, k_pure = (x[:, visits.k] for x in k_range)
        skip, plain = skip | (k_high == 0), plain & k_pure
        if at.q_segment_BT is not None:
            q_low, q_high, q_pure = (x[:, visits.q] for x in _segment_range(at.q_segment_BT, shape.block_q))
            skip = skip | (q_high < k_low) | (q_low > k_high)
            plain = plain & q_pure & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return skip, plain


def _segment_range(segment: Int[Array, "B n"], block: int) -> tuple[Array, Array, Array]:
    """Per block [B, blocks]: the lowest segment (padding apart), the highest, and whether no token is padding."""
    x = segment.reshape(segment.shape[0], -1, block)
    return jnp.where(x > 0, x, jnp.iinfo(jnp.int32).max).min(2), x.max(2), (x > 0).all(2)
