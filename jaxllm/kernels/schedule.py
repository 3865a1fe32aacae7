"""What a blockwise kernel visits: a static list of blocks from the pattern, narrowed at run time by the mask's arrays.

Two sizes matter. A *block* is what a grid step loads; a *tile* is what it computes at once. A block is computed by one
of a few *variants*, each a list of its pieces that are not empty, so that a block on the diagonal skips the half above
it, and only tiles that the diagonal crosses pay for a predicate. A block that the pattern fills is computed plainly.
A tile that the pattern's edge crosses falls into *grains*, computed on their own: of the two halves of a tile on the
diagonal one is often empty, or needs no predicate.

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
from jaxllm.kernels.pattern import Kind, kinds, narrowed
from jaxllm.kernels.reference import Names

SKIP, PLAIN = 0, 1  # variant numbers with a fixed meaning; the others depend on the pattern
FIRST, LAST = 1, 2  # a visit's edges: of its query block
MOST_VARIANTS = 8  # beyond these the rarest masked variants are merged into one that checks every tile


class Shape(NamedTuple):
    """Lengths, and how they are cut. T, S: real lengths; the arrays are padded to whole blocks.

    grain: queries of the smallest piece that a tile of `tile_q` may fall into; it divides `tile_q`.
    """

    T: int
    S: int
    block_q: int
    block_k: int
    tile_q: int
    tile_k: int
    grain: int

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of query and key blocks."""
        return -(-self.T // self.block_q), -(-self.S // self.block_k)


class Arrays(NamedTuple):
    """Which arrays a mask has."""

    q_segment: bool
    k_segment: bool
    prefix: bool


class Piece(NamedTuple):
    """A tile of a block, or a grain of it. q, k: its first query and key in the block.

    mask: as much of the pattern as its predicate needs; None when it needs no predicate at all.
    """

    q: int
    k: int
    queries: int
    mask: config.Pattern | None


class Variant(NamedTuple):
    """How a block is computed. arrays: consult the mask's arrays."""

    pieces: tuple[Piece, ...]
    arrays: bool


class Visits(NamedTuple):
    """Blocks in the order of the grid: by query block, then key block; every query block at least once. int32 [n].

    kind: by the pattern alone.  variant: its number, unless run time chooses SKIP or PLAIN.
    edge: FIRST for the first visit of a query block + LAST for the last.
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
    variant, variants = _variants(pattern, shape, arrays, loose, wanted)
    first_key = 0 if keys is None else keys[0]
    idle = np.logical_not(
        np.any(wanted > 0, axis=1, keepdims=True)
    )  # query blocks to be written, though they see nothing
    q, k = np.nonzero((wanted > 0) | (idle & (np.arange(kind.shape[1]) == first_key)))
    turn = np.asarray(np.diff(q, prepend=-1, append=-1) != 0)
    edge = FIRST * turn[:-1] + LAST * turn[1:]
    return Schedule(Visits(*(x.astype(np.int32) for x in (q, k, kind[q, k], variant[q, k], edge))), variants)


def _tile_kinds(pattern: config.Pattern, shape: Shape) -> Int[np.ndarray, "nq nk rq rk"]:
    """Kinds of grains by block. Queries past T count as queries; grains of keys past S are empty."""
    (nq, nk), rq, rk = shape.blocks, shape.block_q // shape.grain, shape.block_k // shape.tile_k
    inner = kinds(pattern, nq * shape.block_q, shape.S, shape.grain, shape.tile_k)
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
    pattern: config.Pattern,
    shape: Shape,
    arrays: Arrays,
    tiles: Int[np.ndarray, "nq nk rq rk"],
    wanted: Int[np.ndarray, "nq nk"],
) -> tuple[Int[np.ndarray, "nq nk"], tuple[Variant, ...]]:
    """The number of each block's variant, and the variants."""
    whole = np.full(tiles.shape[2:], Kind.FULL)
    found = [Variant(_pieces(pattern, shape, whole, None), False)]
    number = np.where(wanted == Kind.FULL, PLAIN, SKIP)

    def add(blocks: Bool[np.ndarray, "nq nk"], table: Int[np.ndarray, "rq rk"]) -> None:
        table = np.where(table == Kind.FULL, Kind.MIXED, table) if any(arrays) else table
        found.append(Variant(_pieces(pattern, shape, table, np.argwhere(blocks)), any(arrays)))
        number[blocks] = len(found)

    if arrays.k_segment and (wanted == Kind.FULL).any():
        add(wanted == Kind.FULL, whole)
    mixed = wanted == Kind.MIXED
    if mixed.any():
        distinct, which, count = np.unique(
            tiles[mixed].reshape(-1, whole.size), axis=0, return_inverse=True, return_counts=True
        )
        rank = np.argsort(np.argsort(-count, kind="stable"), kind="stable")
        rank = np.minimum(rank, MOST_VARIANTS - 1)
        ranks = np.full(wanted.shape, -1)
        ranks[mixed] = rank[which.ravel()]
        for r in range(int(rank.max()) + 1):
            add(ranks == r, _merged(distinct[rank == r]).reshape(whole.shape))
    return number.astype(np.int32), tuple(found)


def _merged(tables: Int[np.ndarray, "m r"]) -> Int[np.ndarray, " r"]:
    """Tile kinds that are true of every table."""
    return np.where((tables == tables[0]).all(0), tables[0], Kind.MIXED)


def _pieces(
    pattern: config.Pattern, shape: Shape, table: Int[np.ndarray, "rq rk"], blocks: Int[np.ndarray, "n 2"] | None
) -> tuple[Piece, ...]:
    """What of `blocks` is computed, by their kinds of grains: whole tiles where their grains agree."""
    per, found = shape.tile_q // shape.grain, []
    for a, b in np.ndindex(table.shape[0] // per, table.shape[1]):
        kind = table[a * per : (a + 1) * per, b]
        cut = per if (kind != kind[0]).any() else 1
        queries = shape.tile_q // cut
        for n in range(cut):
            q, k = a * shape.tile_q + n * queries, b * shape.tile_k
            mask = _mask(pattern, shape, blocks, (q, k, queries)) if kind[n] == Kind.MIXED else None
            if kind[n] != Kind.EMPTY:
                found.append(Piece(q, k, queries, mask))
    return tuple(found)


def _mask(
    pattern: config.Pattern, shape: Shape, blocks: Int[np.ndarray, "n 2"] | None, at: tuple[int, int, int]
) -> config.Pattern:
    """What the predicate of a piece at (q, k, queries) of all these blocks must hold."""
    (q, k, queries), (i, j) = at, np.asarray(blocks).T
    q, k = q + i * shape.block_q, k + j * shape.block_k
    return narrowed(pattern, q, q + queries, k, k + shape.tile_k)


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
