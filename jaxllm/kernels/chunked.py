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
from jaxtyping import Array, Float

from jaxllm import config
from jaxllm.kernels.pattern import Blocks, Kind, kinds
from jaxllm.kernels.reference import MASKED, NOWHERE, Names, group, names, precision, ungroup, visible
from jaxllm.records import Mask

BLOCK = 512  # queries and keys per block: scores of one head are 1 MiB, which a CPU's cache holds


class Call(NamedTuple):
    """What is static in a call; hashable. `lists`: query blocks, key blocks, masked?, only when a prefix reaches?"""

    pattern: config.Pattern
    scale: float
    softcap: float | None
    lists: tuple[tuple[tuple[int, ...], tuple[int, ...], bool, bool], ...]
    exact: lax.Precision


class Shares(NamedTuple):
    """Arrays cut into blocks along a new leading axis. c, d: block lengths."""

    q: Float[Array, "nq B K G c H"]
    k: Float[Array, "nk B K d H"]
    v: Float[Array, "nk B K d H"]


def chunked(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    pattern: config.Pattern,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Attention that never holds more than [block, block] scores per head; differentiable in q, k, v."""
    T, (S, K) = q_BTNH.shape[1], k_BSKH.shape[1:3]
    block_q, block_k = _block(T, block), _block(S, block)
    call = Call(pattern, scale, softcap, _lists(pattern, mask, T, S, block_q, block_k), precision(q_BTNH.dtype))
    at = _cut_names(names(mask, T, S), block_q, block_k)
    shares = Shares(
        _cut(group(q_BTNH, K), 3, block_q),
        _cut(k_BSKH.transpose(0, 2, 1, 3), 2, block_k),
        _cut(v_BSKH.transpose(0, 2, 1, 3), 2, block_k),
    )
    o: Any = _attend(call, shares, at)
    return ungroup(_join(o, 3)[:, :, :, :T])


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


def _scores(call: Call, shares: Shares, at: Names, i: Array, j: Array, masked: bool) -> tuple[Array, Array | None]:
    """Scores of block (i, j) [B, K, G, c, d], and d(capped) / d(raw) where there is a soft-cap. float32."""
    q, k = shares.q[i], shares.k[j]
    s = call.scale * jnp.einsum("BKGTH,BKSH->BKGTS", q, k, precision=call.exact, preferred_element_type=jnp.float32)
    slope = None
    if call.softcap is not None:
        t = jnp.tanh(s / call.softcap)
        s, slope = call.softcap * t, 1 - t * t
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
def _attend(call: Call, shares: Shares, at: Names) -> Float[Array, "nq B K G c H"]:
    return _forward(call, shares, at)[0]


def _forward(call: Call, shares: Shares, at: Names) -> tuple[Array, tuple[Shares, Names, Array, Array]]:
    dot = partial(jnp.einsum, precision=call.exact, preferred_element_type=jnp.float32)

    def body(carry: Any, i: Array, j: Array, masked: bool) -> Any:
        o, top, total = carry
        s, _ = _scores(call, shares, at, i, j, masked)
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
    start = (jnp.zeros(shares.q.shape, jnp.float32), jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32))
    o, top, total = _over_blocks(call, at, body, start)
    seen = top > MASKED / 2
    o = jnp.where(seen[..., None], o / jnp.where(seen, total, 1.0)[..., None], 0.0).astype(shares.q.dtype)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -MASKED)
    return o, (shares, at, o, lse)


def _backward(call: Call, saved: tuple[Shares, Names, Array, Array], do: Array) -> tuple[Shares, None]:
    shares, at, o, lse = saved
    dot = partial(jnp.einsum, precision=call.exact, preferred_element_type=jnp.float32)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1)

    def body(carry: Any, i: Array, j: Array, masked: bool) -> Any:
        dq, dk, dv = carry
        s, slope = _scores(call, shares, at, i, j, masked)
        p = jnp.exp(s - lse[i][..., None])
        dp = dot("BKGTH,BKSH->BKGTS", do[i], shares.v[j])
        ds = p * (dp - delta[i][..., None]) * call.scale
        ds = (ds if slope is None else ds * slope).astype(shares.q.dtype)
        return (
            dq.at[i].add(dot("BKGTS,BKSH->BKGTH", ds, shares.k[j])),
            dk.at[j].add(dot("BKGTS,BKGTH->BKSH", ds, shares.q[i])),
            dv.at[j].add(dot("BKGTS,BKGTH->BKSH", p.astype(do.dtype), do[i])),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in shares)
    grads = _over_blocks(call, at, body, start)
    return Shares(*(g.astype(x.dtype) for g, x in zip(grads, shares, strict=True))), None


_attend.defvjp(_forward, _backward)
