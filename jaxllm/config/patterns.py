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
class Dilated(_Algebra):
    """A window with gaps: distances that are multiples of `step`, fewer than `window` on a side (Longformer)."""

    window: int
    step: int

    def __post_init__(self) -> None:
        _positive(self, self.window, self.step)


@dataclass(frozen=True)
class Strided(_Algebra):
    """Distances below `stride`, and its multiples (Sparse Transformer, Child et al. 2019, §4.2; there with Causal).

    Counted in blocks of `size` slots, as the paper's kernels do: single columns would not spare a matrix unit anything.
    """

    stride: int
    size: int = 1

    def __post_init__(self) -> None:
        _positive(self, self.stride, self.size)


@dataclass(frozen=True)
class Fixed(_Algebra):
    """The query's own block of `stride` slots, the last `summary` slots of every block (Child et al. 2019, §4.2)."""

    stride: int
    summary: int

    def __post_init__(self) -> None:
        _positive(self, self.stride, self.summary)
        if self.summary > self.stride:
            raise ValueError(f"Fixed: summary={self.summary} must be at most stride={self.stride}")


@dataclass(frozen=True)
class Blocks(_Algebra):
    """Slots in blocks of `size`: those of the query's own block and of `around` blocks on either side."""

    size: int
    around: int = 0

    def __post_init__(self) -> None:
        _positive(self, self.size)


@dataclass(frozen=True)
class RandomBlocks(_Algebra):
    """Of a row of `length` slots in blocks of `size`, `count` key blocks drawn for each query block (BigBird).

    Draws are a hash of the block's number and `seed`: the same on every device. They may coincide.
    """

    size: int
    count: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, self.size, self.count, self.length)


@dataclass(frozen=True)
class Rows(_Algebra):
    """Queries start <= q < stop see every key."""

    start: int
    stop: int


@dataclass(frozen=True)
class Columns(_Algebra):
    """Keys start <= k < stop are seen by every query."""

    start: int
    stop: int


@dataclass(frozen=True)
class GlobalTokens(_Algebra):
    """The first `count` slots see every key and are seen by every query."""

    count: int

    def __post_init__(self) -> None:
        _positive(self, self.count)


@dataclass(frozen=True)
class BigBird(_Algebra):
    """BigBird (Zaheer et al. 2020, §2), which depends on the row's length n (`jaxllm.kernels.bigbird.at_length`).

    In blocks of `block` slots: the first and the last block see and are seen everywhere, every other one sees its
    neighbours and `random` blocks. Rows of at most (5 + 2 random) blocks are seen whole.
    seed None: as the published implementation does when it does not train, the first block stands in for all random
    ones, so that its keys count 1 + random times for the queries between the first and the last block.
    """

    block: int
    random: int
    seed: int | None = None

    def __post_init__(self) -> None:
        _positive(self, self.block)

    def whole(self, length: int) -> bool:
        """Whether a row of `length` slots is too short for the pattern."""
        return length <= (5 + 2 * self.random) * self.block

    def copies(self, length: int) -> int:
        """How many keys count once more, of the first block again and again."""
        return 0 if self.whole(length) or self.seed is not None else self.random * self.block


def _positive(pattern: object, *values: int) -> None:
    if min(values) < 1:
        raise ValueError(f"{pattern}: every number must be at least 1")


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


@dataclass(frozen=True)
class Later(_Algebra):
    """`pattern` for queries that stand `by` slots further on than their numbers say (a part of a longer row)."""

    pattern: Pattern
    by: int


Pattern = (
    Full
    | Causal
    | Local
    | Dilated
    | Strided
    | Fixed
    | Blocks
    | RandomBlocks
    | Rows
    | Columns
    | GlobalTokens
    | BigBird
    | And
    | Or
    | Later
)
