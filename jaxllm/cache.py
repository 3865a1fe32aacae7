"""Key/value caches and their verbs: `init`, `commit`, `read`, `forget`, `reorder`.

`forward` only reads a cache and returns new rows; `commit` writes accepted rows once, after the layer scan. With the
cache in the scan's carry the same decode step needs 12 times the temporary memory (2,304 MiB against 192 MiB for a
2 GiB cache on TPU v5e), and rejected rows (speculation) would overwrite live ones.

Dense and ring are one kind: a ring is a cache shorter than the context. A token of slot s lies in row s % S, and the
cache remembers each row's slot and segment, so the mask needs no other arithmetic. Layout is head-major,
[L, B, K, S, H]. A paged cache has its rows in a pool: K and V of all heads lie together in a page, which is then one
copy to fetch, and a table says which pages are a row's. Who owns a page is not decided here.

Either kind may hold int8: each row of each head, divided by its largest absolute value / 127, which is kept beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxllm.config import GQA, MLA, And, Attention, Block, Local, Longformer, Pattern, Stack, Transformer
from jaxllm.sharding import mesh_sizes


@struct.dataclass
class KV:
    """Keys (rotated) and values of the L layers at one place of a stack's pattern.

    k, v: [L, B, K, S, H]; for latents (MLA) K = 1, k is [latent | rotated key] and v has width 0.
    slot_BS: int32, the slot each row holds.  segment_BS: int32, 0 = empty.
    scale: float32 [L, B, K, c, S] of int8 rows, c = 2 (of keys, of values), or 1 for latents; None when not int8.
    ring: whether slots wrap around (a sliding window keeps only its width).
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S h"]
    slot_BS: Int[Array, "B S"]
    segment_BS: Int[Array, "B S"]
    scale: Float[Array, "L B K c S"] | None = None
    ring: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Paged:
    """The same in a pool of P pages of `size` rows, which all batch rows share.

    kv: [L, P, K, c, size, H], keys and then values (c = 2), or latents (c = 1).  scale: float32 [L, P, K, c, size].
    table_BM: int32, row s of batch row b lies in page table_BM[b, s // size]. Rows must not write to a common page.
    slot_BS, segment_BS: as in `KV`, S = M * size.
    """

    kv: Float[Array, "L P K c size H"]
    table_BM: Int[Array, "B M"]
    slot_BS: Int[Array, "B S"]
    segment_BS: Int[Array, "B S"]
    scale: Float[Array, "L P K c size"] | None = None
    ring: bool = struct.field(pytree_node=False, default=False)


Cache = KV | Paged


@struct.dataclass
class Rows:
    """What a forward adds to a cache: k, v [L, B, K, T, H] and the tokens' segments [B, T]."""

    k: Float[Array, "L B K T H"]
    v: Float[Array, "L B K T h"]
    segment_BT: Int[Array, "B T"]


PUT_SINGLY = 16  # tokens per row
Caches = tuple[tuple[Cache, ...], ...]  # caches[stack][place in the pattern]; a stack that shares has one, of one layer


def window(pattern: Pattern) -> int | None:
    """How many of the latest tokens a causal query can see under this pattern; None when there is no bound."""
    match pattern:
        case Local(w):
            return w
        case And(left, right):
            bounds = [w for w in (window(left), window(right)) if w is not None]
            return min(bounds, default=None)
        case _:
            return None


def widths(attn: Attention) -> tuple[int, int, int]:
    """(heads, width of a key, width of a value) of what a layer caches per token."""
    match attn:
        case GQA():
            return attn.kv_heads, attn.head_dim, attn.head_dim
        case Longformer():
            return attn.heads, attn.head_dim, attn.head_dim
        case MLA():
            return 1, attn.kv_rank + attn.rope_dim, 0
        case other:
            assert_never(other)


