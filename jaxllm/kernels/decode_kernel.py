"""The decode kernel: copies, online softmax, and the loop over blocks (`decode_tpu` says what it is about).

Records hold references inside the kernel and arrays, or what shall become references, outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxllm import config
from jaxllm.kernels.call import LOG2_E, dot
from jaxllm.kernels.pattern import allowed
from jaxllm.kernels.reference import MASKED
from jaxllm.kernels.tpu_sizes import chip

LANES = 128
BUFFERS = 3  # blocks in VMEM: one is computed while others are on their way, longer than a copy's latency
WIDEST = 256  # matrix unit
ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # a b^T


class Call(NamedTuple):
    """What is static in a call; hashable. R: queries of a kv head, T * G and padding.  value: width of a value.

    parts: 2, keys and values, or 1, latents.  page: rows; pages: of a block.  table: pages per row of the page table,
    None for a dense cache.  cores: that share the batch.
    """

    pattern: config.Pattern
    scale: float
    softcap: float | None
    R: int
    value: int
    parts: int
    page: int
    pages: int
    table: int | None
    cores: int

    @property
    def block(self) -> int:
        """Rows of a block."""
        return self.page * self.pages


class Scalars(NamedTuple):
    """int32, prefetched. layer [1]; lo, hi [B]: live pages of a row; table [B * M], flat, [1] for a dense cache."""

    layer: Any
    lo: Any
    hi: Any
    table: Any


class Asked(NamedTuple):
    """The queries and new tokens of all rows (inside the kernel: of one, and no B).

    q: [B, K, R, H].  names: [B, R, 2], slots and segments.  kv: [B, 1, K, c, n, H], of the n new tokens (and padding).
    kv_names: [B, 2, n].  sinks, slopes: [K, R, 1] times log2(e), or None.
    """

    q: Any
    names: Any
    kv: Any
    kv_names: Any
    sinks: Any
    slopes: Any


class Held(NamedTuple):
    """A cache in HBM. store: (k, v), (latents,) or (pool,).  scale: of int8 rows.  names: slots, segments [B, 2, S]."""

    names: Any
    scale: Any
    store: tuple[Any, ...]


class Buffers(NamedTuple):
    """n = BUFFERS of each in VMEM.

    kv: [n, pages, K, c, page, H].  scale: [n, pages, K, c, page].  names: [n, 2, block].  sem: [n], raised by copies.
    """

    kv: Any
    scale: Any
    names: Any
    sem: Any


class Sums(NamedTuple):
    """Of the online softmax, per kv head. top, total: [K, R, LANES], total one per lane.  out: [K, R, h]. float32."""

    top: Any
    total: Any
    out: Any


# -------------------------------------------------------------------------------------------------------------- copies


def _copies(call: Call, at: Scalars, held: Held, to: Buffers, row: Any, page: Any, place: tuple[Any, Any]) -> Any:
    """What fetches one page. place: the buffer, and the page in its block."""
    layer, (n, into) = at.layer[0], place
    if call.table is not None:
        found = at.table[row * call.table + page]
        pairs = [(held.store[0].at[layer, found], to.kv.at[n, into])]
        scale = None if held.scale is None else held.scale.at[layer, found]
    else:
        rows = pl.ds(pl.multiple_of(page * call.page, call.page), call.page)
        pairs = [(x.at[layer, row, :, rows], to.kv.at[n, into, :, c]) for c, x in enumerate(held.store)]
        scale = None if held.scale is None else held.scale.at[layer, row, :, :, rows]
    pairs += [] if scale is None else [(scale, to.scale.at[n, into])]
    return [pltpu.make_async_copy(*pair, to.sem.at[n]) for pair in pairs]


def _names_copy(call: Call, held: Held, to: Buffers, row: Any, block: Any, n: Any) -> Any:
    source = held.names.at[row, :, pl.ds(pl.multiple_of(block * call.block, LANES), call.block)]
    return pltpu.make_async_copy(source, to.names.at[n], to.sem.at[n])


def _whole(call: Call, at: Scalars, row: Any, block: Any) -> Any:
    """Whether all pages of a block are live."""
    first = block * call.pages
    return (at.lo[row] <= first) & (first + call.pages <= at.hi[row])


def _by_page(
    call: Call, at: Scalars, row: Any, block: Any, live: Callable[..., None], dead: Callable[..., None]
) -> None:
    """Calls live(page, its place in the block) or dead(place) for the pages of a block."""

    @pl.loop(0, call.pages)
    def _(i: Any) -> None:
        page = block * call.pages + i
        is_live = (at.lo[row] <= page) & (page < at.hi[row])
        pl.when(is_live)(partial(live, page, i))
        pl.when(jnp.logical_not(is_live))(partial(dead, i))


def _start(call: Call, at: Scalars, held: Held, to: Buffers, row: Any, block: Any, n: Any) -> None:
    """Begin the copies of a block into buffer n."""
    whole = _whole(call, at, row, block)
    _names_copy(call, held, to, row, block, n).start()

    def start(page: Any, i: Any) -> None:
        for copy in _copies(call, at, held, to, row, page, (n, i)):
            copy.start()

    def clear(i: Any) -> None:
        """Values that are not fetched get weight 0, and 0 times NaN is NaN."""
        to.kv[n, i, :, call.parts - 1] = jnp.zeros_like(to.kv[n, i, :, call.parts - 1])
        if to.scale is not None:
            to.scale[n, i] = jnp.zeros_like(to.scale[n, i])

    @pl.when(whole)
    def _all() -> None:
        for i in range(call.pages):
            start(block * call.pages + i, i)

    pl.when(jnp.logical_not(whole))(partial(_by_page, call, at, row, block, start, clear))


def _wait(call: Call, at: Scalars, held: Held, to: Buffers, row: Any, block: Any, n: Any) -> None:
    """Wait for what `_start` began."""
    whole = _whole(call, at, row, block)
    _names_copy(call, held, to, row, block, n).wait()

    def wait(page: Any, i: Any) -> None:
        for copy in _copies(call, at, held, to, row, page, (n, i)):
            copy.wait()

    @pl.when(whole)
    def _all() -> None:
        for buffer in (to.kv, to.scale) if to.scale is not None else (to.kv,):
            pltpu.make_async_copy(buffer.at[n], buffer.at[n], to.sem.at[n]).wait()

    pl.when(jnp.logical_not(whole))(partial(_by_page, call, at, row, block, wait, lambda i: None))


# -------------------------------------------------------------------------------------------------------------- kernel


def _wide(x: Float[Array, "R lanes"], width: int) -> Float[Array, "R width"]:
    """Equal lanes, as many as `width`."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * -(-width // LANES), 1)[:, :width]


