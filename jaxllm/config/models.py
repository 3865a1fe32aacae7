"""Blocks, stacks, heads, and the whole transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.config.attention import GQA, Attention
from jaxllm.config.ffn import FFN, Activation
from jaxllm.config.norms import Norm
from jaxllm.config.positions import Learned, Sinusoidal


@dataclass(frozen=True)
class Cross:
    """Attention to a memory of width `dim` (an encoder's output, image features), between the other two branches."""

    attn: GQA
    dim: int


@dataclass(frozen=True)
class Block:
    """One residual layer. f is attention, then cross-attention if there is one, then feed-forward.

    place "pre":       x + f(norm(x))                                (GPT-2, LLaMA)
          "post":      norm(x + f(x))                                (the original Transformer)
          "sandwich":  x + norm(f(norm(x)))                          (Gemma 2, GLM-4)
          "output":    x + norm(f(x))                                (OLMo 2)
          "normed":    norm(x) + f(norm(x))                          (BLOOM, if asked)
          "parallel":  x + attn(norm(x)) + ffn(norm'(x))             (GPT-NeoX)
          "shared":    x + attn(norm(x)) + ffn(norm(x))              (GPT-J, Phi, Cohere)

    x is multiplied by `residual_scale` (DeepNorm's alpha; not in the parallel places), what is added by `branch_scale`
    (Granite).

    `gain`: DeepNorm's beta, for its init (Wang et al. 2022, fig. 2); see `deepnorm`. `dropout` acts on branches.
    """

    attn: Attention
    ffn: FFN
    norm: Norm
    place: Literal["pre", "post", "sandwich", "output", "normed", "parallel", "shared"] = "pre"
    cross: Cross | None = None
    residual_scale: float = 1.0
    branch_scale: float = 1.0
    gain: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.cross is not None and self.place in ("parallel", "shared"):
            raise ValueError(f"Block: cross-attention needs one branch after the other, not place={self.place!r}")


def deepnorm(layers: int) -> tuple[float, float]:
    """(residual_scale, gain) of a DeepNorm decoder or encoder alone: (2 L)^(1/4), (8 L)^(-1/4) (ibid., fig. 2)."""
    return (2 * layers) ** 0.25, (8 * layers) ** -0.25


@dataclass(frozen=True)
class Stack:
    """`pattern` of blocks, repeated. Computed as a scan over repeats with a Python loop over the pattern inside.

    shared: a norm. The keys and values of all layers are made once, of what enters the stack, after this norm; layers
    have queries of their own only, and the stack one cache (YOCO's cross-decoder: Sun et al. 2024, eq. 2 and 3).
    """

    pattern: tuple[Block, ...]
    repeats: int
    shared: Norm | None = None

    def __post_init__(self) -> None:
        kinds = {block.attn for block in self.pattern}
        if self.shared is not None and (len(kinds) > 1 or not isinstance(self.pattern[0].attn, GQA)):
            raise ValueError(f"Stack: layers that share keys and values need one and the same GQA, found {kinds}")

    @property
    def layers(self) -> int:
        """Number of blocks in all."""
        return len(self.pattern) * self.repeats


@dataclass(frozen=True)
class Embedding:
    """What is done with token embeddings before the first layer, in this order.

    times `scale` (Gemma: sqrt(dim)); + a vector per position; + one of `types` vectors (BERT); `norm` (BLOOM, BERT).
    `dim`: their width when it is not the model's; a projection without bias follows (OPT-350m).
    """

    position: Learned | Sinusoidal | None = None
    scale: float | None = None
    types: int | None = None
    norm: Norm | None = None
    dim: int | None = None


@dataclass(frozen=True)
class Transform:
    """norm(act(dense(x))) before a head (BERT's MLM head; its pooler without norm)."""

    act: Activation
    norm: Norm | None = None


@dataclass(frozen=True)
class LMHead:
    """logits = transform(x) W^T * scale + bias, softcap c: c * tanh(logits / c).

    `tied` makes W the embedding. `normalised` divides its rows by their norm (Baichuan 2).
    """

    tied: bool = False
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    normalised: bool = False
    transform: Transform | None = None


@dataclass(frozen=True)
class Classifier:
    """`labels` scores of a row, or of every token with pool "tokens" (span heads have two labels, rewards one).

    pool: what is read, the "first" slot of the row, the "last" real token, the "mean" over real ones, or all "tokens".
    labels None: what was pooled is the result (BERT's pooler, sentence embeddings).
    """

    labels: int | None
    pool: Literal["first", "last", "mean", "tokens"] = "first"
    bias: bool = True
    transform: Transform | None = None


@dataclass(frozen=True)
class Transformer:
    """Stacks of blocks between an embedding and heads.

    `norm` is the final one. `context` is the longest sequence it was made for. `head` gives the logits; None: hidden
    states are all there is (an encoder). `classifiers`: named heads beside it (BERT's next-sentence head, a reward).
    """

    vocab: int
    dim: int
    stacks: tuple[Stack, ...]
    norm: Norm | None
    context: int
    embed: Embedding = Embedding()
    head: LMHead | None = LMHead()
    causal: bool = True
    classifiers: tuple[tuple[str, Classifier], ...] = ()
    name: str = field(default="transformer", compare=False)

    @property
    def layers(self) -> int:
        """Number of blocks in all stacks."""
        return sum(stack.layers for stack in self.stacks)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.head is not None and self.head.tied


def decoder(*blocks: Block, layers: int) -> tuple[Stack, ...]:
    """The usual single stack: `blocks` repeated to `layers` in all.

    Raises ValueError when `layers` is not a multiple of the pattern's length.
    """
    if layers % len(blocks):
        raise ValueError(
            f"layers={layers} must be a multiple of the pattern's {len(blocks)} blocks; add a second Stack"
        )
    return (Stack(blocks, layers // len(blocks)),)
