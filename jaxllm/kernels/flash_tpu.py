"""Flash attention for TPUs (Dao 2023; Pallas, Mosaic): forward, and a backward of five matmuls in one kernel.

Unusual, and measured on the compiler's bundles:

- Scores are held transposed, keys down the sublanes and queries along the lanes. Row statistics are then [1, queries]
  vectors, whose broadcast is free and whose reduction is plain vector maxima instead of cross-lane shuffles.
- Blocks of 1024 x 1024 are computed in tiles of 128 keys x 256 queries, written out in full, the matmul of a later tile
  before the softmax of this one: what is live fits the registers, and both units are busy.
- The backward pass walks queries outside and keys inside. The gradient of one query block and those of *all* keys stay
  in VMEM, so nothing is summed through HBM; longer rows go in spans of keys, one call each.
- The scale times log2(e) is folded into q once per block; a softmax is exp2; the sum is divided out at the end.

Heads come first here, [B * N, T, H]; `schedule.py` says which blocks are visited and how.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxllm import config
from jaxllm.kernels.call import (
    LOG2_E,
    Call,
    Operands,
    Part,
    dot,
    kernel_rows,
    operands,
    padded,
    part_call,
    part_rows,
    result,
    saveable,
    scores,
    unpadded,
)
from jaxllm.kernels.modifiers import NONE, Modifiers
from jaxllm.kernels.reference import MASKED
from jaxllm.kernels.schedule import Piece, Schedule, schedule
from jaxllm.kernels.tpu_blocks import SCALARS, Fixed, make_guide, make_layout, present, unpack
from jaxllm.kernels.tpu_pieces import Work, compute, hide, lean, step_at, within
from jaxllm.kernels.tpu_sizes import Sizes, sizes
from jaxllm.records import Mask

ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # a b^T
COLUMNS_BY_COLUMNS = (((0,), (0,)), ((), ()))  # a^T b


def flash_tpu(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K h"],
    pattern: config.Pattern,
    mask: Mask,
    modifiers: Modifiers = NONE,
    *,
    scale: float,
    softcap: float | None = None,
    cut: Sizes | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N h"]:
    """Attention on one TPU device, differentiable in q, k, v and sinks; `mask` must have no slot arrays.

    modifiers: an `Alibi` that does not round, and sinks.  cut: block and tile sizes, None for those of the chip in the
    context. Raises ValueError for slot arrays and for other modifiers.
    """
    m = modifiers
    if m.table_RN is not None or (m.alibi is not None and m.alibi.rounded):
        raise ValueError(f'flash_tpu: no learned biases, no rounded slopes, got {m.relative or m.alibi}; use "chunked"')
    alibi = m.slopes_N is not None and m.alibi is not None
    slopes = m.slopes_N * (m.alibi.scale * LOG2_E) if alibi else None  # type: ignore[operator, union-attr]
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    call, cut, x = _prepare(Part(pattern, mask, scale, softcap), q, k, v, cut, interpret)
    return result(call, _attend(call._replace(alibi=alibi), cut, x, Fixed(mask.prefix_B, slopes), m.sinks_N))


def _prepare(
    part: Part, q: Array, k: Array, v: Array, cut: Sizes | None, interpret: bool
) -> tuple[Call, Sizes, Operands]:
    cut = sizes(part.pattern, q.shape[2], k.shape[2], q.shape[3], q.dtype) if cut is None else cut
    call = part_call(part, q, k, (cut.block_q, cut.block_k), interpret)
    return call, cut, operands(call, q, k, v, part.mask)


def part_forward(
    part: Part, q: Array, k: Array, v: Array, interpret: bool = False
) -> tuple[Float[Array, "B N T h"], Float[Array, "B N T"]]:
    """Attention to some of the keys, and the log-sum-exp of each row; see `Part`."""
    call, cut, x = _prepare(part, q, k, v, None, interpret)
    o, (*_, lse) = _forward(call, cut, x, Fixed(part.mask.prefix_B, None), None)
    return unpadded(o, call.N, call.T), part_rows(call, lse[:, 0])


def part_backward(
    part: Part, qkv: tuple[Array, Array, Array], out: tuple[Array, Array, Array], interpret: bool = False
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S h"]]:
    """Gradients of q, k, v through some of the keys. out: o, log-sum-exp over all keys, gradient of o."""
    call, cut, x = _prepare(part, *qkv, None, interpret)
    o, do = (padded(y, call.block_q) for y in (out[0], out[2]))
    saved = x, Fixed(part.mask.prefix_B, None), None, o, kernel_rows(call, out[1])[:, None]
    grads, *_ = _backward(call, cut, saved, do)
    dk, dv = (unpadded(y, call.K, call.S) for y in (grads.k, grads.v))
    return unpadded(grads.q, call.N, call.T), dk, dv


# ------------------------------------------------------------------------------------------------------------- forward


def _forward_kernel(call: Call, cut: Sizes, plan: Schedule, *refs: Any) -> None:
    """Grid (B * N, visits)."""
    guide, x, (o_ref, lse_ref, q_folded, top, total, sums, column) = unpack(call, refs)
    tile = cut.forward
    step = step_at(call, guide, len(plan.visits.q), pl.program_id(0), pl.program_id(1), column)

    def begin() -> None:
        q_folded[...] = (x.q[...].astype(jnp.float32) * call.fold).astype(q_folded.dtype)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def score(piece: Piece) -> tuple[Array]:
        at, keys = within(piece, tile)
        s = lean(call, step, piece, scores(call, dot(x.k[keys, :], q_folded[at, :], ROWS_BY_ROWS))[0])
        return (hide(call, step, x.q_segment, piece, s),)

    def absorb(piece: Piece, s: Array) -> None:
        at, keys = within(piece, tile)
        old, v = top[:, at], x.v[keys, :]
        new = jnp.maximum(old, s.max(0, keepdims=True))
        p, shrink = jnp.exp2(s - new), jnp.exp2(old - new)
        top[:, at] = new
        total[:, at] = total[:, at] * shrink + p.sum(0, keepdims=True)
        sums[:, at] = sums[:, at] * shrink + dot(v, p.astype(v.dtype), COLUMNS_BY_COLUMNS)

    def end() -> None:
        seen = top[...] > MASKED / 2
        divisor = jnp.where(seen, total[...], 1.0)
        o_ref[...] = (sums[...] * jnp.where(seen, 1.0 / divisor, 0.0)).astype(o_ref.dtype).T
        lse_ref[...] = jnp.where(seen, top[...] + jnp.log2(divisor), -MASKED)

    compute(call, plan, step, tile.ahead, x.k_segment, Work(begin, score, absorb, end))


def _column(call: Call) -> Any:
    return pltpu.VMEM((call.block_k, 128) if call.arrays.k_segment else (8, 128), jnp.int32)


def _params(cut: Sizes, *semantics: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=cut.vmem)


def _forward(
    call: Call, cut: Sizes, x: Operands, fixed: Fixed, sinks: Array | None
) -> tuple[Float[Array, "BN T h"], tuple[Any, ...]]:
    plan = schedule(call.pattern, call.shape(cut.forward.q, cut.forward.k), call.arrays)
    guide = make_guide(call, plan, cut.forward, x, fixed)
    (heads, T, H), h, bq, visits = x.q.shape, x.v.shape[2], call.block_q, len(plan.visits.q)
    layout = make_layout(call, x, visits, lambda head, visit: (head, visit))
    specs, arrays = present(layout, x)
    scratch = [
        pltpu.VMEM((bq, H), x.q.dtype),
        pltpu.VMEM((1, bq), jnp.float32),
        pltpu.VMEM((1, bq), jnp.float32),
        pltpu.VMEM((h, bq), jnp.float32),
        _column(call),
    ]
    o, lse = pl.pallas_call(
        partial(_forward_kernel, call, cut, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=SCALARS,
            grid=(heads, visits),
            in_specs=specs,
            out_specs=[layout.o, layout.statistic],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((heads, T, h), x.q.dtype),
            jax.ShapeDtypeStruct((heads, 1, T), jnp.float32),
        ],
        compiler_params=_params(cut, "parallel", "arbitrary"),
        interpret=call.interpret,
        name="flash_forward",
    )(*guide, *arrays)
    if sinks is not None:  # one more key of score `sinks` and value 0
        with_sinks = jnp.logaddexp2(lse, _per_row(call, sinks, lse))
        o = (o * jnp.exp2(lse - with_sinks).swapaxes(1, 2)).astype(o.dtype)
        lse = with_sinks
    o, lse = saveable(call, o, lse[:, 0])
    return o, (x, fixed, sinks, o, lse[:, None])


def _per_row(call: Call, sinks: Float[Array, " N"], lse: Float[Array, "BN 1 T"]) -> Float[Array, "BN 1 1"]:
    """The sinks in powers of two, one per query head of the batch."""
    return jnp.tile(sinks.astype(jnp.float32) * LOG2_E, lse.shape[0] // call.N)[:, None, None]


# ------------------------------------------------------------------------------------------------------------ backward


def _backward_kernel(call: Call, cut: Sizes, plan: Schedule, first_key: int, more: bool, *refs: Any) -> None:
    """Grid (B * K, G, visits). more: the gradient of q continues that of another span of keys."""
    guide, x, rest = unpack(call, refs)
    do_ref, o_ref, lse_ref, *rest = rest
    so_far, rest = (rest[0], rest[1:]) if more else (None, rest)
    dq_ref, dk_ref, dv_ref, q_folded, delta, dq, dk, dv, column = rest
    tile, (kv_head, g, visit) = cut.backward, map(pl.program_id, range(3))
    visits, G = len(plan.visits.q), call.N // call.K
    step = step_at(call, guide, visits, kv_head * G + g, visit, column)

    @pl.when((g == 0) & (visit == 0))
    def _begin_head() -> None:
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def begin() -> None:
        q_folded[...] = (x.q[...].astype(jnp.float32) * call.fold).astype(q_folded.dtype)
        delta[...] = (do_ref[...].astype(jnp.float32) * o_ref[...].astype(jnp.float32)).T.sum(0, keepdims=True)
        dq[...] = jnp.zeros_like(dq)

    def score(piece: Piece) -> tuple[Any, ...]:
        at, keys = within(piece, tile)
        s, t = scores(call, dot(x.k[keys, :], q_folded[at, :], ROWS_BY_ROWS))
        s = lean(call, step, piece, s)
        dp = dot(x.v[keys, :], do_ref[at, :], ROWS_BY_ROWS)
        return hide(call, step, x.q_segment, piece, s), dp, t

    def absorb(piece: Piece, s: Array, dp: Array, t: Array | None) -> None:
        at, keys = within(piece, tile)
        start = (step.key - first_key) * call.block_k + piece.k
        rows = pl.ds(pl.multiple_of(start, tile.k), tile.k)
        p = jnp.exp2(s - lse_ref[:, at])
        ds = p * (dp - delta[:, at])
        ds = (ds if t is None else ds * (1 - t * t)).astype(q_folded.dtype)
        dv[rows, :] += dot(p.astype(do_ref.dtype), do_ref[at, :])
        dk[rows, :] += dot(ds, q_folded[at, :])
        dq[:, at] += dot(x.k[keys, :], ds, COLUMNS_BY_COLUMNS)

    def end() -> None:
        part = dq[...] * call.scale
        dq_ref[...] = (part if so_far is None else part + so_far[...].T).astype(dq_ref.dtype).T

    compute(call, plan, step, tile.ahead, x.k_segment, Work(begin, score, absorb, end))

    @pl.when((g == G - 1) & (visit == visits - 1))
    def _end_head() -> None:
        dk_ref[...] = (dk[...] * (call.scale / call.fold)).astype(dk_ref.dtype)
        dv_ref[...] = dv[...].astype(dv_ref.dtype)


class Span(NamedTuple):
    """Key blocks start .. stop - 1; the last span gives dq in its final dtype."""

    start: int
    stop: int
    last: bool


def _span(call: Call, cut: Sizes, saved: tuple[Any, ...], do: Array, keys: Span, so_far: Array | None) -> Any:
    """(dq, dk, dv) of a span of keys; dq continues `so_far`."""
    x, fixed, _, o, lse = saved
    bk, bq, G = call.block_k, call.block_q, call.N // call.K
    plan = schedule(call.pattern, call.shape(cut.backward.q, cut.backward.k), call.arrays, keys[:2])
    guide = make_guide(call, plan, cut.backward, x, fixed)
    (kv_heads, _, h), H, visits, span = x.v.shape, x.q.shape[2], len(plan.visits.q), (keys.stop - keys.start) * bk
    layout = make_layout(call, x, visits, lambda kv_head, g, visit: (kv_head * G + g, visit))
    specs, arrays = present(layout, x)
    dk, dv = (pl.BlockSpec((None, span, width), lambda kv_head, *_: (kv_head, 0, 0)) for width in (H, h))
    dk_shape, dv_shape = (jax.ShapeDtypeStruct((kv_heads, span, width), x.k.dtype) for width in (H, h))
    more = [] if so_far is None else [so_far]
    scratch = [
        pltpu.VMEM((bq, H), x.q.dtype),
        pltpu.VMEM((1, bq), jnp.float32),
        pltpu.VMEM((H, bq), jnp.float32),
        pltpu.VMEM((span, H), jnp.float32),
        pltpu.VMEM((span, h), jnp.float32),
        _column(call),
    ]
    return pl.pallas_call(
        partial(_backward_kernel, call, cut, plan, keys.start, bool(more)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=SCALARS,
            grid=(kv_heads, G, visits),
            in_specs=[*specs, layout.o, layout.o, layout.statistic, *[layout.q] * len(more)],
            out_specs=[layout.q, dk, dv],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.q.shape, x.q.dtype if keys.last else jnp.float32), dk_shape, dv_shape],
        compiler_params=_params(cut, "parallel", "arbitrary", "arbitrary"),
        interpret=call.interpret,
        name="flash_backward",
    )(*guide, *arrays, do, o, lse, *more)


def _backward(
    call: Call, cut: Sizes, saved: tuple[Any, ...], do: Float[Array, "BN T h"]
) -> tuple[Operands, None, Array | None]:
    blocks, step = saved[0].k.shape[1] // call.block_k, cut.span // call.block_k
    dq: Any = None
    dks, dvs = [], []
    for start in range(0, blocks, step):
        keys = Span(start, min(start + step, blocks), start + step >= blocks)
        dq, dk, dv = _span(call, cut, saved, do, keys, dq)
        dks.append(dk)
        dvs.append(dv)
    return Operands(dq, jnp.concatenate(dks, 1), jnp.concatenate(dvs, 1), None, None), None, _dsinks(call, saved, do)


def _dsinks(call: Call, saved: tuple[Any, ...], do: Float[Array, "BN T h"]) -> Float[Array, " N"] | None:
    """Of each sink: minus the sum over queries of its weight times delta."""
    _, _, sinks, o, lse = saved
    if sinks is None:
        return None
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1)
    weight = jnp.exp2(_per_row(call, sinks, lse) - lse)[:, 0]
    return -(weight * delta).sum(1).reshape(-1, call.N).sum(0).astype(sinks.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(call: Call, cut: Sizes, x: Operands, fixed: Fixed, sinks: Array | None) -> Float[Array, "BN T h"]:
    return _forward(call, cut, x, fixed, sinks)[0]


_attend.defvjp(_forward, _backward)