class Piece(NamedTuple):
    """Keys and values to take in. kv: [pages, K, c, rows, H].  scale: [pages, K, c, rows] or None.  names: [2, n]."""

    kv: Any
    scale: Any
    names: Any

    def rows(self, k: int, c: int, dtype: Any) -> Array:
        """Keys (c = 0) or values (c = -1) of a head, [n, H]."""
        pages, _, parts, size, _ = self.kv.shape
        return self.kv[:, k, c % parts].reshape(pages * size, -1).astype(dtype)

    def scaled(self, x: Float[Array, "R n"], k: int, c: int) -> Float[Array, "R n"]:
        """x with each column times the scale of its row."""
        if self.scale is None:
            return x
        pages, _, parts, _ = self.scale.shape
        return x * jnp.concatenate([self.scale[i, k, c % parts][None] for i in range(pages)], 1)


def _absorb(call: Call, asked: Asked, pieces: list[Piece], sums: Sums) -> None:
    """Take pieces into the sums, under one maximum. All scores come first, so that no head waits for another."""
    heads, dtype, (q_slot, q_segment) = (
        range(asked.q.shape[0]),
        asked.q.dtype,
        (asked.names[:, 0:1], asked.names[:, 1:2]),
    )

    def masked(piece: Piece) -> list[Array]:
        slot, segment = piece.names[0:1], piece.names[1:2]
        seen = allowed(call.pattern, q_slot, slot) & (segment == q_segment) & (segment != 0)
        raw = [piece.scaled(_products(asked.q[k], piece.rows(k, 0, dtype)), k, 0) for k in heads]
        return [jnp.where(seen, _scores(call, asked, k, raw[k], slot - q_slot), MASKED) for k in heads]

    scores = [masked(piece) for piece in pieces]
    for k in heads:
        new = old = sums.top[k]
        for of_piece in scores:
            new = jnp.maximum(new, of_piece[k].max(1, keepdims=True))
        shrink = jnp.exp2(old - new)
        total, out = sums.total[k] * shrink, sums.out[k] * _wide(shrink, call.value)
        for piece, of_piece in zip(pieces, scores, strict=True):
            p = jnp.exp2(of_piece[k] - _wide(new, of_piece[k].shape[1]))
            v = piece.rows(k, -1, dtype)[:, : call.value]
            total, out = total + _by_lane(p), out + dot(piece.scaled(p, k, -1).astype(v.dtype), v)
        sums.top[k], sums.total[k], sums.out[k] = new, total, out


