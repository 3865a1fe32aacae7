"""Attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxllm.config.norms import Norm
from jaxllm.config.patterns import Full, Local, Pattern
from jaxllm.config.positions import Position, Rope


@dataclass(frozen=True)
class QKNorm:
    """A norm of queries and keys before the rotation, each with its own weights.

    over "head": one [H] for all heads (Qwen3, Gemma 3);  "each": [N, H], own weights per head (Cohere, StableLM);
         "all":  the whole projected width [N * H] (OLMo 2).
    """

    norm: Norm
    over: Literal["head", "each", "all"] = "head"


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention (Ainslie et al. 2023). MHA is kv_heads = heads, MQA is kv_heads = 1.

    scores = (q · k) * scale, scale = head_dim**-0.5 when None; with `softcap` c: c * tanh(scores / c) (Gemma 2).
    `sinks`: a learned logit per head joins the softmax without a value (GPT-OSS). `clip` c: q, k and v are cut to
    [-c, c] after their projection and norm (MPT, OLMoE). `windowed`: tokens meet within their window
    (`inputs.window_BT`), not within their segment (Qwen2.5-VL's tower).
    """

    heads: int
    kv_heads: int
    head_dim: int
    position: Position | None = None
    pattern: Pattern = Full()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    clip: float | None = None
    windowed: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"GQA: heads={self.heads} must be a multiple of kv_heads={self.kv_heads}; "
                f"for multi-head attention set kv_heads={self.heads}"
            )
        _check_rotated(self.position, self.head_dim)


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-AI 2024, §2.1): keys and values are projections of one latent per token.

    The latent has width `kv_rank` and is normalised; beside it stands one rotated key of width `rope_dim` shared by all
    heads. A head's query and key are [nope_dim | rope_dim] wide, its value `value_dim`. `q_rank`: queries go through a
    normalised latent as well. Caches hold kv_rank + rope_dim numbers per token; a decode step stays in the latent
    ("absorbed"). scale = (nope_dim + rope_dim)**-0.5 when None.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    position: Rope
    norm: Norm
    pattern: Pattern = Full()
    bias: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        _check_rotated(self.position, self.rope_dim)


@dataclass(frozen=True)
class Longformer:
    """Windowed attention with global tokens chosen per input (Beltagy et al. 2020, §3.1): for encoders.

    A token sees those at most `reach` away, and all global ones. A global token sees everything, through queries, keys
    and values of its own (`q_global` ...). Heads are not grouped; all projections have biases.
    """

    heads: int
    head_dim: int
    reach: int

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise ValueError(f"Longformer: reach={self.reach} must be at least 1, half of the published window")

    @property
    def pattern(self) -> Pattern:
        """What tokens see that are not global."""
        return Local(self.reach + 1)

    @property
    def position(self) -> None:
        """Positions stand in the embedding."""
        return None


def _check_rotated(position: Position | None, width: int) -> None:
    if isinstance(position, Rope) and position.width(width) not in range(2, width + 1, 2):
        raise ValueError(
            f"Rope: the rotated width {width} * {position.fraction} = {position.width(width)} must be even, and in "
            f"2..{width}; RoPE turns pairs"
        )


Attention = GQA | MLA | Longformer
