"""Matrix products in 8 bits that can be trained through: operands rounded as they are multiplied, in both passes.

    int8    s8 x s8 -> s32, for operands and gradients alike
    fp8     e4m3 for operands, e5m2 for gradients (Micikevicius et al. 2022), float32 sums

One scale per tensor, that of its greatest value, so that an operand is rounded once and its 8 bits serve two products:
the forward one and a gradient's. (Scales per row and column are finer, but each product sums over another axis, so
every operand is read and rounded twice: on TPU v6e that took longer than int8 saved.) Scales are of the tensors at
hand; delayed ones would save one reading of an operand, for a history in the state of every product. All three products
of a layer are in 8 bits; masters, norms, attention and sums over micro-batches are not.

Unusual, and the price of one scale: a row of a batch is rounded by the greatest value of all rows, so that batch mates
are not quite invisible. Hence validation does without.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Kind = Literal["int8", "fp8"]

_DTYPES: dict[Kind, tuple[Any, Any, Any]] = {
    "int8": (jnp.int8, jnp.int8, jnp.int32),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32),
}
"""Of operands, of gradients, of sums."""


class Rounded(NamedTuple):
    """values * scale. values: 8 bits.  scale: float32 []."""

    values: Array
    scale: Float[Array, ""]


def rounded(x: Float[Array, ...], dtype: Any) -> Rounded:
    """The nearest of int8 or of an 8-bit float to x / scale, whose greatest magnitude is the dtype's."""
    whole = jnp.issubdtype(dtype, jnp.integer)
    top = 127.0 if whole else float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.where(largest == 0, 1.0, jnp.maximum(largest / top, jnp.finfo(jnp.float32).tiny))
    shares = x.astype(jnp.float32) / scale
    return Rounded((jnp.round(shares) if whole else shares).astype(dtype), scale)


def axes_of(equation: str) -> tuple[str, str, str]:
    """The axes of both operands and of the result."""
    operands, out = equation.split("->")
    a, b = operands.split(",")
    return a, b, out


def _product(equation: str, a: Rounded, b: Rounded, sums: Any, dtype: Any) -> Float[Array, ...]:
    total = jnp.einsum(equation, a.values, b.values, preferred_element_type=sums)
    return (total.astype(jnp.float32) * (a.scale * b.scale)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def matmul(equation: str, kind: Kind, x: Float[Array, ...], w: Float[Array, ...]) -> Float[Array, ...]:
    """einsum(equation, x, w) in x's dtype; this product and those of its gradients are made of 8-bit operands."""
    return _forward(equation, kind, x, w)[0]


def _forward(equation: str, kind: Kind, x: Array, w: Array) -> tuple[Array, tuple[Any, ...]]:
    operand, _, sums = _DTYPES[kind]
    low_x, low_w = rounded(x, operand), rounded(w, operand)
    likes = np.zeros((0,), x.dtype), np.zeros((0,), w.dtype)
    return _product(equation, low_x, low_w, sums, x.dtype), (low_x, low_w, *likes)


def _backward(equation: str, kind: Kind, kept: tuple[Any, ...], g: Float[Array, ...]) -> tuple[Array, Array]:
    (x, w, like_x, like_w), (x_axes, w_axes, out) = kept, axes_of(equation)
    _, gradient, sums = _DTYPES[kind]
    low_g = rounded(g, gradient)
    dx = _product(f"{out},{w_axes}->{x_axes}", low_g, w, sums, like_x.dtype)
    return dx, _product(f"{x_axes},{out}->{w_axes}", x, low_g, sums, like_w.dtype)


matmul.defvjp(_forward, _backward)