def _products(q: Float[Array, "R H"], k: Float[Array, "n H"]) -> Float[Array, "R n"]:
    """q k^T. The width beyond whole matrix units is apart, or all of k would be transposed before it is multiplied."""
    whole = q.shape[1] // WIDEST * WIDEST
    if whole in (0, q.shape[1]):
        return dot(q, k, ROWS_BY_ROWS)
    return dot(q[:, :whole], k[:, :whole], ROWS_BY_ROWS) + dot(q[:, whole:], k[:, whole:], ROWS_BY_ROWS)


def _scores(call: Call, asked: Asked, k: int, raw: Array, distance: Array) -> Float[Array, "R n"]:
    """Scores of one kv head, times log2(e), from products. distance: slots of keys - of queries."""
    s = raw * (call.scale * LOG2_E)
    if call.softcap is not None:
        s = jnp.tanh(raw * (call.scale / call.softcap)) * (call.softcap * LOG2_E)
    return s if asked.slopes is None else s + asked.slopes[k] * distance.astype(jnp.float32)


def _by_lane(p: Float[Array, "R n"]) -> Float[Array, "R lanes"]:
    """Sums of columns that are LANES apart; of a narrow p, the sum of each row in the first lane."""
    if p.shape[1] % LANES == 0:
        return sum((p[:, i : i + LANES] for i in range(LANES, p.shape[1], LANES)), start=p[:, :LANES])
    first = lax.broadcasted_iota(jnp.int32, (p.shape[0], LANES), 1) == 0
    return jnp.where(first, p.sum(1, keepdims=True), 0.0)


def _begin(asked: Asked, sums: Sums) -> None:
    """Nothing seen yet, or only a sink: a key of value 0."""
    sums.out[...] = jnp.zeros_like(sums.out)
    if asked.sinks is None:
        sums.top[...], sums.total[...] = jnp.full_like(sums.top, MASKED), jnp.zeros_like(sums.total)
    else:
        shape = sums.top.shape
        sums.top[...] = jnp.broadcast_to(asked.sinks[...], shape)
        sums.total[...] = (lax.broadcasted_iota(jnp.int32, shape, 2) == 0).astype(jnp.float32)


def _end(call: Call, sums: Sums, o_ref: Any) -> None:
    """What the sums come to; zeros for a query that saw nothing."""
    for k in range(o_ref.shape[0]):
        seen, total = sums.top[k] > MASKED / 2, sums.total[k].sum(1, keepdims=True)
        o = sums.out[k] / jnp.where(total > 0, total, 1.0)
        o_ref[k] = jnp.where(_wide(seen.astype(jnp.float32), call.value) > 0, o, 0.0).astype(o_ref.dtype)


