"""The model spec: *what* the function is, never how it is computed.

Every type is a small frozen dataclass, hashable, and free of jax, so that a spec can be a static argument of
`jax.jit`, a dictionary key, or a JSON file. Variants form sum types (`Norm = RMSNorm | LayerNorm`) told apart by one
`match` in the room that owns the verb. Absence is `None`.

Dimension key, used in every array name and einsum of the project:

    B batch     T query length   S key length   D model width   N query heads   K kv heads   G = N / K
    H head width   F feed-forward width   V vocabulary   R low rank   L stacked layers   E experts   C capacity
    P pages
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# ---------------------------------------------------------------------------------------------------------- norms


@dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) * w (Zhang & Sennrich 2019, eq. 4). With `unit_offset` the factor is 1 + w (Gemma)."""

    eps: float = 1e-5
    unit_offset: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / std * w + b (Ba et al. 2016, eq. 4)."""

    eps: float = 1e-5
    bias: bool = True


Norm = RMSNorm | LayerNorm

# ------------------------------------------------------------------------------------------------------ positions


@dataclass(frozen=True)
class Linear:
    """Position interpolation: positions are divided by `factor` (Chen et al. 2023, eq. 4)."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1 frequencies: long wavelengths divided by `factor`, short ones kept, a linear blend between.

    Bounds are `original / low` and `original / high` in tokens of wavelength (Llama 3 reference code, `apply_scaling`).
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


Scaling = Linear | Llama3


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, eq. 34), half-split layout: pairs (i, i + H/2), as HF checkpoints.

    `fraction` < 1 rotates only the first part of each head; `interleaved` pairs (2i, 2i + 1) instead.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: Scaling | None = None


@dataclass(frozen=True)
class Learned:
    """A learned vector per position, added to the embedding (GPT-2). `length` rows; position p reads row p + offset."""

    length: int
    offset: int = 0


# ------------------------------------------------------------------------------------------------------- patterns
# A pattern is the static half of the mask: which (query slot, key slot) pairs may meet, whatever the arrays say.


@dataclass(frozen=True)
class _Algebra:
    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other)  # type: ignore[arg-type]

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Full(_Algebra):
    """Every key."""


@dataclass(frozen=True)
class Causal(_Algebra):
    """Keys at or before the query: k <= q."""


@dataclass(frozen=True)
class Local(_Algebra):
    """A sliding window: |q - k| < window. With `Causal`, the last `window` tokens including the query's own."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"Local: window={self.window} must be at least 1; leave the pattern Full() for no window")


@dataclass(frozen=True)
class And(_Algebra):
    """Pairs that both patterns allow."""

    left: Pattern
    right: Pattern


@dataclass(frozen=True)
class Or(_Algebra):
    """Pairs that either pattern allows."""

    left: Pattern
    right: Pattern


Pattern = Full | Causal | Local | And | Or

# ------------------------------------------------------------------------------------------------- attention, ffn


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention (Ainslie et al. 2023). MHA is kv_heads = heads, MQA is kv_heads = 1.

    scores = (q · k) * scale, scale = head_dim**-0.5 when None; with `softcap` c: c * tanh(scores / c) (Gemma 2).
    """

    heads: int
    kv_heads: int
    head_dim: int
    position: Rope | None = None
    pattern: Pattern = Full()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    softcap: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"GQA: heads={self.heads} must be a multiple of kv_heads={self.kv_heads}; "
                f"for multi-head attention set kv_heads={self.heads}"
            )
        if self.position is not None and self.head_dim * self.position.fraction % 2:
            raise ValueError(
                f"GQA: the rotated width head_dim * fraction = {self.head_dim * self.position.fraction} must be even; "
                "RoPE turns pairs"
            )


Attention = GQA  # grows: MLA, Longformer ...

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2"]


@dataclass(frozen=True)
class MLP:
    """down(act(up(x)))."""

    hidden: int
    act: Activation = "gelu"
    bias: bool = False


@dataclass(frozen=True)
class GLU:
    """down(act(gate(x)) * up(x)) (Shazeer 2020): SwiGLU with silu, GeGLU with gelu."""

    hidden: int
    act: Activation = "silu"
    bias: bool = False


FFN = MLP | GLU

# ------------------------------------------------------------------------------------------------- blocks, models


@dataclass(frozen=True)
class Block:
    """One residual layer.

    place "pre":      x + f(norm(x))                     (GPT-2, LLaMA)
          "post":     norm(x + f(x))                     (the original Transformer)
          "sandwich": x + norm(f(norm(x)))               (Gemma 2)
    """

    attn: Attention
    ffn: FFN
    norm: Norm
    place: Literal["pre", "post", "sandwich"] = "pre"


@dataclass(frozen=True)
class Stack:
    """`pattern` of blocks, repeated. Computed as a scan over repeats with a Python loop over the pattern inside."""

    pattern: tuple[Block, ...]
    repeats: int

    @property
    def layers(self) -> int:
        """Number of blocks in all."""
        return len(self.pattern) * self.repeats


@dataclass(frozen=True)
class Transformer:
    """A stack of blocks between an embedding and a head.

    `norm` is the final one. `embed_scale` multiplies token embeddings (Gemma: sqrt(dim)). `tied` makes the head the
    embedding's transpose. `logit_softcap` c: c * tanh(logits / c). `context` is the longest sequence it was made for.
    """

    vocab: int
    dim: int
    stacks: tuple[Stack, ...]
    norm: Norm | None
    context: int
    embed_position: Learned | None = None
    embed_scale: float | None = None
    causal: bool = True
    tied: bool = False
    head_bias: bool = False
    logit_softcap: float | None = None
    name: str = field(default="transformer", compare=False)

    @property
    def layers(self) -> int:
        """Number of blocks in all stacks."""
        return sum(stack.layers for stack in self.stacks)


def decoder(*blocks: Block, layers: int) -> tuple[Stack, ...]:
    """The usual single stack: `blocks` repeated to `layers` in all.

    Raises ValueError when `layers` is not a multiple of the pattern's length.
    """
    if layers % len(blocks):
        raise ValueError(
            f"layers={layers} must be a multiple of the pattern's {len(blocks)} blocks; add a second Stack"
        )
    return (Stack(blocks, layers // len(blocks)),)
