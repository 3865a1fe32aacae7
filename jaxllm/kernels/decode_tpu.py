"""Decoding on TPUs: a few queries per row against a cache, as fast as the cache can be read (Pallas, Mosaic).

Unusual, and measured on the compiler's bundles:

- One kernel for all caches: a block is some pages of one row, and a page is a slab [K, rows, H] of all heads, which one
  copy fetches. A dense cache is "pages in order"; a paged one looks each up in its table.
- A row's blocks, and then the next row's, are one sequence: the copies of a block begin before the block ahead of it is
  computed, across rows too, so that HBM never waits. Pages without a live key are not read.
- Nothing is assumed about what a cache row holds: its slot and its segment come along (8 bytes per token) and the mask
  is a predicate on them. Rings, windows, padding and packed rows need nothing more.
- Keys stand still in the matrix unit and the T * G queries of a kv head stream past: a softmax is then on [queries,
  keys] with full lanes. Sums over keys stay spread over lanes until the row ends.
- The forward's own new keys and values are the first block, a sink the state before it: the result is final.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxllm import config
from jaxllm.cache import KV, Cache, Paged
from jaxllm.kernels.call import LOG2_E, dot
from jaxllm.kernels.decode import New
from jaxllm.kernels.modifiers import NONE, Modifiers
from jaxllm.kernels.pattern import allowed
from jaxllm.kernels.reference import MASKED, Names, visible
from jaxllm.kernels.tpu_sizes import chip

LANES = 128
BLOCK_BYTES = 2**20  # of keys and values in a block, about
SCORE_BYTES = 4 * 2**20  # of scores of a block, at most
BUFFERS = 3  # blocks in VMEM: one is computed while others are on their way, longer than a copy's latency
WIDEST = 256  # matrix unit
NEW = 16  # new tokens are padded to so many
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
    """n = BUFFERS of each in VMEM. kv: [n, pages, K, c, page, H].  scale: [n, pages, K, c, page].  names: [n, 2, block].

    sem: [n], raised by every copy into a buffer.
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
    """Take pieces into the sums, under one maximum."""
    q, q_slot, q_segment = asked.q, asked.names[:, 0:1], asked.names[:, 1:2]
    found: list[list[Array]] = []
    for piece in pieces:
        slot, segment = piece.names[0:1], piece.names[1:2]
        seen = allowed(call.pattern, q_slot, slot) & (segment == q_segment) & (segment != 0)
        for k in range(q.shape[0]):
            s = piece.scaled(_products(q[k], piece.rows(k, 0, q.dtype)), k, 0)
            s = jnp.where(seen, _scores(call, asked, k, s, slot - q_slot), MASKED)
            found = [*found, [s]] if len(found) <= k else [*found[:k], [*found[k], s], *found[k + 1 :]]
    for k, scores in enumerate(found):
        new = old = sums.top[k]
        for s in scores:
            new = jnp.maximum(new, s.max(1, keepdims=True))
        shrink = jnp.exp2(old - new)
        total, out = sums.total[k] * shrink, sums.out[k] * _wide(shrink, call.value)
        for s, piece in zip(scores, pieces, strict=True):
            p = jnp.exp2(s - _wide(new, s.shape[1]))
            v = piece.rows(k, -1, q.dtype)[:, : call.value]
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
        return sum(p[:, i : i + LANES] for i in range(0, p.shape[1], LANES))
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


def _run(call: Call, at: Scalars, asked: Asked, held: Held, interpret: Any) -> Float[Array, "B K R h"]:
    B, K, R, H = asked.q.shape
    rows, scaled = B // call.cores, held.scale is not None

    def per_row(x: Array) -> pl.BlockSpec:
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
    leaf = lambda x: x is not None and not isinstance(x, tuple)
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


# ---------------------------------------------------------------------------------------------------------------- call


