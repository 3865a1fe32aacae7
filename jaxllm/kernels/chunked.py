"""Attention in plain JAX with O(n) memory: one scan over the blocks that the pattern leaves, forward and backward.

Unusual: the scan runs over a flat static list of (query block, key block) pairs, not over queries and then keys. The
online softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021) does not mind the order, so a sparse pattern is just a
shorter list, and the program does not grow with the length. Only the log-sum-exp of each row is saved; the backward
pass recomputes the weights (Dao et al. 2022, alg. 4).

A row that sees no key has a log-sum-exp of +|MASKED|, which makes its weights vanish in the backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm import config
from jaxllm.kernels.call import Part
from jaxllm.kernels.modifiers import NONE, Modifiers, bias, bucket
from jaxllm.kernels.pattern import Blocks, Kind, kinds
from jaxllm.kernels.reference import MASKED, NOWHERE, Names, names, precision, visible
from jaxllm.records import Mask
from jaxllm.remat import named_attention

BLOCK = 512  # queries and keys per block: scores of one head are 1 MiB, which a CPU's cache holds


class Call(NamedTuple):
    """What is static in a call; hashable. `lists`: query blocks, key blocks, masked?, only when a prefix reaches?"""

    pattern: config.Pattern
    scale: float
    softcap: float | None
    alibi: config.Alibi | None
    relative: config.RelativeBias | None
    lists: tuple[tuple[tuple[int, ...], tuple[int, ...], bool, bool], ...]
    exact: lax.Precision


class Shares(NamedTuple):
    """Arrays cut into blocks along a new leading axis. c, d: block lengths; values may have a width of their own."""

    q: Float[Array, "nq B K G c H"]
    k: Float[Array, "nk B K d H"]
    v: Float[Array, "nk B K d h"]


class Learned(NamedTuple):
    """Of `Modifiers` what has a gradient."""

    sinks: Float[Array, " N"] | None
    table: Float[Array, "R N"] | None


class Fixed(NamedTuple):
    """What has none: slots and segments in blocks, and of `Modifiers` the slopes and the shifts [nq, B, c]."""

    at: Names
    slopes: Float[Array, " N"] | None
    shift: Int[Array, "nq B c"] | None


def chunked(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    pattern: config.Pattern,
    mask: Mask,
    modifiers: Modifiers = NONE,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Attention that never holds more than [block, block] scores per head; differentiable in q, k, v and modifiers."""
    part = Part(pattern, mask, scale, softcap)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    call, shares, fixed = _prepare(part, q, k, v, modifiers, block)
    o: Any = _attend(call, shares, fixed, Learned(modifiers.sinks_N, modifiers.table_RN))
    return _rows(o, q_BTNH.shape[1]).swapaxes(1, 2)


def _prepare(part: Part, q: Array, k: Array, v: Array, modifiers: Modifiers, block: int) -> tuple[Call, Shares, Fixed]:
    """q: [B, N, T, H].  k, v: [B, K, S, H]."""
    mask, m, T, S = part.mask, modifiers, q.shape[2], k.shape[2]
    block_q, block_k = _block(T, block), _block(S, block)
    lists = _lists(part.pattern, mask, T, S, block_q, block_k)
    call = Call(part.pattern, part.scale, part.softcap, m.alibi, m.relative, lists, precision(q.dtype))
    shift = None if m.shift_BT is None else _cut(m.shift_BT, 1, block_q)
    fixed = Fixed(_cut_names(names(mask, T, S), block_q, block_k), m.slopes_N, shift)
    shares = Shares(_queries(q, k.shape[1], block_q), _cut(k, 2, block_k), _cut(v, 2, block_k))
    return call, shares, fixed