def init(
    spec: Transformer, batch: int, size: int, dtype: DTypeLike, ring: bool = True, page: int | None = None
) -> Caches:
    """Empty caches for `size` slots per row; layers with a sliding window keep only its width when `ring`.

    size=0 gives caches that hold nothing: `forward` against them is a prefill that reads no cache and returns rows.
    dtype: of what is kept; int8 quantises.  page: rows of a page; the pool then holds what all rows may need, page p of
    batch row b being b * M + p. An engine that shares pages makes its own pool and table.
    Raises ValueError when `page` does not divide what a layer keeps.
    """
    quantised = jnp.dtype(dtype) == jnp.int8

    def one(block: Block, repeats: int) -> Cache:
        attn = block.attn
        bound = window(attn.pattern) if ring and spec.causal else None
        rows = size if bound is None else min(bound, size)
        wraps = rows < size
        (heads, key, value), names = widths(attn), (batch, rows)
        parts = 2 if value else 1
        # Arrays of their own: a buffer that stands in two places cannot be donated.
        slot, segment = jnp.zeros(names, jnp.int32), jnp.zeros(names, jnp.int32)
        if page is None:
            k, v = (jnp.zeros((repeats, batch, heads, rows, width), dtype) for width in (key, value))
            scale = jnp.zeros((repeats, batch, heads, parts, rows), jnp.float32) if quantised else None
            return KV(k, v, slot, segment, scale, wraps)
        if rows % page:
            raise ValueError(f"cache: pages of {page} rows do not divide the {rows} rows of a layer; change the size")
        shape, table = (repeats, batch * rows // page, heads, parts, page), jnp.arange(batch * rows // page)
        scale = jnp.zeros(shape, jnp.float32) if quantised else None
        kv = jnp.zeros((*shape, key), dtype)
        return Paged(kv, table.reshape(batch, -1).astype(jnp.int32), slot, segment, scale, wraps)

    def held(stack: Stack) -> tuple[Cache, ...]:
        if stack.shared is not None:
            return (one(stack.pattern[0], 1),)
        return tuple(one(block, stack.repeats) for block in stack.pattern)

    return tuple(map(held, spec.stacks))


def commit(caches: Caches, rows: Any, start_B: Int[Array, " B"], count_B: Int[Array, " B"]) -> Caches:
    """Write the first count_B[b] of a forward's rows at slots start_B[b], start_B[b] + 1, ...

    Rows at or past the count are dropped, and so are rows past the end of a cache that holds the whole context: a
    clamped update would overwrite valid ones. A ring keeps the last rows that fit.
    """

    def one(cache: Cache, new: Rows) -> Cache:
        size, length = cache.slot_BS.shape[1], new.segment_BT.shape[1]
        if size == 0:
            return cache
        i_T = jnp.arange(length)[None]
        slot_BT = start_B[:, None] + i_T
        keep = i_T < count_B[:, None]
        if cache.ring:
            keep &= i_T >= count_B[:, None] - size
        row_BT = jnp.where(keep, slot_BT % size if cache.ring else slot_BT, size)  # row `size` is out of range: dropped
        b = jnp.arange(slot_BT.shape[0])[:, None]
        return replace(
            _write(cache, new, row_BT),
            slot_BS=cache.slot_BS.at[b, row_BT].set(slot_BT, mode="drop"),
            segment_BS=cache.segment_BS.at[b, row_BT].set(new.segment_BT, mode="drop"),
        )

    return tuple(tuple(map(one, stack, new)) for stack, new in zip(caches, rows, strict=True))


def _write(cache: Cache, new: Rows, row_BT: Int[Array, "B T"]) -> Cache:
    """The cache with new keys and values, and their scales, in these rows; those past its end are dropped."""
    parts = [new.k, new.v] if new.v.shape[-1] else [new.k]
    scale = cache.scale
    if scale is not None:
        parts, scales = zip(*map(quantise, parts), strict=True)
        of_rows = jnp.stack(scales, 3)  # [L, B, K, c, T]
    match cache:
        case KV():
            b_BT = jnp.broadcast_to(jnp.arange(row_BT.shape[0])[:, None], row_BT.shape)
            kept = (cache.k, cache.v)[: len(parts)]
            k, v = (*(_put(to, x, (b_BT, row_BT), 3) for to, x in zip(kept, parts, strict=True)), cache.v)[:2]
            scale = None if scale is None else _put(scale, of_rows, (b_BT, row_BT), 4)
            return replace(cache, k=k, v=v, scale=scale)
        case Paged():
            size = cache.kv.shape[4]
            page_BT = jnp.take_along_axis(cache.table_BM, row_BT // size, 1, mode="fill", fill_value=cache.kv.shape[1])
            at = page_BT, row_BT % size
            scale = None if scale is None else _put(scale, of_rows, at, 4)
            return replace(cache, kv=_put(cache.kv, jnp.stack(parts, 3), at, 4), scale=scale)
        case other:
            assert_never(other)


def _put(to: Array, x: Array, at: tuple[Int[Array, "B T"], Int[Array, "B T"]], axis: int) -> Float[Array, ...]:
    """`to` with to[:, at[0][b, t], ..., at[1][b, t]] = x[:, b, ..., t], places out of range left out.

    axis: of `to` and x that at[1] and t count along. A few tokens are put one by one: XLA on TPU would turn the whole
    array to scatter into it, and turn it back for who reads it. On a mesh it must be a scatter, which stays local.
    """
    (B, T), x = at[0].shape, x.astype(to.dtype)
    if T > PUT_SINGLY or max(mesh_sizes().values(), default=1) > 1:
        index: list[Any] = [slice(None)] * to.ndim
        index[1], index[axis] = at
        return to.at[tuple(index)].set(jnp.moveaxis(x, (1, axis), (0, 1)), mode="drop")
    one = [1 if i in (1, axis) else n for i, n in enumerate(to.shape)]

    def cut(array: Array, outer: Any, row: Any) -> tuple[Array, list[Any]]:
        start = [0] * to.ndim
        start[1], start[axis] = outer, row
        return jax.lax.dynamic_slice(array, start, one), start

    def put(i: Any, to: Array) -> Array:
        outer, row = (place.reshape(-1)[i] for place in at)
        old, start = cut(to, outer, row)  # clamped: where the place is out of range, what is there is written back
        kept = (outer < to.shape[1]) & (row < to.shape[axis])
        return jax.lax.dynamic_update_slice(to, jnp.where(kept, cut(x, i // T, i % T)[0], old), start)

    return jax.lax.fori_loop(0, B * T, put, to)


def quantise(x: Float[Array, "*rows H"]) -> tuple[Int[Array, "*rows H"], Float[Array, "*rows"]]:
    """int8 values and the float32 scale of each row: x is about values * scale."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale


def read(
    cache: Cache, index: Any, value: int, dtype: DTypeLike
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S h"]]:
    """Keys and values of one layer, as if the cache were dense and not quantised. value: the width of a value.

    Latents are one array: values are the first part of it.
    """
    scale = None if cache.scale is None else cache.scale[index]
    match cache:
        case KV():
            parts = [cache.k[index], cache.v[index]] if cache.v.shape[-1] else [cache.k[index]]
            scales = [] if scale is None else [scale[:, :, c] for c in range(len(parts))]
        case Paged():
            parts = _in_order(cache.kv[index], cache.table_BM)
            scales = [] if scale is None else [x[..., 0] for x in _in_order(scale[..., None], cache.table_BM)]
        case other:
            assert_never(other)
    if scale is not None:
        parts = [x.astype(jnp.float32) * s[..., None] for x, s in zip(parts, scales, strict=True)]
    parts = [x.astype(dtype) for x in parts]
    return parts[0], parts[-1][..., :value]


def _in_order(pool: Float[Array, "P K c size H"], table_BM: Int[Array, "B M"]) -> list[Float[Array, "B K S H"]]:
    """The rows of each batch row, gathered from the pool: c arrays."""
    pages = pool[table_BM].transpose(3, 0, 2, 1, 4, 5)  # [c, B, K, M, size, H]
    return list(pages.reshape(*pages.shape[:3], -1, pages.shape[-1]))


def forget(caches: Caches, length_B: Int[Array, " B"]) -> Caches:
    """Take back every row at or past slot length_B[b]. Not for a ring, whose older rows are gone already."""
    for c in (c for stack in caches for c in stack if c.ring):
        raise ValueError(f"forget: a ring of {c.slot_BS.shape[1]} rows cannot go back; make the cache with ring=False")
    return tuple(
        tuple(replace(c, segment_BS=jnp.where(c.slot_BS < length_B[:, None], c.segment_BS, 0)) for c in stack)
        for stack in caches
    )


def reorder(caches: Caches, index_B: Int[Array, " B"]) -> Caches:
    """Row b of the result is row index_B[b]: the survivors of a beam step.

    A gather as large as the cache. Of a paged one the contents move and the table stays, so that each row goes on to
    write to pages of its own.
    """

    def one(c: Cache) -> Cache:
        names = {"slot_BS": c.slot_BS[index_B], "segment_BS": c.segment_BS[index_B]}
        match c:
            case KV():
                scale = None if c.scale is None else c.scale[:, index_B]
                return replace(c, k=c.k[:, index_B], v=c.v[:, index_B], scale=scale, **names)
            case Paged():

                def move(pool: Array) -> Array:
                    return pool.at[:, c.table_BM].set(pool[:, c.table_BM[index_B]])

                return replace(c, kv=move(c.kv), scale=None if c.scale is None else move(c.scale), **names)
            case other:
                assert_never(other)

    return tuple(tuple(map(one, stack)) for stack in caches)


def nbytes(caches: Any) -> int:
    """Bytes of real or abstract caches."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(caches))
