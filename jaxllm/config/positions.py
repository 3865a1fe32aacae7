"""Positions: rotary, and what is added to scores or to embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Linear:
    """Position interpolation: positions are divided by `factor` (Chen et al. 2023, eq. 4)."""

    factor: float


@dataclass(frozen=True)
class NTK:
    """NTK-aware interpolation: theta becomes theta * factor^(w / (w - 2)), w the rotated width (bloc97 2023)."""

    factor: float


@dataclass(frozen=True)
class DynamicNTK:
    """NTK-aware interpolation by the row's length n: theta * ((factor n / original) - (factor - 1))^(w / (w - 2)).

    Only for n > original. Frequencies change as a text grows, so cached keys keep those of their own time: cached
    decoding past `original` is not the full forward, in the reference either.
    """

    factor: float
    original: int


@dataclass(frozen=True)
class Yarn:
    """NTK-by-parts with an attention temperature (Peng et al. 2023, eq. 17-22).

    Pairs that turn more than `fast` times within `original` tokens are kept, less than `slow` times divided by
    `factor`, a linear ramp over the pair's index between. cos and sin are multiplied by `temperature`, 0.1 ln(factor)
    + 1 when None. `truncate` rounds the ramp's ends to whole pairs.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    temperature: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1 frequencies: long wavelengths divided by `factor`, short ones kept, a linear blend between.

    Bounds are `original / low` and `original / high` in tokens of wavelength (Llama 3 reference code, `apply_scaling`).
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


@dataclass(frozen=True)
class LongRope:
    """A divisor per rotated pair (Ding et al. 2024): `long` for rows longer than `original`, `short` for the others.

    cos and sin are multiplied by `temperature`. As with `DynamicNTK`, cached keys keep the divisors of their own time.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    temperature: float = 1.0


Scaling = Linear | NTK | DynamicNTK | Yarn | Llama3 | LongRope


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, eq. 34), half-split layout: pairs (i, i + H/2), as HF checkpoints.

    `fraction` < 1 rotates only the first part of each head; `interleaved` pairs (2i, 2i + 1) instead. `sections`
    (M-RoPE, Wang et al. 2024): the pairs in order are shared out among the axes of a position, so many to each; with
    `restart` each axis has frequencies of its own, from the highest on (2-D rotation of vision towers).
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: Scaling | None = None
    sections: tuple[int, ...] | None = None
    restart: bool = False

    def width(self, head_dim: int) -> int:
        """How many of a head's dimensions are rotated: head_dim * fraction rounded down, as the reference."""
        return math.floor(head_dim * self.fraction + 1e-6)


@dataclass(frozen=True)
class Alibi:
    """slope_n * (k - q) is added to the scores of head n (Press et al. 2022), slopes 2^(-max_bias i / N).

    When the number of heads is no power of two, `order` says how the slopes of the next power fill up: "appended"
    (BLOOM: the odd ones of the next power come last) or "alternated" (MPT: of the next power, first the odd, then the
    even ones). `scale` multiplies slopes (Falcon: the scores' own scale). `rounded`: slope * k is rounded to bfloat16.
    """

    max_bias: float = 8.0
    order: Literal["appended", "alternated"] = "appended"
    scale: float = 1.0
    rounded: bool = False


@dataclass(frozen=True)
class RelativeBias:
    """A learned score per head and bucket of distance, shared by all layers (T5, Raffel et al. 2020, §2.1).

    Half of the buckets are exact distances, the others grow logarithmically up to `furthest`. Without `causal` half of
    all are for keys after the query.
    """

    buckets: int = 32
    furthest: int = 128
    causal: bool = False


Position = Rope | Alibi | RelativeBias


@dataclass(frozen=True)
class Learned:
    """A learned vector per position, added to the embedding (GPT-2); p reads row p + offset of length + offset.

    by "slot": p is the place in the row, padding counted (BERT), so that padding on the left moves a text.
    `padding`: the id that is not counted, whatever the attention mask says (RoBERTa); it has position -1.
    """

    length: int
    offset: int = 0
    by: Literal["position", "slot"] = "position"
    padding: int | None = None


@dataclass(frozen=True)
class Sinusoidal:
    """sin and cos of position / 10000^(2i / D), in two halves, added to the embedding (Vaswani et al. 2017, §3.5)."""

    length: int
    interleaved: bool = False
