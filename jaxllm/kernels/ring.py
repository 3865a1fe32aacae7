"""Ring attention (Liu et al. 2023): the tokens of a row lie on several devices, keys and values travel around them.

Unusual: a row is cut into 2 P chunks for P devices, and a device holds two. In the order that `zigzag` makes, device d
holds chunks d and 2 P - 1 - d, so that under a causal mask every device has two of four pairs of chunks to compute at
every step, whoever's keys are there. Each pair is one call of an ordinary kernel, chosen at run time among the few
that the pattern needs (none, all, the diagonal, the edges of a window); results meet by their log-sum-exp. The backward
pass sends the gradients of keys and values around with them. A step's transfer does not wait for its arithmetic.

Everything here runs inside a `shard_map` over the axis.
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
from jaxllm.kernels import chunked, flash_gpu, flash_tpu
from jaxllm.kernels.attention import Backend
from jaxllm.kernels.call import Part
from jaxllm.kernels.pattern import Kind, block_kind, by_distance
from jaxllm.kernels.reference import MASKED
from jaxllm.records import Mask
from jaxllm.remat import named_attention


class Ring(NamedTuple):
    """What is static. axis: the mesh axis, of `size` devices.  zigzag: chunks are in that order, not in the row's."""

    axis: str
    size: int
    zigzag: bool
    pattern: config.Pattern
    scale: float
    softcap: float | None
    backend: Backend
    interpret: bool = False


class Halves(NamedTuple):
    """A device's two chunks of c tokens. Segments: int32 [2, B, c], or None."""

    q: Float[Array, "2 B N c H"]
    k: Float[Array, "2 B K c H"]
    v: Float[Array, "2 B K c h"]
    q_segment: Int[Array, "2 B c"] | None
    k_segment: Int[Array, "2 B c"] | None


def ring_attention(
    ring: Ring,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKh: Float[Array, "B T K h"],
    q_segment_BT: Int[Array, "B T"] | None,
    k_segment_BT: Int[Array, "B T"] | None,
) -> Float[Array, "B T N h"]:
    """Attention of this device's T tokens to those of all devices of the axis; differentiable in q, k, v.

    Raises ValueError for a pattern that goes by more than the distance of slots, and for an odd T.
    """
    if not by_distance(ring.pattern):
        raise ValueError(
            f"ring attention: the pattern must go by distances alone, got {ring.pattern}; "
            'set layout.context="all_to_all"'
        )
    T = q_BTNH.shape[1]
    if T % 2:
        raise ValueError(
            f"ring attention: rows are cut into two chunks per device, so their length, {T * ring.size}, must be a "
            f"multiple of 2 x {ring.size} devices; the next is {(T + 1) * ring.size}"
        )
    q, k, v = (_halves(x).swapaxes(2, 3) for x in (q_BTNH, k_BTKH, v_BTKh))  # heads first, once for all steps
    q_segment, k_segment = (None if x is None else _halves(x) for x in (q_segment_BT, k_segment_BT))
    o: Any = _attend(ring, Halves(q, k, v, q_segment, k_segment))
    o = o.swapaxes(2, 3)
    return jnp.concatenate([o[0], o[1]], axis=1)


def _halves(x: Array) -> Float[Array, "2 B c ..."]:
    return jnp.stack(jnp.split(x, 2, axis=1))


# ------------------------------------------------------------------------------------------------------------ order


def zigzag(x: Array, dim: int, axis: str, size: int, *, back: bool = False) -> Float[Array, ...]:
    """This device's share of a row's tokens (along `dim`) in zigzag order; back: from it, in the row's order.

    Chunks travel twice at most: even ones by one permutation of the devices, odd ones by another.
    """
    even = [(i, min(2 * i, 2 * size - 1 - 2 * i)) for i in range(size)]
    odd = [(i, min(2 * i + 1, 2 * size - 2 - 2 * i)) for i in range(size)]
    first, second = jnp.split(x, 2, axis=dim)
    at_even = lax.axis_index(axis) % 2 == 0
    if back:
        first, second = jnp.where(at_even, first, second), jnp.where(at_even, second, first)
        even, odd = ([(b, a) for a, b in pairs] for pairs in (even, odd))
    first, second = lax.ppermute(first, axis, even), lax.ppermute(second, axis, odd)
    if not back:
        first, second = jnp.where(at_even, first, second), jnp.where(at_even, second, first)
    return jnp.concatenate([first, second], axis=dim)


def _chunks(ring: Ring, device: Array) -> Int[Array, " 2"]:
    """Which two of the row's chunks a device holds."""
    if ring.zigzag:
        return jnp.stack([device, 2 * ring.size - 1 - device])
    return jnp.stack([2 * device, 2 * device + 1])


def _cases(ring: Ring, c: int) -> tuple[tuple[config.Pattern, ...], Int[np.ndarray, " n"]]:
    """The patterns that pairs of chunks need; and of each distance of chunks, from 1 - 2 P on, its number there, or 0.

    Numbers count from 1; 0 stands for a pair of which no tokens may meet.
    """
    gaps = c * np.arange(1 - 2 * ring.size, 2 * ring.size)
    kinds = block_kind(ring.pattern, gaps, gaps + c, np.zeros_like(gaps), np.full_like(gaps, c))
    patterns: list[config.Pattern] = []
    numbers = []
    for gap, kind in zip(gaps.tolist(), kinds.tolist(), strict=True):
        wanted = config.Full() if kind == Kind.FULL else config.Later(ring.pattern, gap)
        if kind != Kind.EMPTY and wanted not in patterns:
            patterns.append(wanted)
        numbers.append(0 if kind == Kind.EMPTY else patterns.index(wanted) + 1)
    return tuple(patterns), np.asarray(numbers, np.int32)


