"""Norms: which statistics an activation is divided by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) * w (Zhang & Sennrich 2019, eq. 4). With `unit_offset` the factor is 1 + w (Gemma)."""

    eps: float = 1e-5
    unit_offset: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / std * w + b (Ba et al. 2016, eq. 4); without w and b when not `scale` (OLMo 1)."""

    eps: float = 1e-5
    bias: bool = True
    scale: bool = True

    def __post_init__(self) -> None:
        if self.bias and not self.scale:
            raise ValueError("LayerNorm: bias=True needs scale=True; without weights set both to False")


Norm = RMSNorm | LayerNorm
