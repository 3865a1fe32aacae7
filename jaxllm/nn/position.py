"""Positions: rotary inside attention, biases on scores, vectors added to embeddings.

What layers share (the cos/sin table of each `Rope`, the learned table of a `RelativeBias`) is made once per forward,
outside the layer scan: `tables`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, assert_never

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxllm.config import (
    GQA,
    MLA,
    NTK,
    Alibi,
    Attention,
    DynamicNTK,
    Linear,
    Llama3,
    LongRope,
    RelativeBias,
    Rope,
    Sinusoidal,
    Stack,
    Yarn,
)
from jaxllm.params import Normal, Param, ParamTree

# ----------------------------------------------------------------------------------------------------------- rotary


@struct.dataclass
class Rotation:
    """cos and sin of every angle: float32 [B, T, rotated width / 2], times the scaling's temperature."""

    cos: Float[Array, "B T h"]
    sin: Float[Array, "B T h"]


def frequencies(cfg: Rope, head_dim: int) -> Float[np.ndarray, " h"]:
    """Angle per token of each rotated pair, float64: theta^(-2i / width) (Su et al. 2021, §3.2.2), then scaled.

    Of the scalings that depend on the row's length (`DynamicNTK`, `LongRope`) those of a short row.
    """
    width = cfg.width(head_dim)
    if cfg.restart:
        return np.concatenate([_base(cfg.theta, 2 * pairs) for pairs in _sections(cfg)])
    base = _base(cfg.theta, width)
    match cfg.scaling:
        case None | DynamicNTK():
            return base
        case Linear(factor):
            return base / factor
        case NTK(factor):
            return _base(_raised(cfg.theta, factor, width), width)
        case Llama3(factor, low, high, original):
            turns = original * base / (2 * math.pi)  # full turns within the original context
            blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return (1 - blend) * base / factor + blend * base
        case Yarn() as yarn:
            kept = _yarn_kept(yarn, cfg.theta, width)
            return (1 - kept) * base / yarn.factor + kept * base
        case LongRope(short=short):
            return base / _divisors(short, width)
        case other:
            assert_never(other)


def _sections(cfg: Rope) -> tuple[int, ...]:
    if cfg.sections is None or cfg.scaling is not None:
        raise ValueError(f"Rope: restart=True needs sections and no scaling, found {cfg}")
    return cfg.sections


def _base(theta: float, width: int) -> Float[np.ndarray, " h"]:
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def _raised(theta: Any, factor: Any, width: int) -> Any:
    """theta * factor^(w / (w - 2)): the lowest frequency is divided by `factor`, the highest is kept."""
    if width < 4:
        raise ValueError(f"NTK scaling: needs a rotated width of at least 4, found {width}; use Linear")
    return theta * factor ** (width / (width - 2))


def _yarn_kept(yarn: Yarn, theta: float, width: int) -> Float[np.ndarray, " h"]:
    """How much of each pair's own frequency is kept: 1 up to the pair that turns `fast` times, 0 from `slow` on."""

    def pair(turns: float) -> float:
        return width * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(yarn.fast), pair(yarn.slow)
    low, high = (math.floor(low), math.ceil(high)) if yarn.truncate else (low, high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    return 1 - np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)


def _divisors(listed: tuple[float, ...], width: int) -> Float[np.ndarray, " h"]:
    if len(listed) != width // 2:
        raise ValueError(f"LongRope: needs {width // 2} divisors, one per rotated pair, found {len(listed)}")
    return np.asarray(listed, np.float64)


def temperature(cfg: Rope) -> float:
    """What cos and sin are multiplied by."""
    match cfg.scaling:
        case Yarn(factor=factor, temperature=None):
            return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
        case Yarn(temperature=float(given)) | LongRope(temperature=given):
            return given
        case _:
            return 1.0


def _frequencies_at(cfg: Rope, head_dim: int, length: Int[Array, ""]) -> Float[Array, " h"]:
    """Frequencies for a batch whose longest row has `length` tokens, float32."""
    short = jnp.asarray(frequencies(cfg, head_dim), jnp.float32)
    width = cfg.width(head_dim)
    match cfg.scaling:
        case DynamicNTK(factor, original):
            stretch = factor * jnp.maximum(length, original) / original - (factor - 1)
            theta = _raised(cfg.theta, stretch, width)
            return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        case LongRope(long=long, original=original):
            far = jnp.asarray(_base(cfg.theta, width) / _divisors(long, width), jnp.float32)
            return jnp.where(length > original, far, short)
        case _:
            return short


