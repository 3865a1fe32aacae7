"""Patterns: the static half of a mask, which (query slot, key slot) pairs may meet, whatever the arrays say."""

from __future__ import annotations

from dataclasses import dataclass


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
