"""Rows in groups, each group times a matrix of its own: what dropless mixtures of experts are made of.

On TPU and GPU this is XLA's `ragged_dot`. On CPU XLA multiplies every row by every matrix there (64 experts: 20 times
the time), so a loop over blocks of rows takes its place, as long as there are blocks that are not empty.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x_MD: Float[Array, "M D"], w_EDF: Float[Array, "E D F"], size_E: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Row m times the matrix of its group. Rows lie group by group, size_E of each, M in all. In x's dtype."""
    return jax.lax.platform_dependent(x_MD, w_EDF, size_E, cpu=by_blocks, default=jax.lax.ragged_dot)


def reference(x_MD: Float[Array, "M D"], w_EDF: Float[Array, "E D F"], size_E: Int[Array, " E"]) -> Float[Array, "M F"]:
    """The same with every row's matrix written out."""
    group_M = jnp.repeat(jnp.arange(len(size_E)), size_E, total_repeat_length=len(x_MD))
    return jnp.einsum("MD,MDF->MF", x_MD, w_EDF[group_M])


def block_rows(rows: int, groups: int) -> int:
    """Rows of a block: about as many as a group has, a power of two up to 128."""
    return min(128, 1 << max(0, rows // groups - 1).bit_length())


def _blocks(size_E: Int[Array, " E"], rows: int, b: int) -> tuple[Array, Array, Array, Array]:
    """Of each block its group, first row and the row past its last one; and how many blocks there are."""
    per_E = (size_E + b - 1) // b
    last_E = jnp.cumsum(per_E)
    end_E = jnp.cumsum(size_E)
    most = min(rows, rows // b + len(size_E))
    group = jnp.minimum(jnp.searchsorted(last_E, jnp.arange(most), side="right"), len(size_E) - 1)
    start = (end_E - size_E)[group] + b * (jnp.arange(most) - (last_E - per_E)[group])
    return group, start, jnp.minimum(start + b, end_E[group]), last_E[-1]


@jax.custom_vjp
def by_blocks(x_MD: Float[Array, "M D"], w_EDF: Float[Array, "E D F"], size_E: Int[Array, " E"]) -> Float[Array, "M F"]:
    """A loop over blocks of one group's rows."""
    return _times(x_MD, w_EDF, size_E, "bD,DF->bF")


def _times(x: Array, w: Array, size_E: Array, equation: str) -> Array:
    rows, b = len(x), block_rows(len(x), len(size_E))
    group, start, stop, used = _blocks(size_E, rows, b)
    x = jnp.pad(x, ((0, b), (0, 0)))  # the last block may read past the end
    width = w.shape[2 if equation.endswith("F") else 1]

    def one(i: Array, out: Array) -> Array:
        y = jnp.einsum(equation, _rows(x, start[i], b), w[group[i]])
        mine = (start[i] + jnp.arange(b) < stop[i])[:, None]
        held = _rows(out, start[i], b)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, held), start[i], 0)

    return jax.lax.fori_loop(0, used, one, jnp.zeros((rows + b, width), x.dtype))[:rows]


def _rows(x: Array, start: Array, b: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, b)


def _forward(x: Array, w: Array, size_E: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return by_blocks(x, w, size_E), (x, w, size_E)


def _backward(kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, w, size_E = kept
    b = block_rows(len(x), len(size_E))
    group, start, stop, used = _blocks(size_E, len(x), b)
    long_x, long_g = (jnp.pad(y, ((0, b), (0, 0))) for y in (x, g))

    def one(i: Array, dw: Array) -> Array:
        mine = (start[i] + jnp.arange(b) < stop[i])[:, None]
        own = jnp.where(mine, _rows(long_x, start[i], b), 0)
        return dw.at[group[i]].add(jnp.einsum("bD,bF->DF", own, _rows(long_g, start[i], b)))

    dw = jax.lax.fori_loop(0, used, one, jnp.zeros_like(w))
    return _times(g, w, size_E, "bF,DF->bD"), dw, None


by_blocks.defvjp(_forward, _backward)