def decode_tpu(
    q_BTNH: Float[Array, "B T N H"],
    new: New,
    cached: tuple[Cache, Any],
    pattern: config.Pattern,
    modifiers: Modifiers = NONE,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: Any = False,
) -> Float[Array, "B T N h"]:
    """`decode.reference` in one kernel on one TPU device, for what `refusal` does not refuse.

    interpret: True, or `pltpu.InterpretParams`, for tests. Raises ValueError with the reason of a refusal.
    """
    cache, index = cached
    reason = refusal(q_BTNH, new, cache, pattern, modifiers)
    if reason is not None:
        raise ValueError(f"decode_tpu: {reason}; use the reference")
    (B, T, N, _), (K, h) = q_BTNH.shape, (new.k.shape[2], new.v.shape[3])
    R = _queries(q_BTNH, new)
    call = Call(
        pattern,
        scale,
        softcap,
        R,
        h,
        _parts(cache),
        *_cut(cache, K * R),
        cache.table_BM.shape[1] if isinstance(cache, Paged) else None,
        chip().cores if B % chip().cores == 0 else 1,
    )
    asked = _operands(call, q_BTNH, new, modifiers)
    o = _run(call, _scalars(call, cache, index, new), asked, _held(call, cache), interpret)
    o_BKTGh = o[:, :, : T * N // K].reshape(B, K, T, N // K, h)
    return o_BKTGh.transpose(0, 2, 1, 3, 4).reshape(B, T, N, h)


def refusal(q_BTNH: Array, new: New, cache: Cache, pattern: config.Pattern, modifiers: Modifiers) -> str | None:
    """Why the kernel does not take this call; None when it does."""
    rows, m = _page(cache), modifiers
    item = (cache.kv if isinstance(cache, Paged) else cache.k).dtype.itemsize
    least = LANES if cache.scale is not None else 32 // item
    if rows % least or (rows % LANES and LANES % rows):
        return f"rows come in pages of {rows}, which must be a power of two from {least} on, or a multiple of {LANES}"
    if new.prefix_B is not None:
        return "prefixes are not known to the kernel"
    if m.table_RN is not None or (m.alibi is not None and m.alibi.rounded):
        return f"scores are modified by {m.relative or m.alibi}"
    if not _simple(pattern):
        return f"{pattern} is not made of Full, Causal and Local"
    needed = _vmem(cache, q_BTNH, new)
    if needed > chip().vmem * 7 // 8:
        return f"it would need {needed / 2**20:.0f} MiB of {chip().vmem / 2**20:.0f} MiB of VMEM"
    return None


def _queries(q_BTNH: Array, new: New) -> int:
    """Queries of a kv head, in whole tiles."""
    return -(-q_BTNH.shape[1] * q_BTNH.shape[2] // new.k.shape[2] // 8) * 8


def _vmem(cache: Cache, q_BTNH: Array, new: New) -> int:
    """Bytes, about: queries and results twice, sums, scores and weights, blocks."""
    rows, widths = new.k.shape[2] * _queries(q_BTNH, new), (_lanes(q_BTNH.shape[3]), _lanes(new.v.shape[3]))
    page, pages = _cut(cache, rows)
    per_row = 2 * sum(widths) * q_BTNH.dtype.itemsize + 4 * (widths[1] + 2 * LANES) + 12 * page * pages
    return rows * per_row + BUFFERS * page * pages * _row_bytes(cache)


def _simple(pattern: config.Pattern) -> bool:
    match pattern:
        case config.And(left, right) | config.Or(left, right):
            return _simple(left) and _simple(right)
        case _:
            return isinstance(pattern, config.Full | config.Causal | config.Local)


def _page(cache: Cache) -> int:
    """Rows that are fetched or left out together; of a dense cache a divisor of its length."""
    match cache:
        case KV():
            return math.gcd(cache.k.shape[3], LANES)
        case Paged():
            return cache.kv.shape[4]
        case other:
            assert_never(other)


def _parts(cache: Cache) -> int:
    """2 where keys and values are kept, 1 for latents."""
    return cache.kv.shape[3] if isinstance(cache, Paged) else 2 if cache.v.shape[-1] else 1


def _lanes(width: int) -> int:
    """`width` as it lies in memory."""
    return -(-width // LANES) * LANES


def _row_bytes(cache: Cache) -> int:
    """Of keys and values of all heads of one token."""
    store = cache.kv if isinstance(cache, Paged) else cache.k
    return store.shape[2] * _parts(cache) * _lanes(store.shape[-1]) * store.dtype.itemsize


def _cut(cache: Cache, queries: int) -> tuple[int, int]:
    """Rows of a page, and pages of a block: whole lanes, evenly, about BLOCK_BYTES, few if there are many queries."""
    page = _page(cache)
    unit = max(page, LANES)
    units = -(-cache.slot_BS.shape[1] // unit)
    most = max(min(BLOCK_BYTES // _row_bytes(cache), SCORE_BYTES // (4 * queries)) // unit, 1)
    return page, -(-units // -(-units // most)) * unit // page


def _held(call: Call, cache: Cache) -> Held:
    names = _rows(jnp.stack([cache.slot_BS, cache.segment_BS], 1), 2, call.block)
    match cache:
        case KV():
            return Held(names, cache.scale, (cache.k, cache.v)[: call.parts])
        case Paged():
            return Held(names, cache.scale, (cache.kv,))
        case other:
            assert_never(other)


def _rows(x: Array, axis: int, unit: int) -> Float[Array, "..."]:
    """x with zeros behind it along an axis, up to a multiple of `unit`."""
    return jnp.pad(x, [(0, -n % unit if i == axis else 0) for i, n in enumerate(x.shape)])


def _scalars(call: Call, cache: Cache, index: Any, new: New) -> Scalars:
    """Which pages of each row hold a key that one of its queries sees."""
    at = Names(new.slot_BT, cache.slot_BS, new.segment_BT, cache.segment_BS, None)
    live_BS = visible(call.pattern, at).any(1)
    place = jnp.arange(live_BS.shape[1], dtype=jnp.int32)[None]
    hi = jnp.max(jnp.where(live_BS, place + 1, 0), 1)
    lo = jnp.minimum(jnp.min(jnp.where(live_BS, place, live_BS.shape[1]), 1), hi)
    table = cache.table_BM.ravel() if isinstance(cache, Paged) else jnp.zeros(1, jnp.int32)
    return Scalars(jnp.asarray(index, jnp.int32).reshape(1), lo // call.page, -(-hi // call.page), table)


def _operands(call: Call, q_BTNH: Array, new: New, m: Modifiers) -> Asked:
    """Queries and new tokens, heads first and in whole tiles. Padding is of segment 0, which meets nothing."""
    (B, T, N, H), K = q_BTNH.shape, new.k.shape[2]
    names_BT2 = jnp.stack([new.slot_BT, new.segment_BT], 2).astype(jnp.int32)
    kv = jnp.stack([x.swapaxes(1, 2) for x in (new.k, new.v)[: call.parts]], 2)

    def per_head(x: Array | None) -> Any:
        if x is None:
            return None
        return _rows(jnp.tile((x * LOG2_E).astype(jnp.float32).reshape(K, -1), T)[..., None], 1, call.R)

    slopes = None if m.slopes_N is None or m.alibi is None else m.slopes_N * m.alibi.scale
    return Asked(
        _rows(q_BTNH.reshape(B, T, K, -1, H).swapaxes(1, 2).reshape(B, K, -1, H), 2, call.R),
        _rows(jnp.repeat(names_BT2, N // K, 1), 1, call.R),
        _rows(kv, 3, NEW)[:, None],
        _rows(names_BT2, 1, NEW).swapaxes(1, 2),
        per_head(m.sinks_N),
        per_head(slopes),
    )
