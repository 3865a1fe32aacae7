"""Flash attention for NVIDIA GPUs (Dao 2023; Pallas, Triton): forward, and a backward of two kernels.

Unusual: which key blocks a program reads is data. For every query block the visits of `schedule.py` are ordered plain
first, then masked, then empty, and a program loops over the first two ranges: the plain loop has no predicate, and what
a segment or a window empties is not read. The kernel for dk and dv does the same with queries per key block. (On a TPU
one kernel makes all gradients; here programs run side by side, and each owns what it writes.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from jaxllm import config
from jaxllm.kernels.call import (
    Call,
    Operands,
    Part,
    codes,
    dot,
    kernel_rows,
    may_meet,
    operands,
    padded,
    part_call,
    part_rows,
    result,
    scores,
    unpadded,
)
from jaxllm.kernels.pattern import allowed
from jaxllm.kernels.reference import MASKED
from jaxllm.kernels.schedule import PLAIN, SKIP, schedule
from jaxllm.records import Mask
from jaxllm.remat import named_attention


class Blocks(NamedTuple):
    """Block sizes in tokens, powers of two, and the warps of a program."""

    q: int
    k: int
    warps: int


class Cut(NamedTuple):
    """Blocks of each kernel; those of `forward` are multiples of the others, and lengths are padded to them."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


class Route(NamedTuple):
    """What each block meets, flat over (batch row or 1, ...). int32.

    other: [rows * n] the blocks to meet, by block; start, middle, end: [rows * blocks] its plain visits are at
    start .. middle - 1, its masked ones at middle .. end - 1.
    """

    other: Any
    start: Any
    middle: Any
    end: Any


# by bytes per row of a head: found with the compiler, the largest that spill no register on H100 nor A100 (bfloat16)
NARROW = Cut(Blocks(128, 64, 4), Blocks(64, 64, 4), Blocks(32, 64, 8))
MEDIUM = Cut(Blocks(128, 64, 8), Blocks(64, 64, 8), Blocks(32, 64, 8))
WIDE = Cut(Blocks(64, 32, 8), Blocks(64, 32, 4), Blocks(16, 32, 4))


def cut_for(T: int, S: int, H: int, dtype: jnp.dtype) -> Cut:
    """Block sizes for lengths T, S and head width H."""
    row = H * jnp.dtype(dtype).itemsize
    cut = NARROW if row <= 128 else MEDIUM if row <= 256 else WIDE
    return Cut(*(Blocks(min(b.q, _power(T)), min(b.k, _power(S)), b.warps) for b in cut))


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def flash_gpu(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    pattern: config.Pattern,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention on one GPU, differentiable in q, k, v. Head widths are padded to a power of two.

    Raises ValueError when `mask` has slots as arrays.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    call, cut, x = _prepare(Part(pattern, mask, scale, softcap), q, k, v, interpret)
    o: Any = _attend(call, cut, x, mask.prefix_B)
    return result(call, o)[..., : q_BTNH.shape[3]]


def _prepare(part: Part, q: Array, k: Array, v: Array, interpret: bool) -> tuple[Call, Cut, Operands]:
    cut = cut_for(q.shape[2], k.shape[2], _power(q.shape[3]), q.dtype)
    call = part_call(part, q, k, (cut.forward.q, cut.forward.k), interpret)
    return call, cut, operands(call, _widened(q), _widened(k), _widened(v), part.mask)


def _widened(x: Float[Array, "B N T H"]) -> Float[Array, "B N T h"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, _power(x.shape[3]) - x.shape[3])))