def _kernel(call: Call, tree: Any, *refs: Any) -> None:
    """Grid (cores, rows of a core). tree: of the references.

    ahead: the buffer to be computed next, and the row and block to be fetched next; kept from row to row.
    """
    at, asked, held, o_ref, to, sums, ahead = jax.tree.unflatten(tree, refs)
    rows = pl.num_programs(1)
    row, end = pl.program_id(0) * rows + pl.program_id(1), (pl.program_id(0) + 1) * rows

    def blocks(row: Any) -> tuple[Any, Any]:
        """Of a row, at least one, which may have no page to fetch."""
        first = lax.div(at.lo[row], call.pages)
        return first, jnp.maximum(lax.div(at.hi[row] + (call.pages - 1), call.pages), first + 1)

    def fetch(buffer: Any) -> None:
        """Begin the copies of the next block that is not yet on its way."""
        at_row, block = ahead[1], ahead[2]

        @pl.when(at_row < end)
        def _() -> None:
            _start(call, at, held, to, at_row, block, buffer)
            over = block + 1 == blocks(at_row)[1]
            ahead[1] = jnp.where(over, at_row + 1, at_row)
            ahead[2] = jnp.where(over, blocks(jnp.minimum(at_row + 1, end - 1))[0], block + 1)

    first, last = blocks(row)

    @pl.when(pl.program_id(1) == 0)
    def _first_row() -> None:
        ahead[0], ahead[1], ahead[2] = 0, row, first
        pl.loop(0, BUFFERS - 1)(fetch)

    _begin(asked, sums)

    @pl.loop(first, last)
    def _block(block: Any) -> None:
        n = ahead[0]
        fetch(jnp.where(n == 0, BUFFERS - 1, n - 1))
        _wait(call, at, held, to, row, block, n)
        own = jnp.where(block == first, asked.kv_names[...], 0)  # the new tokens are seen once
        scale = None if to.scale is None else to.scale.at[n]
        _absorb(call, asked, [Piece(to.kv.at[n], scale, to.names[n]), Piece(asked.kv, None, own)], sums)
        ahead[0] = jnp.where(n == BUFFERS - 1, 0, n + 1)

    _end(call, sums, o_ref)


def run(call: Call, at: Scalars, asked: Asked, held: Held, interpret: Any) -> Float[Array, "B K R h"]:
    """The kernel over all rows of a batch."""
    B, K, R, H = asked.q.shape
    rows, scaled = B // call.cores, held.scale is not None

    def per_row(x: Any) -> pl.BlockSpec:
        zeros = (0,) * (x.ndim - 1)
        return pl.BlockSpec((None, *x.shape[1:]), lambda core, i, *_: (core * rows + i, *zeros))

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)

    specs = [*map(per_row, asked[:4]), *map(whole, jax.tree.leaves(asked[4:]))]
    specs += [pl.BlockSpec(memory_space=pl.ANY)] * len(jax.tree.leaves(held))
    out = jax.ShapeDtypeStruct((B, K, R, call.value), asked.q.dtype)
    sums = Sums(*(pltpu.VMEM((K, R, width), jnp.float32) for width in (LANES, LANES, call.value)))
    buffers = Buffers(
        pltpu.VMEM((BUFFERS, call.pages, K, call.parts, call.page, H), held.store[0].dtype),
        pltpu.VMEM((BUFFERS, call.pages, K, call.parts, call.page), jnp.float32) if scaled else None,
        pltpu.VMEM((BUFFERS, 2, call.block), jnp.int32),
        pltpu.SemaphoreType.DMA((BUFFERS,)),
    )
    scratch = (buffers, sums, pltpu.SMEM((3,), jnp.int32))

    def leaf(x: Any) -> bool:
        return x is not None and not isinstance(x, tuple)

    tree = jax.tree.structure((at, asked, held, out, *scratch), is_leaf=leaf)
    return pl.pallas_call(
        partial(_kernel, call, tree),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(at),
            grid=(call.cores, rows),
            in_specs=specs,
            out_specs=per_row(out),
            scratch_shapes=jax.tree.leaves(scratch, is_leaf=leaf),
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=chip().vmem * 7 // 8,
            disable_bounds_checks=True,  # of copies: as many scalar instructions as a small page's copy itself
        ),
        interpret=interpret,
        name="decode_attention",
    )(*jax.tree.leaves((at, asked, held)))
