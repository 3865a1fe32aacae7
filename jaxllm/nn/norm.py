"""Norms. Statistics are float32 whatever the compute dtype."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import LayerNorm, Norm, QKNorm, RMSNorm
from jaxllm.leaves import leading
from jaxllm.params import Constant, Param, ParamTree


def norm_params(cfg: Norm, dim: int | tuple[int, ...], axes: str | tuple[str, ...] = "embed") -> ParamTree:
    """scale [dim] (stored as the offset from 1 when `unit_offset`), and bias [dim] if the LayerNorm has one."""
    shape, names = (dim,) if isinstance(dim, int) else dim, (axes,) if isinstance(axes, str) else axes

    def full(value: float) -> Param:
        return Param(shape, names, Constant(value))

    match cfg:
        case RMSNorm(unit_offset=offset):
            return {"scale": full(0.0 if offset else 1.0)}
        case LayerNorm(bias=bias, scale=scale):
            return ({"scale": full(1.0)} if scale else {}) | ({"bias": full(0.0)} if bias else {})
        case other:
            assert_never(other)


def norm(p: Any, cfg: Norm, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalise the last axis: x / sqrt(mean(x²) + eps) * w, or (x - mean) / sqrt(var + eps) * w + b."""

    def weight(name: str) -> Array:
        return leading(p[name], x.ndim).astype(jnp.float32)

    x32 = x.astype(jnp.float32)
    match cfg:
        case RMSNorm(eps, offset):
            y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
            y = y * (weight("scale") + (1.0 if offset else 0.0))
        case LayerNorm(eps, bias, scale):
            centred = x32 - jnp.mean(x32, -1, keepdims=True)
            y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
            y = y * weight("scale") if scale else y
            y = y + weight("bias") if bias else y
        case other:
            assert_never(other)
    return _seam(y.astype(x.dtype))


@jax.custom_vjp
def _seam(x: Array) -> Array:
    """x; in the backward pass XLA does not fuse what is before with what is behind."""
    return x


_seam.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def qk_norm_params(cfg: QKNorm, heads: int, head_dim: int, axis: str) -> ParamTree:
    """The weights of one side: [H] over "head", [N, H] over "each" and "all". axis: "heads" or "kv_heads"."""
    if cfg.over == "head":
        return norm_params(cfg.norm, head_dim, "head_dim")
    return norm_params(cfg.norm, (heads, head_dim), (axis, "head_dim"))


def qk_norm(p: Any, cfg: QKNorm, x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Normalise each head, or over "all" the heads of a token together."""
    if cfg.over != "all":
        return norm(p, cfg.norm, x_BTNH)
    flat = jax.tree.map(jnp.ravel, p)
    return norm(flat, cfg.norm, x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)