def _queries(x_BNTH: Float[Array, "B N T H"], kv_heads: int, block: int) -> Float[Array, "nq B K G c H"]:
    """Blocks of queries, heads by the kv head that they share."""
    B, N, T, H = x_BNTH.shape
    return _cut(x_BNTH.reshape(B, kv_heads, N // kv_heads, T, H), 3, block)


def _rows(x: Float[Array, "nq B K G c H"], length: int) -> Float[Array, "B N T H"]:
    """The inverse of `_queries`."""
    x = _join(x, 3)[:, :, :, :length]
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def part_forward(part: Part, q: Array, k: Array, v: Array) -> tuple[Float[Array, "B N T h"], Float[Array, "B N T"]]:
    """Attention to some of the keys, and the log-sum-exp of each row; see `Part`."""
    o, (*_, lse) = _forward(*_prepare(part, q, k, v, NONE, BLOCK), Learned(None, None))
    lse_BNT = _rows(lse[..., None], q.shape[2])[..., 0]
    return _rows(o, q.shape[2]), jnp.where(lse_BNT < -MASKED / 2, lse_BNT, MASKED)


def part_backward(
    part: Part, qkv: tuple[Array, Array, Array], out: tuple[Array, Array, Array]
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S h"]]:
    """Gradients of q, k, v through some of the keys. out: o, log-sum-exp over all keys, gradient of o."""
    (q, k, _), (o, lse, do) = qkv, out
    call, shares, fixed = _prepare(part, *qkv, NONE, BLOCK)
    whole = jnp.where(lse > MASKED / 2, lse, -MASKED)[..., None]
    o, lse, do = (_queries(x, k.shape[1], shares.q.shape[4]) for x in (o, whole, do))
    grads, *_ = _backward(call, (shares, fixed, Learned(None, None), o, lse[..., 0]), do)
    dk, dv = (_join(x, 2)[:, :, : k.shape[2]] for x in (grads.k, grads.v))
    return _rows(grads.q, q.shape[2]), dk, dv


def _block(length: int, most: int) -> int:
    """The block length that cuts `length` evenly into as few blocks as `most` allows, in multiples of 8."""
    count = -(-length // most)
    return length if count == 1 else -(-length // (8 * count)) * 8


def _cut(x: Array, axis: int, block: int, fill: int = 0) -> Array:
    """[..., n, ...] to [blocks, ..., block, ...], padded with `fill`."""
    count = -(-x.shape[axis] // block)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * block - x.shape[axis])
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int) -> Array:
    """The inverse of `_cut`, padding kept."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _cut_names(at: Names, block_q: int, block_k: int) -> Names:
    q_segment = None if at.q_segment_BT is None else _cut(at.q_segment_BT, 1, block_q)
    k_segment = None if at.k_segment_BS is None else _cut(at.k_segment_BS, 1, block_k)
    q_slot = _cut(at.q_slot_BT, 1, block_q)
    return Names(q_slot, _cut(at.k_slot_BS, 1, block_k, NOWHERE), q_segment, k_segment, at.prefix_B)


def _lists(pattern: config.Pattern, mask: Mask, T: int, S: int, block_q: int, block_k: int) -> tuple[Any, ...]:
    """The block lists to scan. With slots as arrays nothing is known, and all blocks are mixed."""
    table = kinds(pattern, T, S, block_q, block_k)
    if mask.q_slot_BT is not None or mask.k_slot_BS is not None:
        table = np.full_like(table, Kind.MIXED)
    q, k = np.indices(table.shape)
    blocks = Blocks(q.ravel(), k.ravel(), table.ravel())
    segments = mask.k_segment_BS is not None
    found = [(blocks.only(Kind.FULL), segments, False), (blocks.only(Kind.MIXED), True, False)]
    if mask.prefix_B is not None:
        found.append((blocks.only(Kind.EMPTY), True, True))
    return tuple((tuple(b.q.tolist()), tuple(b.k.tolist()), masked, reach) for b, masked, reach in found if len(b.q))


def _over_blocks(call: Call, at: Names, body: Callable[..., Any], carry: Any) -> Any:
    """Folds `body(carry, i, j, masked)` over all listed blocks."""
    for q_list, k_list, masked, reach in call.lists:

        def step(carry: Any, pair: Any, masked: bool = masked, reach: bool = reach) -> tuple[Any, None]:
            i, j = pair
            if not reach or at.prefix_B is None:
                return body(carry, i, j, masked), None
            reached = jnp.min(at.k_slot_BS[j]) < jnp.max(at.prefix_B)
            return lax.cond(reached, lambda c: body(c, i, j, masked), lambda c: c, carry), None

        carry, _ = lax.scan(step, carry, (np.asarray(q_list, np.int32), np.asarray(k_list, np.int32)))
    return carry


def _scores(
    call: Call, shares: Shares, fixed: Fixed, learned: Learned, i: Array, j: Array, masked: bool
) -> tuple[Array, Array | None]:
    """Scores of block (i, j) [B, K, G, c, d], and d(capped) / d(raw) where there is a soft-cap. float32."""
    q, k, at = shares.q[i], shares.k[j], fixed.at
    s = call.scale * jnp.einsum("BKGTH,BKSH->BKGTS", q, k, precision=call.exact, preferred_element_type=jnp.float32)
    slope = None
    if call.softcap is not None:
        t = jnp.tanh(s / call.softcap)
        s, slope = call.softcap * t, 1 - t * t
    modifiers = Modifiers(fixed.slopes, learned.table, alibi=call.alibi, relative=call.relative)
    added = bias(modifiers, at.q_slot_BT[i], at.k_slot_BS[j], None if fixed.shift is None else fixed.shift[i])
    s = s if added is None else s + added.reshape(-1, *s.shape[1:])
    if masked:
        here = Names(
            at.q_slot_BT[i],
            at.k_slot_BS[j],
            None if at.q_segment_BT is None else at.q_segment_BT[i],
            None if at.k_segment_BS is None else at.k_segment_BS[j],
            at.prefix_B,
        )
        s = jnp.where(visible(call.pattern, here)[:, None, None], s, MASKED)
    return s, slope


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, shares: Shares, fixed: Fixed, learned: Learned) -> Float[Array, "nq B K G c h"]:
    return _forward(call, shares, fixed, learned)[0]


def _sinks(learned: Learned, rows: Array) -> Float[Array, "1 1 K G 1"] | None:
    """The sinks, shaped to broadcast against row statistics [nq, B, K, G, c]."""
    return None if learned.sinks is None else learned.sinks.astype(jnp.float32).reshape(1, 1, *rows.shape[2:4], 1)


def _forward(call: Call, shares: Shares, fixed: Fixed, learned: Learned) -> tuple[Array, tuple[Any, ...]]:
    dot = partial(jnp.einsum, precision=call.exact, preferred_element_type=jnp.float32)

    def body(carry: Any, i: Array, j: Array, masked: bool) -> Any:
        o, top, total = carry
        s, _ = _scores(call, shares, fixed, learned, i, j, masked)
        new_top = jnp.maximum(top[i], s.max(-1))
        p = jnp.exp(s - new_top[..., None])
        shrink = jnp.exp(top[i] - new_top)
        part = dot("BKGTS,BKSH->BKGTH", p.astype(shares.v.dtype), shares.v[j])
        return (
            o.at[i].set(o[i] * shrink[..., None] + part),
            top.at[i].set(new_top),
            total.at[i].set(total[i] * shrink + p.sum(-1)),
        )

    rows = shares.q.shape[:-1]
    empty = jnp.zeros((*rows, shares.v.shape[-1]), jnp.float32)
    start = (empty, jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32))
    o, top, total = _over_blocks(call, fixed.at, body, start)
    seen = top > MASKED / 2
    o = jnp.where(seen[..., None], o / jnp.where(seen, total, 1.0)[..., None], 0.0)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -MASKED)
    sinks = _sinks(learned, lse)
    if sinks is not None:  # one more key of score `sinks` and value 0
        with_sinks = jnp.logaddexp(lse, sinks)
        o, lse = o * jnp.exp(lse - with_sinks)[..., None], with_sinks
    o, lse = named_attention(o.astype(shares.q.dtype), lse)
    return o, (shares, fixed, learned, o, lse)


def _backward(call: Call, saved: tuple[Any, ...], do: Array) -> tuple[Shares, None, Learned]:
    shares, fixed, learned, o, lse = saved
    dot = partial(jnp.einsum, precision=call.exact, preferred_element_type=jnp.float32)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1)

    def body(carry: Any, i: Array, j: Array, masked: bool) -> Any:
        (dq, dk, dv), dtable = carry
        s, slope = _scores(call, shares, fixed, learned, i, j, masked)
        p = jnp.exp(s - lse[i][..., None])
        dp = dot("BKGTH,BKSH->BKGTS", do[i], shares.v[j])
        dbias = p * (dp - delta[i][..., None])
        ds = dbias * call.scale
        ds = (ds if slope is None else ds * slope).astype(shares.q.dtype)
        grads = Shares(
            dq.at[i].add(dot("BKGTS,BKSH->BKGTH", ds, shares.k[j])),
            dk.at[j].add(dot("BKGTS,BKGTH->BKSH", ds, shares.q[i])),
            dv.at[j].add(dot("BKGTS,BKGTH->BKSH", p.astype(do.dtype), do[i])),
        )
        return grads, dtable if dtable is None else dtable + _table_gradient(call, fixed.at, i, j, dbias)

    start = Shares(*(jnp.zeros(x.shape, jnp.float32) for x in shares))
    dtable = None if learned.table is None else jnp.zeros(learned.table.shape, jnp.float32)
    grads, dtable = _over_blocks(call, fixed.at, body, (start, dtable))
    sinks = _sinks(learned, lse)
    dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - lse) * delta, (0, 1, 4)).ravel()
    like = Learned(dsinks, dtable)
    cast = Learned(*(g if g is None else g.astype(x.dtype) for g, x in zip(like, learned, strict=True)))
    return Shares(*(g.astype(x.dtype) for g, x in zip(grads, shares, strict=True))), None, cast


def _table_gradient(call: Call, at: Names, i: Array, j: Array, dbias: Float[Array, "B K G c d"]) -> Float[Array, "R N"]:
    """The gradient of the scores, summed by bucket."""
    assert call.relative is not None, "a table belongs to a RelativeBias"
    q_slot, k_slot = at.q_slot_BT[i], at.k_slot_BS[j]
    found = bucket(call.relative, k_slot[:, None, :] - q_slot[:, :, None])
    one_hot = (found[..., None] == jnp.arange(call.relative.buckets)[None, None, None]).astype(jnp.float32)
    summed = dbias if len(found) == len(dbias) else dbias.sum(0, keepdims=True)
    return jnp.einsum("BTSR,BKGTS->RKG", one_hot, summed).reshape(call.relative.buckets, -1)


_attend.defvjp(_forward, _backward)