def rotation(cfg: Rope, head_dim: int, position: Int[Array, "... B T"]) -> Rotation:
    """The table of one Rope. position: [B, T], or [axes, B, T] for `sections` (text alone may give [B, T] as well).

    Scalings that depend on the length go by the longest row of the batch, as the reference implementation does.
    """
    axes = position if position.ndim == 3 else position[None]
    inv = _frequencies_at(cfg, head_dim, axes.max() + 1)
    angle = axes[..., None].astype(jnp.float32) * inv[None, None, None]
    if cfg.sections is None or len(angle) == 1:
        angle = angle[0]
    else:
        owner = np.repeat(np.arange(len(cfg.sections)), cfg.sections)
        angle = jnp.stack([angle[axis, ..., i] for i, axis in enumerate(owner)], -1)
    warm = temperature(cfg)
    return Rotation(jnp.cos(angle) * warm, jnp.sin(angle) * warm)


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


# ----------------------------------------------------------------------------------------------------- score biases


def alibi_slopes(cfg: Alibi, heads: int) -> Float[np.ndarray, " N"]:
    """Slope of each head, float32: 2^(-max_bias i / N) for i = 1 .. N (Press et al. 2022, §3)."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-cfg.max_bias * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(heads))
    if below == heads:
        slopes = geometric(heads)
    else:
        above = geometric(2 * below)
        odd, even = above[1::2], above[0::2]
        match cfg.order:
            case "appended":
                slopes = geometric(below) + even[: heads - below]
            case "alternated":
                slopes = (odd + even)[:heads]
            case other:
                assert_never(other)
    return np.asarray(slopes, np.float32)


# ------------------------------------------------------------------------------------------------------- embeddings


def sinusoid(cfg: Sinusoidal, dim: int) -> Float[np.ndarray, "P D"]:
    """The table: sin(p / 10000^(2i / D)) and cos, in two halves or interleaved. float32."""
    angle = np.arange(cfg.length)[:, None] / 10_000.0 ** (2 * np.arange((dim + 1) // 2) / dim)[None]
    sin, cos = np.sin(angle), np.cos(angle)
    table = np.stack([sin, cos], -1).reshape(cfg.length, -1) if cfg.interleaved else np.concatenate([sin, cos], -1)
    return table[:, :dim].astype(np.float32)


# ------------------------------------------------------------------------------------------------ what layers share


@struct.dataclass
class Tables:
    """rotations: by (Rope, head width).  bias_RN: a RelativeBias's learned scores [buckets, N]."""

    rotations: dict[Any, Rotation] = struct.field(default_factory=dict)
    bias_RN: Float[Array, "R N"] | None = None


def _attentions(stacks: tuple[Stack, ...]) -> Iterator[Attention]:
    return (block.attn for stack in stacks for block in stack.pattern)


def by_length(stacks: tuple[Stack, ...]) -> list[DynamicNTK | LongRope]:
    """Scalings of these stacks that depend on the length of the longest row."""
    positions = [attn.position for attn in _attentions(stacks) if isinstance(attn, GQA | MLA)]
    scalings = [position.scaling for position in positions if isinstance(position, Rope)]
    return [scaling for scaling in scalings if isinstance(scaling, DynamicNTK | LongRope)]


def relative_bias(stacks: tuple[Stack, ...]) -> tuple[RelativeBias, int] | None:
    """The RelativeBias of these stacks and its number of heads. Raises ValueError when layers have different ones."""
    found = {(a.position, a.heads) for a in _attentions(stacks) if isinstance(a.position, RelativeBias)}
    if len(found) > 1:
        raise ValueError(f"RelativeBias: all layers share one table, found {sorted(map(str, found))}; make them equal")
    return next(iter(found), None)  # type: ignore[arg-type]


def relative_bias_params(stacks: tuple[Stack, ...]) -> ParamTree:
    """kernel [buckets, N] when layers have a RelativeBias; nothing otherwise."""
    found = relative_bias(stacks)
    if found is None:
        return {}
    return {"relative_bias": {"table": Param((found[0].buckets, found[1]), ("buckets", "heads"), Normal(0.02))}}


def tables(params: Any, stacks: tuple[Stack, ...], position: Int[Array, "... B T"]) -> Tables:
    """What the layers of `stacks` share at these positions. params: those of the level that owns the stacks."""
    wanted: dict[tuple[Rope, int], None] = {}
    for attn in _attentions(stacks):
        match attn:
            case GQA(position=Rope() as rope, head_dim=width) | MLA(position=rope, rope_dim=width):
                wanted[rope, width] = None
            case _:
                pass
    found = {key: rotation(*key, position) for key in wanted}
    learned = params["relative_bias"]["table"] if relative_bias(stacks) is not None else None
    return Tables(found, learned)