def _over_pairs(ring: Ring, x: Halves, step: Array | int, body: Callable[..., Any], carry: Any) -> Any:
    """Folds body(part, a, b, carry) over the pairs of own queries a and visiting keys b that may meet."""
    patterns, numbers = _cases(ring, x.q.shape[3])
    me = lax.axis_index(ring.axis)
    mine, theirs = _chunks(ring, me), _chunks(ring, (me - step) % ring.size)

    def case(pattern: config.Pattern, a: Array, b: Array, carry: Any) -> Any:
        segments = None if x.q_segment is None else x.q_segment[a], None if x.k_segment is None else x.k_segment[b]
        mask = Mask(q_segment_BT=segments[0], k_segment_BS=segments[1])
        return body(Part(pattern, mask, ring.scale, ring.softcap), a, b, carry)

    def pair(carry: Any, ab: Any) -> tuple[Any, None]:
        a, b = ab
        number = jnp.asarray(numbers)[mine[a] - theirs[b] + 2 * ring.size - 1]
        cases = [lambda a, b, carry: carry, *(partial(case, pattern) for pattern in patterns)]
        return lax.switch(number, cases, a, b, carry), None

    return lax.scan(pair, carry, (np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])))[0]


def _around(ring: Ring, moving: Any) -> Any:
    """To the next device of the ring."""
    pairs = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, pairs), moving)


def _kernel(ring: Ring) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(part_forward, part_backward) of the backend."""
    match ring.backend:
        case "tpu":
            made = flash_tpu.part_forward, flash_tpu.part_backward
        case "gpu":
            made = flash_gpu.part_forward, flash_gpu.part_backward
        case _:
            return chunked.part_forward, chunked.part_backward
    return partial(made[0], interpret=ring.interpret), partial(made[1], interpret=ring.interpret)


# ------------------------------------------------------------------------------------------------- forward, backward


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, x: Halves) -> Float[Array, "2 B N c h"]:
    return _forward(ring, x)[0]


def _forward(ring: Ring, x: Halves) -> tuple[Array, tuple[Halves, Array, Array]]:
    attend, _ = _kernel(ring)

    def visit(step: Array | int, keys: tuple[Any, ...], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        k, v, segment = keys

        def body(part: Part, a: Array, b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            o, lse = carry
            o_part, lse_part = attend(part, x.q[a], k[b], v[b])
            both = jnp.logaddexp(lse[a], lse_part)
            shares = (jnp.exp(y - both)[..., None] for y in (lse[a], lse_part))
            merged = o[a] * next(shares) + o_part.astype(jnp.float32) * next(shares)
            return lax.dynamic_update_index_in_dim(o, merged, a, 0), lax.dynamic_update_index_in_dim(lse, both, a, 0)

        return _over_pairs(ring, x._replace(k_segment=segment), step, body, carry)

    def turn(carry: Any, step: Array) -> tuple[Any, None]:
        keys, out = carry
        return (_around(ring, keys), visit(step, keys, out)), None  # the transfer does not wait for the arithmetic

    rows = x.q.shape[:-1]
    out = jnp.zeros((*rows, x.v.shape[-1]), jnp.float32), jnp.full(rows, MASKED, jnp.float32)
    (keys, out), _ = lax.scan(turn, ((x.k, x.v, x.k_segment), out), jnp.arange(ring.size - 1))
    o, lse = visit(ring.size - 1, keys, out)
    o, lse = named_attention(o.astype(x.q.dtype), lse)
    return o, (x, o, lse)


def _backward(ring: Ring, saved: tuple[Halves, Array, Array], do: Array) -> tuple[Halves]:
    x, o, lse = saved
    _, gradients = _kernel(ring)

    def visit(step: Array | int, keys: tuple[Any, ...], dq: Array) -> tuple[Array, tuple[Array, Array]]:
        k, v, segment = keys

        def body(part: Part, a: Array, b: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            found = gradients(part, (x.q[a], k[b], v[b]), (o[a], lse[a], do[a]))
            places = zip(carry, (a, b, b), found, strict=True)
            return tuple(
                lax.dynamic_update_index_in_dim(total, total[i] + g.astype(jnp.float32), i, 0) for total, i, g in places
            )

        start = dq, jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        dq, *dkv = _over_pairs(ring, x._replace(k_segment=segment), step, body, start)
        return dq, (dkv[0], dkv[1])

    def turn(carry: Any, step: Array) -> tuple[Any, None]:
        keys, dq, dkv = carry
        arrived = _around(ring, dkv)  # gradients follow their keys one step behind
        dq, own = visit(step, keys, dq)
        return (_around(ring, keys), dq, jax.tree.map(jnp.add, arrived, own)), None

    zeros = tuple(jnp.zeros(y.shape, jnp.float32) for y in (x.q, x.k, x.v))
    carry = (x.k, x.v, x.k_segment), zeros[0], zeros[1:]
    (keys, dq, dkv), _ = lax.scan(turn, carry, jnp.arange(ring.size - 1))
    dq, last = visit(ring.size - 1, keys, dq)
    dk, dv = _around(ring, jax.tree.map(jnp.add, _around(ring, dkv), last))
    dq, dk, dv = (g.astype(y.dtype) for g, y in zip((dq, dk, dv), (x.q, x.k, x.v), strict=True))
    return (Halves(dq, dk, dv, None, None),)


_attend.defvjp(_forward, _backward)
