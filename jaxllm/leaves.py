"""What a weight may be, and the one way a weight is used.

    Weight = Array | Quantised | Adapted | Matrix

`project(x, w, "BTD,DNH->BTNH")` is an einsum that knows all of them, so that no call site does. LoRA is applied beside
the base product, never merged into a temporary copy of it: for a 1.5 GiB base compiled for TPU v5e that is 0.27 GiB
of temporaries instead of 3.27 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxllm.lowered import Kind, axes_of, matmul
from jaxllm.params import Normal, Param, ParamTree, map_params


@struct.dataclass
class Quantised:
    """values * scale, blockwise.

    values: int8 (or fp8), the weight's own shape.  scale: float32, same rank; along each axis its size is 1 (one scale
    for the whole axis) or a divisor of the axis (blocks of equal length).
    """

    values: Array
    scale: Float[Array, ...]


@struct.dataclass
class Adapted:
    """base + scaling * a @ b (LoRA, Hu et al. 2021, eq. 3).

    base: any Weight.  a: [*leading axes of the base, R].  b: [R, *the other axes].  Either side may be contracted.
    scaling: alpha / R, float32 [] (an array, so that stacking and sharding treat it like the rest).
    """

    base: Weight
    a: Float[Array, ...]
    b: Float[Array, ...]
    scaling: Float[Array, ...]


@struct.dataclass
class Matrix:
    """A dense weight flattened for XLA on CPU (`decode.sample.prepare`); for decoding only, it has no logical axes.

    values: [first axis or axes, the others]; one of the two sides is contracted.  shape: the weight's own (static).
    The product is asked for in float32 and then rounded. Measured, jax 0.10, one core, 576 x 1536: bf16 to bf16 runs at
    1 (1 or 8 rows) to 110 GFLOP/s (512), bf16 to float32 at 15 (2 rows) to 340, float32 at 9 to 130. A single row in
    bf16 falls off the fast path (20 times slower), so it is sent twice. And a kernel [N, H, D] contracted over two axes
    is otherwise copied at every call.
    """

    values: Float[Array, "_ _"]
    shape: tuple[int, ...] = struct.field(pytree_node=False)


@struct.dataclass
class Lowered:
    """An array ready to be multiplied in 8 bits, forward and backward (`jaxllm.lowered`); for training only."""

    values: Float[Array, ...]
    kind: Kind = struct.field(pytree_node=False)


Weight = Array | Quantised | Adapted | Matrix


def matrix(w: Weight, split: int) -> Weight:
    """A plain array as a Matrix whose rows are its first `split` axes; other kinds as they are."""
    if not isinstance(w, (jax.Array, jax.ShapeDtypeStruct)):
        return w
    return Matrix(w.reshape(math.prod(w.shape[:split]), -1), w.shape)


def is_weight(x: object) -> bool:
    """True for a non-array weight: the `is_leaf` of maps over weights rather than over the arrays inside them."""
    return isinstance(x, (Quantised, Adapted, Matrix, Lowered))


def lower(tree: ParamTree, params: Any, kind: Kind) -> Any:
    """Weights of a block with those that take most of the arithmetic lowered: kernels that are plain arrays.

    Not routers, gates of a single number, and experts, whose products are grouped; a block has no embedding or head.
    """

    def one(p: Param, w: Weight) -> Weight | Lowered:
        kernel = isinstance(p.init, Normal) and len(p.shape) > 1 and not p.exact
        return Lowered(w, kind) if kernel and isinstance(w, jax.Array) and not {"experts", "gate"} & {*p.axes} else w

    return map_params(one, tree, params)


def quantise(w: Float[Array, ...], axes: tuple[int, ...]) -> Quantised:
    """Symmetric int8 with one float32 scale per index of the axes not in `axes` (those to be contracted over)."""
    scale = jnp.max(jnp.abs(w), axis=axes, keepdims=True).astype(jnp.float32) / 127.0
    scale = jnp.where(scale == 0, 1.0, scale)
    return Quantised(jnp.clip(jnp.round(w / scale), -127, 127).astype(jnp.int8), scale)


def dense(w: Weight | Lowered, dtype: DTypeLike) -> Array:
    """The weight as one array of `dtype`. For export and for blocks that do not follow the contraction."""
    match w:
        case Quantised(values, scale):
            for axis, (n, s) in enumerate(zip(values.shape, scale.shape, strict=True)):
                if s not in (1, n):
                    scale = jnp.repeat(scale, n // s, axis=axis)
            return (values.astype(jnp.float32) * scale).astype(dtype)
        case Adapted() if w.scaling.ndim:  # stacked over layers
            return jax.vmap(partial(dense, dtype=dtype))(w)
        case Adapted(base, a, b, scaling):
            delta = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1) * scaling
            return (dense(base, jnp.float32) + delta).astype(dtype)
        case Matrix(values, shape):
            return values.reshape(shape).astype(dtype)
        case Lowered(values):
            return values.astype(dtype)
        case _:
            return w.astype(dtype)


def project(x: Float[Array, ...], w: Weight | Lowered, equation: str, bias: Array | None = None) -> Float[Array, ...]:
    """einsum(equation, x, w) + bias in x's dtype (accumulated in float32 by the matrix unit).

    `equation` is "x axes,w axes->out axes" with single letters of the dimension key; the axes that x and w share and
    the result lacks are contracted.  bias: shaped as the trailing axes of the result.  An adapter's rank is called r.
    """
    y = _project(x, w, equation)
    return y if bias is None else y + leading(bias, y.ndim).astype(y.dtype)


def leading(x: Array, ndim: int) -> Array:
    """x with leading axes of size 1 up to `ndim`: broadcasting by name of rank, never by accident."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _project(x: Array, w: Weight | Lowered, equation: str) -> Array:
    match w:
        case Quantised(values, scale):
            x_axes, w_axes, out_axes = axes_of(equation)
            if any(scale.shape[w_axes.index(c)] != 1 for c in w_axes if c not in out_axes):
                return jnp.einsum(equation, x, dense(w, x.dtype))
            kept = "".join(c for c in w_axes if c in out_axes)
            out_scale = jnp.einsum(f"{w_axes}->{kept}", scale)  # contracted axes have size 1
            out_scale = out_scale.reshape([out_scale.shape[kept.index(c)] if c in kept else 1 for c in out_axes])
            y = jnp.einsum(equation, x, values.astype(x.dtype))
            return (y.astype(jnp.float32) * out_scale).astype(x.dtype)
        case Adapted(base, a, b, scaling):
            x_axes, w_axes, out_axes = axes_of(equation)
            first, second = w_axes[: a.ndim - 1], w_axes[a.ndim - 1 :]
            into, out_of = (f"{first}r", a), (f"r{second}", b)
            if not any(c in x_axes and c not in out_axes for c in first):  # a head [V, D] contracts its trailing axes
                into, out_of = out_of, into
            rest = "".join(c for c in out_axes if c in x_axes or c in into[0])
            low = jnp.einsum(f"{x_axes},{into[0]}->{rest}r", x, into[1].astype(x.dtype))
            delta = jnp.einsum(f"{rest}r,{out_of[0]}->{out_axes}", low, out_of[1].astype(x.dtype))
            return _project(x, base, equation) + delta * scaling.astype(x.dtype)
        case Matrix():
            return _matmul(x, w, equation)
        case Lowered(values, kind):
            return matmul(equation, kind, x, values.astype(x.dtype))
        case _:
            return jnp.einsum(equation, x, w.astype(x.dtype))


