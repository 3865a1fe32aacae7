"""Key/value caches and their verbs: `init`, `commit`, `forget`, `reorder`.

`forward` only reads a cache and returns new rows; `commit` writes accepted rows once, after the layer scan. With the
cache in the scan's carry the same decode step needs 12 times the temporary memory (2,304 MiB against 192 MiB for a
2 GiB cache on TPU v5e), and rejected rows (speculation) would overwrite live ones.

Dense and ring are one kind: a ring is a cache shorter than the context. A token of slot s lies in row s % S, and the
cache remembers each row's slot and segment, so the mask needs no other arithmetic. Layout is head-major,
[L, B, K, S, H].
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


@struct.dataclass
class KV:
    """Keys (rotated) and values of the L layers at one place of a stack's pattern.

    k, v: [L, B, K, S, H]; for latents (MLA) K = 1, k is [latent | rotated key] and v has width 0.
    slot_BS: int32, the slot each row holds.  segment_BS: int32, 0 = empty.
    ring: whether slots wrap around (a sliding window keeps only its width).
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S h"]
    slot_BS: Int[Array, "B S"]
    segment_BS: Int[Array, "B S"]
    ring: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Rows:
    """What a forward adds to a cache: k, v [L, B, K, T, H] and the tokens' segments [B, T]."""

    k: Float[Array, "L B K T H"]
    v: Float[Array, "L B K T h"]
    segment_BT: Int[Array, "B T"]


Caches = tuple[tuple[KV, ...], ...]  # caches[stack][place in the pattern]; a stack that shares has one, of one layer


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


def init(spec: Transformer, batch: int, size: int, dtype: DTypeLike, ring: bool = True) -> Caches:
    """Empty caches for `size` slots per row; layers with a sliding window keep only its width when `ring`.

    size=0 gives caches that hold nothing: `forward` against them is a prefill that reads no cache and returns rows.
    """

    def one(block: Block, repeats: int) -> KV:
        attn = block.attn
        bound = window(attn.pattern) if ring and spec.causal else None
        wraps = bound is not None and bound < size
        rows = bound if wraps else size
        (heads, key, value), names = widths(attn), (batch, rows)
        k, v = (jnp.zeros((repeats, batch, heads, rows, width), dtype) for width in (key, value))
        # Four arrays of their own: a buffer that stands in two places cannot be donated.
        empty = (k, v, jnp.zeros(names, jnp.int32), jnp.zeros(names, jnp.int32))
        return KV(*empty, wraps)

    def held(stack: Stack) -> tuple[KV, ...]:
        if stack.shared is not None:
            return (one(stack.pattern[0], 1),)
        return tuple(one(block, stack.repeats) for block in stack.pattern)

    return tuple(map(held, spec.stacks))


def commit(caches: Caches, rows: Any, start_B: Int[Array, " B"], count_B: Int[Array, " B"]) -> Caches:
    """Write the first count_B[b] of a forward's rows at slots start_B[b], start_B[b] + 1, ...

    Rows at or past the count are dropped, and so are rows past the end of a cache that holds the whole context: a
    clamped update would overwrite valid ones. A ring keeps the last rows that fit.
    """

    def one(cache: KV, new: Rows) -> KV:
        size, length = cache.slot_BS.shape[1], new.segment_BT.shape[1]
        if size == 0:
            return cache
        i_T = jnp.arange(length)[None]
        slot_BT = start_B[:, None] + i_T
        keep = i_T < count_B[:, None]
        if cache.ring:
            keep &= i_T >= count_B[:, None] - size
        row_BT = jnp.where(keep, slot_BT % size if cache.ring else slot_BT, size)  # row `size` is out of range: dropped

        def scatter(kv: Array, x: Array) -> Array:
            # Advanced indices B and row come first in the indexed view: [B, T, L, K, H].
            b = jnp.arange(x.shape[1])[:, None]
            return kv.at[:, b, :, row_BT].set(x.transpose(1, 3, 0, 2, 4).astype(kv.dtype), mode="drop")

        b = jnp.arange(slot_BT.shape[0])[:, None]
        return replace(
            cache,
            k=scatter(cache.k, new.k),
            v=scatter(cache.v, new.v),
            slot_BS=cache.slot_BS.at[b, row_BT].set(slot_BT, mode="drop"),
            segment_BS=cache.segment_BS.at[b, row_BT].set(new.segment_BT, mode="drop"),
        )

    return tuple(tuple(map(one, stack, new)) for stack, new in zip(caches, rows, strict=True))


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

    A gather of the dense cache (as large as the cache); paged caches will swap page indices instead.
    """

    def one(c: KV) -> KV:
        return replace(
            c, k=c.k[:, index_B], v=c.v[:, index_B], slot_BS=c.slot_BS[index_B], segment_BS=c.segment_BS[index_B]
        )

    return tuple(tuple(map(one, stack)) for stack in caches)


def nbytes(caches: Any) -> int:
    """Bytes of real or abstract caches."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(caches))
