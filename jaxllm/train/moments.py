"""State of few bits: masters in bfloat16, Adam's moments in 8 bits.

Both are rounded stochastically: up or down with probabilities that make the expectation exact. Rounded to nearest, a
bfloat16 weight does not move by less than 1/512 of itself, and a moment decays only while a step of its code is less
than what it loses.

    code of a moment    m = sign(c) (|c| / top)^2 scale          top 127; scale: the largest |m| of a block
    second moments      sqrt(v) is kept in that code, one number more than none where v is not 0

Unusual: Dettmers et al. (2022) take a table of 256 values ("dynamic tree"); the square has as fine a step at the top
(0.8 %), reaches down to 6e-5 of it (v: 4e-9), and needs no table. Blocks lie along one axis, so that codes and scales
are sharded as the parameter is. As they advise, embeddings, norms and small arrays keep 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.params import Normal, Param, ParamTree, leaves, map_params

TOP = 127
BLOCK = 256
SMALLEST = 4096


def is_table(p: Param) -> bool:
    """Whether a parameter is looked up by row: embeddings, and the head that shares their shape."""
    return p.axes[0] in ("vocab", "positions") and len(p.axes) == 2


def is_matrix(p: Param) -> bool:
    """What may have few bits: kernels of layers. Tables add up what thousands of tokens send to a few rows."""
    return isinstance(p.init, Normal) and not p.exact and not is_table(p) and math.prod(p.shape) >= SMALLEST


# --------------------------------------------------------------------------------------------------------- bfloat16


def to_bfloat16(x: Float[Array, ...], key: Array) -> Float[Array, ...]:
    """float32 as one of its two neighbours in bfloat16, whose expectation is x. What is not finite stays so."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = lax.bitcast_convert_type(up & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def rounded(tree: ParamTree, params: Any, key: Array) -> Any:
    """Parameters in the dtypes they are stored in. Each is rounded by its own key."""
    keys = iter(jax.random.split(key, len(leaves(tree))))

    def one(p: Param, x: Array) -> Array:
        own = next(keys)
        return to_bfloat16(x, own) if p.stored == "bfloat16" else x

    return map_params(one, tree, params)


def as_float32(params: Any) -> Any:
    """Masters as they are updated: float32, whatever they are stored in."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


# ----------------------------------------------------------------------------------------------------------- 8 bits


@struct.dataclass
class Coded:
    """A moment in 8 bits. code: int8, the parameter's shape.  scale: float32, one per block along `axis`."""

    code: Int[Array, ...]
    scale: Float[Array, ...]
    axis: int = struct.field(pytree_node=False)


def is_coded(x: object) -> bool:
    """The `is_leaf` of maps over moments rather than over the arrays inside them."""
    return isinstance(x, Coded)


def block_axis(p: Param) -> int | None:
    """The axis along which a parameter's moments have blocks; None: they stay float32.

    The last that is not "embed", which ZeRO spreads, if 16 divides it.
    """
    axes = [i for i, axis in enumerate(p.axes) if axis not in ("embed", "layers", "experts")]
    return axes[-1] if is_matrix(p) and axes and p.shape[axes[-1]] % 16 == 0 else None


def block_length(n: int) -> int:
    """The largest power of two up to BLOCK that divides n."""
    return min(BLOCK, n & -n)


def coded_bytes(p: Param) -> float:
    """Bytes that one number of a coded moment takes, its share of a scale included."""
    axis = block_axis(p)
    return 4.0 if axis is None else 1.0 + 4.0 / block_length(p.shape[axis])


def encode(x: Float[Array, ...], axis: int, key: Array) -> Coded:
    """float32 in 8 bits, stochastically."""
    blocks = _blocks(x, axis)
    scale = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
    share = jnp.abs(blocks) / jnp.where(scale == 0, 1.0, scale) * TOP**2
    low = jnp.floor(jnp.sqrt(share))
    chance = (share - low * low) / (2 * low + 1)
    code = low + (jax.random.uniform(key, share.shape) < chance)
    code = jnp.minimum(code, TOP) * jnp.sign(blocks)
    return Coded(code.astype(jnp.int8).reshape(x.shape), scale.squeeze(axis + 1), axis)


