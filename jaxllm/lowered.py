"""Matrix products in 8 bits that can be trained through: operands rounded as they are multiplied, in both passes.

    int8    s8 x s8 -> s32. One scale per index of an operand that is not summed over, the largest magnitude / 127:
            a row of activations, a column of a weight, each way round in the backward products
    fp8     e4m3 x e4m3 forward, e5m2 for gradients (Micikevicius et al. 2022), float32 sums. One scale per tensor

Scales are taken of the tensors at hand ("dynamic"): a delayed scale would save one reading of an operand, for a history
in the state of every product. All three products of a layer are in 8 bits; masters, norms, attention and the sums over
micro-batches are not. (Recipes: Dettmers et al. 2022 for row and column scales; Xi et al. 2023 for training in int8.)
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["int8", "fp8"]


class Rounded(NamedTuple):
    """values * scale. values: int8 or an 8-bit float.  scale: float32, broadcasts against values."""

    values: Array
    scale: Float[Array, ...]


def by_channel(x: Float[Array, ...], summed: tuple[int, ...]) -> Rounded:
    """int8 with a scale per index of the axes that are not `summed`."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=summed, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return Rounded(jnp.round(x / scale).astype(jnp.int8), scale)


def by_tensor(x: Float[Array, ...], dtype: jnp.dtype) -> Rounded:
    """An 8-bit float with one scale, that of its greatest value."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / float(jnp.finfo(dtype).max))
    return Rounded((x / scale).astype(dtype), scale)


def axes_of(equation: str) -> tuple[str, str, str]:
    """The axes of both operands and of the result."""
    operands, out = equation.split("->")
    a, b = operands.split(",")
    return a, b, out


def product(equation: str, kind: Kind, a: Array, b: Array, *, gradient: bool) -> Float[Array, ...]:
    """einsum(equation, a, b) in 8 bits, in a's dtype. gradient: whether b is one."""
    a_axes, b_axes, out = axes_of(equation)
    match kind:
        case "int8":
            x, y = (
                by_channel(z, tuple(i for i, axis in enumerate(axes) if axis not in out))
                for z, axes in ((a, a_axes), (b, b_axes))
            )
            total = jnp.einsum(equation, x.values, y.values, preferred_element_type=jnp.int32).astype(jnp.float32)
        case "fp8":
            x = by_tensor(a, jnp.float8_e4m3fn)
            y = by_tensor(b, jnp.float8_e5m2 if gradient else jnp.float8_e4m3fn)
            total = jnp.einsum(equation, x.values, y.values, preferred_element_type=jnp.float32)
        case other:
            assert_never(other)
    return (total * _along(x.scale, a_axes, out) * _along(y.scale, b_axes, out)).astype(a.dtype)


def _along(scale: Float[Array, ...], axes: str, out: str) -> Float[Array, ...]:
    """A scale whose summed axes are 1, shaped to broadcast against the result."""
    kept = "".join(axis for axis in axes if axis in out)
    order = jnp.einsum(f"{axes}->{''.join(axis for axis in out if axis in kept)}", scale)
    sizes = iter(order.shape)
    return order.reshape([next(sizes) if axis in kept else 1 for axis in out])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def matmul(equation: str, kind: Kind, x: Float[Array, ...], w: Float[Array, ...]) -> Float[Array, ...]:
    """einsum(equation, x, w) in x's dtype, all of its products and its gradients' in 8 bits."""
    return product(equation, kind, x, w, gradient=False)


def _forward(equation: str, kind: Kind, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(equation, kind, x, w), (x, w)


def _backward(equation: str, kind: Kind, kept: tuple[Array, Array], g: Float[Array, ...]) -> tuple[Array, Array]:
    (x, w), (x_axes, w_axes, out) = kept, axes_of(equation)
    dx = product(f"{w_axes},{out}->{x_axes}", kind, w, g, gradient=True)
    dw = product(f"{x_axes},{out}->{w_axes}", kind, x, g, gradient=True)
    return dx.astype(x.dtype), dw.astype(w.dtype)


matmul.defvjp(_forward, _backward)