def _matmul(x: Array, w: Matrix, equation: str) -> Array:
    """project for a Matrix; the contracted axes are last in x, and the first or the last of the weight."""
    _, w_axes, out_axes = axes_of(equation)
    side = 1 if w_axes[0] in out_axes else 0
    kept = [n for n, c in zip(w.shape, w_axes, strict=True) if c in out_axes]
    rows = x.reshape(-1, w.values.shape[side])
    single = rows.shape[0] == 1 and x.dtype != jnp.float32
    rows = jnp.concatenate([rows, rows]) if single else rows
    dims = (((1,), (side,)), ((), ()))
    y = jax.lax.dot_general(rows, w.values.astype(x.dtype), dims, preferred_element_type=jnp.float32).astype(x.dtype)
    y = y[:1] if single else y
    return y.reshape(*x.shape[: len(out_axes) - len(kept)], *kept)


def lookup(table_VD: Weight, ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """Rows of an embedding table, in `dtype`. An id outside [0, V) gives NaN rather than a neighbour's row."""
    match table_VD:
        case Quantised(values, scale):
            rows = values.at[ids].get(mode="fill", fill_value=0).astype(jnp.float32)
            per_row = scale if scale.shape[0] == 1 else scale.at[ids].get(mode="fill", fill_value=jnp.nan)
            return (rows * per_row).astype(dtype)
        case Adapted(base, a, b, scaling):
            delta = jnp.einsum("BTR,RD->BTD", a.at[ids].get(mode="fill", fill_value=jnp.nan), b) * scaling
            return lookup(base, ids, dtype) + delta.astype(dtype)
        case Matrix(values):
            return lookup(values, ids, dtype)
        case _:
            return table_VD.at[ids].get(mode="fill", fill_value=jnp.nan).astype(dtype)


def chunk_rows(w: Weight, chunks: int, ways: int = 1) -> Any:
    """The rows of a weight in `chunks` groups: each array gets a leading axis of that size, for a scan.

    With `ways` > 1 the rows are seen as that many equal shards, and every chunk takes an equal part of each, so that
    a sharded axis stays sharded. The number of rows must be a multiple of chunks * ways.
    """

    def rows(x: Array) -> Array:
        split = x.reshape(ways, chunks, x.shape[0] // (chunks * ways), *x.shape[1:])
        return split.swapaxes(0, 1).reshape(chunks, x.shape[0] // chunks, *x.shape[1:])

    def whole(x: Array) -> Array:
        return jnp.broadcast_to(x, (chunks, *x.shape))

    match w:
        case Quantised(values, scale):
            return Quantised(rows(values), whole(scale) if scale.shape[0] == 1 else rows(scale))
        case Adapted(base, a, b, scaling):
            return Adapted(chunk_rows(base, chunks, ways), rows(a), whole(b), whole(scaling))
        case Matrix(values):
            return rows(dense(w, values.dtype))
        case _:
            return rows(w)


def pad_rows(w: Weight, rows: int) -> Any:
    """The weight with zero rows appended up to `rows`."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

    match w:
        case Quantised(values, scale):
            return Quantised(pad(values), scale if scale.shape[0] == 1 else pad(scale))
        case Adapted(base, a, b, scaling):
            return Adapted(pad_rows(base, rows), pad(a), b, scaling)
        case Matrix(values):
            return pad(dense(w, values.dtype))
        case _:
            return pad(w)


def map_arrays(
    f: Callable[[Array, tuple[str | None, ...]], Any], w: Weight, axes: tuple[str, ...], outputs: int
) -> Any:
    """Apply `f(array, logical axes)` to every array inside a weight, keeping its kind.

    axes: the logical axes of the whole weight.  outputs: how many trailing ones are output axes (what LoRA's b has).
    A scale's axis of size 1 has no logical axis.
    """
    match w:
        case Quantised(values, scale):
            own = tuple(a if n > 1 else None for a, n in zip(axes, scale.shape, strict=True))
            return Quantised(f(values, axes), f(scale, own))
        case Adapted(base, a, b, scaling):
            cut = len(axes) - outputs
            stack: tuple[str | None, ...] = axes[: b.ndim - outputs - 1]  # a leading "layers" axis is on both factors
            inner, outer = axes[len(stack) : cut], axes[cut:]
            return Adapted(
                map_arrays(f, base, axes, outputs),
                f(a, (*stack, *inner, None)),
                f(b, (*stack, None, *outer)),
                f(scaling, stack[: scaling.ndim]),
            )
        case Matrix(values, shape):
            return Matrix(f(values, (None, None)), shape)
        case _ if isinstance(w, (jax.Array, jax.ShapeDtypeStruct)):
            return f(w, axes)
        case other:
            assert_never(other)  # type: ignore[arg-type]