def decode(m: Coded) -> Float[Array, ...]:
    """The float32 that a code stands for."""
    c = _blocks(m.code, m.axis).astype(jnp.float32) / TOP
    return (c * jnp.abs(c) * jnp.expand_dims(m.scale, m.axis + 1)).reshape(m.code.shape)


def _blocks(x: Array, axis: int) -> Array:
    length = block_length(x.shape[axis])
    return x.reshape(*x.shape[:axis], x.shape[axis] // length, length, *x.shape[axis + 1 :])


def _not_zero(m: Coded, x: Array) -> Coded:
    """No code of 0 where x is not: what divides a step must not vanish."""
    return m.replace(code=jnp.where((x > 0) & (m.code == 0), jnp.int8(1), m.code))  # type: ignore[attr-defined]


class AdamState(NamedTuple):
    """count: steps taken.  mu, nu: like the parameters, `Coded` or float32; a coded nu is a square root."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


def scale_by_adam_8bit(b1: float, b2: float, eps: float, tree: ParamTree) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose moments lie in 8 bits between steps."""

    def start(p: Param, x: Array) -> Any:
        axis, zeros = block_axis(p), jnp.zeros(x.shape, jnp.float32)
        return zeros if axis is None else encode(zeros, axis, jax.random.key(0))

    def init(params: Any) -> AdamState:
        mu, nu = (map_params(start, tree, params) for _ in range(2))
        return AdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        count = state.count + 1
        keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves(tree))))

        def one(p: Param, g: Array, mu: Any, nu: Any) -> tuple[Array, Any, Any]:
            axis, (first, second) = block_axis(p), jax.random.split(next(keys))
            old_m, old_v = (mu, nu) if axis is None else (decode(mu), jnp.square(decode(nu)))
            m, v = b1 * old_m + (1 - b1) * g, b2 * old_v + (1 - b2) * g * g
            step = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            if axis is None:
                return step, m, v
            root = jnp.sqrt(v)
            return step, encode(m, axis, first), _not_zero(encode(root, axis, second), root)

        out = map_params(one, tree, grads, state.mu, state.nu)
        steps, mu, nu = (map_params(lambda _, made, i=i: made[i], tree, out) for i in range(3))
        return steps, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- layout


def map_moments(
    f: Callable[[Any, PartitionSpec], Any],
    opt_state: Any,
    specs: Any,
    sizes: Mapping[str, int],
    others: Callable[[Any], Any],
) -> Any:
    """`f(array, spec)` for every array of an optimiser's state that belongs to a parameter, `others` for the rest.

    specs: PartitionSpec per parameter.  A scale lies as its parameter does, whole where its blocks do not divide.
    """
    structure = jax.tree.structure(specs, is_leaf=_is_spec)

    def like_params(x: Any) -> bool:
        return jax.tree.structure(x, is_leaf=is_coded) == structure

    def one(x: Any, spec: PartitionSpec) -> Any:
        if not is_coded(x):
            return f(x, spec)
        return Coded(f(x.code, spec), f(x.scale, _fitting(spec, x.scale.shape, sizes)), x.axis)

    def part(x: Any) -> Any:
        return jax.tree.map(one, x, specs, is_leaf=is_coded) if like_params(x) else others(x)

    return jax.tree.map(part, opt_state, is_leaf=like_params)


def _is_spec(x: object) -> bool:
    return isinstance(x, PartitionSpec)


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec without the entries that do not divide the shape."""

    def ways(entry: Any) -> int:
        return math.prod(sizes[a] for a in ((entry,) if isinstance(entry, str) else entry or ()))

    return PartitionSpec(*(entry if n % ways(entry) == 0 else None for entry, n in zip(spec, shape, strict=False)))
