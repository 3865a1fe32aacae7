"""Normalisation. Statistics are float32 whatever the compute dtype, and the result is rounded once."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import LayerNorm, Norm, RMSNorm
from jaxllm.leaves import leading
from jaxllm.params import Constant, Param, ParamTree


def norm_params(cfg: Norm, dim: int, axis: str = "embed") -> ParamTree:
    """scale [dim] (stored as the offset from 1 when `unit_offset`), and bias [dim] if the LayerNorm has one."""
    match cfg:
        case RMSNorm(unit_offset=offset):
            return {"scale": Param((dim,), (axis,), Constant(0.0 if offset else 1.0))}
        case LayerNorm(bias=bias):
            scale = {"scale": Param((dim,), (axis,), Constant(1.0))}
            return scale | ({"bias": Param((dim,), (axis,), Constant(0.0))} if bias else {})
        case other:
            assert_never(other)


def norm(p: Any, cfg: Norm, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalise the last axis: x / sqrt(mean(x²) + eps) * w, or (x - mean) / sqrt(var + eps) * w + b."""
    x32 = x.astype(jnp.float32)
    match cfg:
        case RMSNorm(eps, offset):
            scale = leading(p["scale"], x.ndim).astype(jnp.float32) + (1.0 if offset else 0.0)
            y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * scale
        case LayerNorm(eps, bias):
            centred = x32 - jnp.mean(x32, -1, keepdims=True)
            y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
            y = y * leading(p["scale"], x.ndim).astype(jnp.float32)
            y = y + leading(p["bias"], x.ndim).astype(jnp.float32) if bias else y
        case other:
            assert_never(other)
    return y.astype(x.dtype)
