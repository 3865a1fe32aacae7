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
- The forward's own new keys and values come with the first block, a sink is the state before it: the result is final.
"""

from __future__ import annotations

import math
from typing import Any, assert_never

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm import config
from jaxllm.cache import KV, Cache, Paged
from jaxllm.kernels.call import LOG2_E
from jaxllm.kernels.decode import New
from jaxllm.kernels.decode_kernel import BUFFERS, LANES, Asked, Call, Held, Scalars, run
from jaxllm.kernels.modifiers import NONE, Modifiers
from jaxllm.kernels.reference import Names, visible
from jaxllm.kernels.tpu_sizes import chip

BLOCK_BYTES = 2 * 2**20  # of keys and values in a block, about
SCORE_BYTES = 4 * 2**20  # of scores of a block, at most
MOST_PAGES = 64  # of a block: each is a few instructions
TABLE = 2**17  # entries of a page table, at most: it lies in scalar memory
NEW = 8  # new tokens are padded to so many


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
    o = run(call, _scalars(call, cache, index, new), asked, _held(call, cache), interpret)
    o_BKTGh = o[:, :, : T * N // K].reshape(B, K, T, N // K, h)
    return o_BKTGh.transpose(0, 2, 1, 3, 4).reshape(B, T, N, h)


def refusal(q_BTNH: Array, new: New, cache: Cache, pattern: config.Pattern, modifiers: Modifiers) -> str | None:
    """Why the kernel does not take this call; None when it does."""
    rows, m = _page(cache), modifiers
    item = (cache.kv if isinstance(cache, Paged) else cache.k).dtype.itemsize
    least = LANES if cache.scale is not None else 32 // item
    if rows % least or (rows % LANES and LANES % rows):
        return f"rows come in pages of {rows}, which must be a power of two from {least} on, or a multiple of {LANES}"
    if isinstance(cache, Paged) and cache.table_BM.size > TABLE:
        return f"a page table of {cache.table_BM.size} entries is larger than {TABLE}; take larger pages"
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
    most = max(min(BLOCK_BYTES // _row_bytes(cache), SCORE_BYTES // (4 * queries), MOST_PAGES * page) // unit, 1)
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


def _rows(x: Array, axis: int, unit: int) -> Float[Array, ...]:
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
