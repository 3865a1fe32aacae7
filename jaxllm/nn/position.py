"""Positions: rotary inside attention, learned at the embedding.

The cos/sin table of a `Rope` is made once per forward, outside the layer scan, and shared by all layers that use it.
"""

from __future__ import annotations

import math
from typing import assert_never

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxllm.config import Linear, Llama3, Rope, Transformer


@struct.dataclass
class Rotation:
    """cos and sin of every angle: float32 [B, T, rotated width / 2]."""

    cos: Float[Array, "B T h"]
    sin: Float[Array, "B T h"]


Rotations = dict[tuple[Rope, int], Rotation]


def frequencies(cfg: Rope, head_dim: int) -> Float[np.ndarray, " h"]:
    """Angle per token of each rotated pair, float64: theta^(-2i / width) (Su et al. 2021, §3.2.2), then scaled."""
    width = int(head_dim * cfg.fraction)
    base = cfg.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    match cfg.scaling:
        case None:
            return base
        case Linear(factor):
            return base / factor
        case Llama3(factor, low, high, original):
            turns = original * base / (2 * math.pi)  # full turns within the original context
            blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return (1 - blend) * base / factor + blend * base
        case other:
            assert_never(other)


def rotations(spec: Transformer, position_BT: Int[Array, "B T"]) -> Rotations:
    """The table of each distinct (Rope, head width) in the model."""
    found: Rotations = {}
    for stack in spec.stacks:
        for block in stack.pattern:
            rope, head_dim = block.attn.position, block.attn.head_dim
            if rope is not None and (rope, head_dim) not in found:
                inv = jnp.asarray(frequencies(rope, head_dim), jnp.float32)[None, None]
                angle = position_BT[..., None].astype(jnp.float32) * inv
                found[rope, head_dim] = Rotation(jnp.cos(angle), jnp.sin(angle))
    return found


def rotate(cfg: Rope, r: Rotation, x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Turn each pair (a, b) of a head by its angle: (a cos - b sin, b cos + a sin). Computed in float32."""
    width = 2 * r.cos.shape[-1]
    x, rest = x_BTNH[..., :width].astype(jnp.float32), x_BTNH[..., width:]
    cos, sin = r.cos[:, :, None], r.sin[:, :, None]
    if cfg.interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    else:
        a, b = jnp.split(x, 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    turned = turned.astype(x_BTNH.dtype)
    return turned if width == x_BTNH.shape[-1] else jnp.concatenate([turned, rest], -1)