def part_forward(
    part: Part, q: Array, k: Array, v: Array, interpret: bool = False
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Attention to some of the keys, and the log-sum-exp of each row; see `Part`."""
    call, cut, x = _prepare(part, q, k, v, interpret)
    o, (*_, lse) = _forward(call, cut, x, part.mask.prefix_B)
    return unpadded(o, call.N, call.T)[..., : q.shape[3]], part_rows(call, lse)


def part_backward(
    part: Part, qkv: tuple[Array, Array, Array], out: tuple[Array, Array, Array], interpret: bool = False
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Gradients of q, k, v through some of the keys. out: o, log-sum-exp over all keys, gradient of o."""
    call, cut, x = _prepare(part, *qkv, interpret)
    o, do = (padded(_widened(y), call.block_q) for y in (out[0], out[2]))
    grads, *_ = _backward(call, cut, (x, part.mask.prefix_B, o, kernel_rows(call, out[1])), do)
    dk, dv = (unpadded(y, call.K, call.S) for y in (grads.k, grads.v))
    H = qkv[0].shape[3]
    return unpadded(grads.q, call.N, call.T)[..., :H], dk[..., :H], dv[..., :H]


# ------------------------------------------------------------------------------------------------------- what is met


def _route(call: Call, x: Operands, prefix: Array | None, by_key: bool = False) -> Route:
    """The route of query blocks over key blocks, or of key blocks over query blocks."""
    shape = call.shape(call.block_q, call.block_k)
    plan = schedule(call.pattern, shape, call.arrays)
    variant = codes(call, plan, shape, x, prefix)[0] >> 2
    mine, other = (plan.visits.k, plan.visits.q) if by_key else (plan.visits.q, plan.visits.k)
    blocks = shape.blocks[1 if by_key else 0]
    rank = jnp.where(variant == SKIP, 2, jnp.where(variant == PLAIN, 0, 1))
    order = jnp.argsort(3 * mine[None] + rank, axis=1, stable=True)
    n, rows = len(mine), variant.shape[0]
    counts = [jnp.zeros((rows, blocks), jnp.int32).at[:, mine].add(rank == r) for r in (0, 1)]
    start = np.searchsorted(np.sort(mine), np.arange(blocks))[None] + n * np.arange(rows)[:, None]
    bounds = [jnp.asarray(start, jnp.int32), start + counts[0], start + counts[0] + counts[1]]
    return Route(jnp.asarray(other)[order].ravel(), *(b.astype(jnp.int32).ravel() for b in bounds))


def _walk(call: Call, route: Route, place: tuple[Any, Any, int], body: Callable[..., Any], carry: Any) -> Any:
    """Folds body(masked, other block, carry) over what block `place` = (batch row, block, blocks) meets."""
    row, block, blocks = place
    at = row * blocks + block if any(call.arrays) else block
    start, middle, end = route.start[at], route.middle[at], route.end[at]
    carry = lax.fori_loop(start, middle, lambda p, c: body(False, route.other[p], c), carry)
    return lax.fori_loop(middle, end, lambda p, c: body(True, route.other[p], c), carry)


class Given(NamedTuple):
    """What every kernel reads, as references, in this order: the route, prefixes [B] or [1], the operands."""

    route: Route
    prefix: Any
    x: Operands


def _unpack(call: Call, refs: tuple[Any, ...]) -> tuple[Given, list[Any]]:
    """A kernel's references: what is given, and the rest."""
    route, prefix, rest = Route(*refs[:4]), refs[4], list(refs[5:])
    q, k, v = rest.pop(0), rest.pop(0), rest.pop(0)
    q_segment = rest.pop(0) if call.arrays.q_segment else None
    k_segment = rest.pop(0) if call.arrays.k_segment else None
    return Given(route, prefix, Operands(q, k, v, q_segment, k_segment)), rest


def _inputs(given: Given, heads: tuple[pl.BlockSpec, pl.BlockSpec], per_row: int) -> tuple[list[Any], list[Array]]:
    """Specs and arrays of what is given. heads: specs of q and of k, v.  per_row: heads of the grid per batch row."""
    x = given.x
    segments = [s for s in (x.q_segment, x.k_segment) if s is not None]

    def row(segment: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, segment.shape[2]), lambda h, _: (h // per_row, 0, 0))

    specs = [pl.BlockSpec()] * 5 + [heads[0], heads[1], heads[1]] + [row(s) for s in segments]
    return specs, [*given.route, given.prefix, x.q, x.k, x.v, *segments]


def _given(call: Call, x: Operands, prefix: Array | None, by_key: bool = False) -> Given:
    route = _route(call, x, prefix, by_key)
    return Given(route, jnp.zeros(1, jnp.int32) if prefix is None else prefix.astype(jnp.int32), x)


def _hide(call: Call, given: Given, row: Any, place: tuple[Any, Any], s: Array) -> Array:
    """Scores [queries, keys] of the block at `place`, with MASKED where the pair may not meet."""
    i, j = place
    x, (bq, bk) = given.x, s.shape
    q, k = i * bq + jnp.arange(bq)[:, None], j * bk + jnp.arange(bk)[None, :]
    q_segment = None if x.q_segment is None else x.q_segment[pl.ds(i * bq, bq)][:, None]
    k_segment = None if x.k_segment is None else x.k_segment[pl.ds(j * bk, bk)][None, :]
    prefix = given.prefix[row] if call.arrays.prefix else None
    return jnp.where(may_meet(call, allowed(call.pattern, q, k), k, prefix, q_segment, k_segment), s, MASKED)


def _fold(call: Call, q: Array) -> Array:
    return (q.astype(jnp.float32) * call.fold).astype(q.dtype)


# ------------------------------------------------------------------------------------------------------------ kernels


def _forward_kernel(call: Call, blocks: int, *refs: Any) -> None:
    """Grid (B * N, query blocks)."""
    given, (o_ref, lse_ref) = _unpack(call, refs)
    (head, i), x, bk = (pl.program_id(0), pl.program_id(1)), given.x, call.block_k
    q, row = _fold(call, x.q[...]), head // call.N

    def body(masked: bool, j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total_v, top, total = carry
        keys = pl.ds(j * bk, bk)
        s, _ = scores(call, dot(q, x.k[keys, :].T))
        s = _hide(call, given, row, (i, j), s) if masked else s
        new = jnp.maximum(top, s.max(1))
        p, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(top - new)
        total_v = total_v * shrink[:, None] + dot(p.astype(q.dtype), x.v[keys, :])
        return total_v, new, total * shrink + p.sum(1)

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:1], MASKED, jnp.float32), jnp.zeros(q.shape[:1])
    total_v, top, total = _walk(call, given.route, (row, i, blocks), body, start)
    seen = top > MASKED / 2
    divisor = jnp.where(seen, total, 1.0)
    o_ref[...] = (total_v * jnp.where(seen, 1 / divisor, 0.0)[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(seen, top + jnp.log2(divisor), -MASKED)


def _weights(call: Call, hide: Callable[[Array], Array], q: Array, k: Array, v: Array, given_out: Any) -> Any:
    """(p, ds) of a block [queries, keys], float32. given_out: (do, lse, delta) of its queries."""
    do, lse, delta = given_out
    s, t = scores(call, dot(q, k.T))
    p = jnp.exp2(hide(s) - lse[:, None])
    ds = p * (dot(do, v.T) - delta[:, None])
    return p, ds if t is None else ds * (1 - t * t)


def _dq_kernel(call: Call, blocks: int, *refs: Any) -> None:
    """Grid (B * N, query blocks)."""
    given, (do_ref, lse_ref, delta_ref, dq_ref) = _unpack(call, refs)
    (head, i), x, bk = (pl.program_id(0), pl.program_id(1)), given.x, call.block_k
    q, row, out = _fold(call, x.q[...]), head // call.N, (do_ref[...], lse_ref[...], delta_ref[...])

    def body(masked: bool, j: Any, dq: Array) -> Array:
        k, v = x.k[pl.ds(j * bk, bk), :], x.v[pl.ds(j * bk, bk), :]
        hide = (lambda s: _hide(call, given, row, (i, j), s)) if masked else (lambda s: s)
        _, ds = _weights(call, hide, q, k, v, out)
        return dq + dot(ds.astype(k.dtype), k)

    dq = _walk(call, given.route, (row, i, blocks), body, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * call.scale).astype(dq_ref.dtype)


def _dkv_kernel(call: Call, blocks: int, *refs: Any) -> None:
    """Grid (B * K, key blocks). Queries of the G heads of a group follow one another, [B * K, G * T, H]."""
    given, (do_ref, lse_ref, delta_ref, dk_ref, dv_ref) = _unpack(call, refs)
    (kv_head, j), x, bq = (pl.program_id(0), pl.program_id(1)), given.x, call.block_q
    k, v, row = x.k[...], x.v[...], kv_head // call.K
    padded = x.q.shape[0] // (call.N // call.K)

    def one(g: Any, masked: bool, i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        at = pl.ds(g * padded + i * bq, bq)
        q, do = _fold(call, x.q[at, :]), do_ref[at, :]
        hide = (lambda s: _hide(call, given, row, (i, j), s)) if masked else (lambda s: s)
        p, ds = _weights(call, hide, q, k, v, (do, lse_ref[at], delta_ref[at]))
        dk, dv = carry
        return dk + dot(ds.astype(q.dtype).T, q), dv + dot(p.astype(do.dtype).T, do)

    def group(g: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return _walk(call, given.route, (row, j, blocks), partial(one, g), carry)

    zero = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, call.N // call.K, group, (zero, zero))
    dk_ref[...] = (dk * (call.scale / call.fold)).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


# -------------------------------------------------------------------------------------------------------------- calls
# Rows past the real length are padding: a kernel with small blocks leaves them unwritten, and nobody reads them.


def _launch(call: Call, blocks: Blocks, kernel: Callable[..., None], grid: tuple[int, int], **io: Any) -> Any:
    params = pltriton.CompilerParams(num_warps=blocks.warps, num_stages=2)
    name = "flash" + kernel.__name__.removesuffix("_kernel")
    return pl.pallas_call(
        partial(kernel, call, grid[1]), grid=grid, compiler_params=params, interpret=call.interpret, name=name, **io
    )


def _by(call: Call, blocks: Blocks) -> Call:
    return call._replace(block_q=blocks.q, block_k=blocks.k)


def _by_query(call: Call, x: Operands) -> tuple[tuple[int, int], pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Grid, and specs of q, of k and v, of a statistic, for a kernel that owns a query block."""
    (heads, _, H), S, G = x.q.shape, x.k.shape[1], call.N // call.K
    q = pl.BlockSpec((None, call.block_q, H), lambda h, i: (h, i, 0))
    kv = pl.BlockSpec((None, S, H), lambda h, _: (h // G, 0, 0))
    return (heads, -(-call.T // call.block_q)), q, kv, pl.BlockSpec((None, call.block_q), lambda h, i: (h, i))


def _forward(call: Call, cut: Cut, x: Operands, prefix: Array | None) -> tuple[Array, tuple[Any, ...]]:
    grid, q, kv, statistic = _by_query(call, x)
    specs, arrays = _inputs(_given(call, x, prefix), (q, kv), call.N)
    shapes = [jax.ShapeDtypeStruct(x.q.shape, x.q.dtype), jax.ShapeDtypeStruct(x.q.shape[:2], jnp.float32)]
    o, lse = _launch(
        call, cut.forward, _forward_kernel, grid, in_specs=specs, out_specs=[q, statistic], out_shape=shapes
    )(*arrays)
    o, lse = named_attention(o, lse)
    return o, (x, prefix, o, lse)


def _backward(call: Call, cut: Cut, saved: tuple[Any, ...], do: Array) -> tuple[Operands, None]:
    x, prefix, o, lse = saved
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1)
    out = do, lse, delta
    dq = _dq(_by(call, cut.dq), cut.dq, x, prefix, out)
    dk, dv = _dkv(_by(call, cut.dkv), cut.dkv, x, prefix, out)
    return Operands(dq, dk, dv, None, None), None


def _dq(call: Call, blocks: Blocks, x: Operands, prefix: Array | None, out: tuple[Array, Array, Array]) -> Array:
    grid, q, kv, statistic = _by_query(call, x)
    specs, arrays = _inputs(_given(call, x, prefix), (q, kv), call.N)
    specs = [*specs, q, statistic, statistic]
    shape = jax.ShapeDtypeStruct(x.q.shape, x.q.dtype)
    return _launch(call, blocks, _dq_kernel, grid, in_specs=specs, out_specs=q, out_shape=shape)(*arrays, *out)


def _dkv(call: Call, blocks: Blocks, x: Operands, prefix: Array | None, out: tuple[Array, Array, Array]) -> Any:
    heads, _, H = x.k.shape
    q, *rest = (a.reshape(heads, -1, *a.shape[2:]) for a in (x.q, *out))
    every = pl.BlockSpec((None, *q.shape[1:]), lambda h, _: (h, 0, 0))
    statistic = pl.BlockSpec((None, q.shape[1]), lambda h, _: (h, 0))
    own = pl.BlockSpec((None, call.block_k, H), lambda h, j: (h, j, 0))
    given = _given(call, x, prefix, by_key=True)
    specs, arrays = _inputs(given._replace(x=x._replace(q=q)), (every, own), call.K)
    specs, grid = [*specs, every, statistic, statistic], (heads, -(-call.S // call.block_k))
    shapes = [jax.ShapeDtypeStruct(x.k.shape, x.k.dtype)] * 2
    return _launch(call, blocks, _dkv_kernel, grid, in_specs=specs, out_specs=[own, own], out_shape=shapes)(
        *arrays, *rest
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(call: Call, cut: Cut, x: Operands, prefix: Array | None) -> Float[Array, "BN T H"]:
    return _forward(call, cut, x, prefix)[0]


_attend.defvjp(_forward, _backward)
