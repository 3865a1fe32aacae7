"""`batch_at(mixture, step)`: the global batch of any step, in closed form.

Nothing is shuffled in memory and no iterator has state. Sample s of the run (counted over all steps) goes to a source
by a fixed, evenly spread pattern of the weights; draw m of a source is row `permute(m % rows)` of its epoch
`m // rows`, by a keyed permutation of 0..rows-1 that is computed, not stored. So resuming, replaying a step, and
changing the number of hosts or devices give the same rows, bitwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from jaxtyping import Int, UInt

from jaxllm.data.source import Source, empty_batch
from jaxllm.records import Batch

_PERIOD = 1 << 14  # longest pattern of a mixture, and so the resolution of weights that are no small fractions
_ROUNDS = 8


@dataclass(frozen=True)
class Stage:
    """From optimiser step `start` on: batches of `batch` rows, drawn from the sources by `weights` (any scale).

    A batch-size ramp or a schedule of weights is several stages.
    """

    start: int
    batch: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """Sources, stages in order of start, and the seed of every shuffle.

    All sources have one context length. `channels` is the union of theirs, sorted, and what `channel_BT` counts.
    """

    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources or len({source.context for source in self.sources}) != 1:
            raise ValueError(
                f"Mixture: needs sources of one context, got {[s.context for s in self.sources]}; pack them alike"
            )
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"Mixture: stages must start at 0 and then later and later, got {starts}")
        for stage in self.stages:
            _check_stage(stage, len(self.sources))

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Names that `channel_BT` counts."""
        return tuple(sorted({name for source in self.sources for name in source.channels}))

    @property
    def context(self) -> int:
        """Tokens per row."""
        return self.sources[0].context

    @cached_property
    def _aligned(self) -> tuple[Source, ...]:
        return tuple(source.with_channels(self.channels) for source in self.sources)

    @cached_property
    def _patterns(self) -> tuple[_Pattern, ...]:
        return tuple(_pattern(stage.weights) for stage in self.stages)

    @cached_property
    def _drawn(self) -> tuple[Int[np.ndarray, " sources"], ...]:
        """Draws from each source before each stage."""
        drawn = [np.zeros(len(self.sources), np.int64)]
        for stage, following, pattern in zip(self.stages, self.stages[1:], self._patterns, strict=False):
            drawn.append(drawn[-1] + pattern.counts((following.start - stage.start) * stage.batch))
        return tuple(drawn)

    def stage_index(self, step: int) -> int:
        """The stage that `step` (from 0) belongs to."""
        if step < 0:
            raise ValueError(f"Mixture: step={step} must be at least 0")
        return max(i for i, stage in enumerate(self.stages) if stage.start <= step)

    def batch_size(self, step: int) -> int:
        """Rows of the global batch of `step`."""
        return self.stages[self.stage_index(step)].batch


def single(source: Source, batch: int, seed: int = 0) -> Mixture:
    """The mixture of one source with one batch size."""
    return Mixture((source,), (Stage(0, batch, (1.0,)),), seed)


def rows_at(mixture: Mixture, step: int) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """(source, row) of each place of the global batch of `step`, int64 [B] each. Pure."""
    i = mixture.stage_index(step)
    stage, pattern, drawn = mixture.stages[i], mixture._patterns[i], mixture._drawn[i]
    sample = (step - stage.start) * stage.batch + np.arange(stage.batch)
    source, nth = pattern.draw(sample)
    draw = drawn[source] + nth
    row = np.empty_like(draw)
    for s in np.unique(source):
        here = source == s
        row[here] = _shuffled(draw[here], mixture.sources[s].rows, mixture.seed, int(s))
    return source, row


def batch_at(mixture: Mixture, step: int, rows: slice = slice(None)) -> Batch:
    """Numpy arrays [B, T] of the global batch of `step`, or of its places `rows` (what one process needs)."""
    source, row = (ids[rows] for ids in rows_at(mixture, step))
    batch = empty_batch(len(row), mixture.context)
    for s in np.unique(source):
        here = np.flatnonzero(source == s)
        part = mixture._aligned[s].batch(row[here])
        for name in Batch.__dataclass_fields__:
            getattr(batch, name)[here] = getattr(part, name)
    return batch


def epochs_at(mixture: Mixture, step: int) -> dict[str, float]:
    """How often each source has been gone through before `step`: draws / rows, by name."""
    i = mixture.stage_index(step)
    drawn = mixture._drawn[i] + mixture._patterns[i].counts((step - mixture.stages[i].start) * mixture.stages[i].batch)
    return {source.name: float(n) / source.rows for source, n in zip(mixture.sources, drawn, strict=True)}


# ---------------------------------------------------------------------------------------------------- which source


def _check_stage(stage: Stage, sources: int) -> None:
    if stage.batch < 1:
        raise ValueError(f"Stage at step {stage.start}: batch={stage.batch} must be at least 1")
    if len(stage.weights) != sources:
        raise ValueError(
            f"Stage at step {stage.start}: {len(stage.weights)} weights for {sources} sources; give one each"
        )
    if not all(0 <= w < math.inf for w in stage.weights) or sum(stage.weights) == 0:
        raise ValueError(
            f"Stage at step {stage.start}: weights must be finite, >= 0 and not all 0, got {stage.weights}"
        )


@dataclass(frozen=True)
class _Pattern:
    """A period of source ids, repeated for ever.

    period_M: source of each place.  before_MS: draws of each source before each place [M + 1, sources].
    """

    period_M: Int[np.ndarray, " M"]
    before_MS: Int[np.ndarray, "prefixes sources"]

    def counts(self, samples: int) -> Int[np.ndarray, " sources"]:
        """Draws of each source among the first `samples`."""
        periods, rest = divmod(samples, len(self.period_M))
        return periods * self.before_MS[-1] + self.before_MS[rest]

    def draw(self, sample: Int[np.ndarray, " B"]) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """The source of each sample, and how many of that source came before it."""
        periods, rest = np.divmod(sample, len(self.period_M))
        source = self.period_M[rest]
        return source, periods * self.before_MS[-1, source] + self.before_MS[rest, source]


def _pattern(weights: Sequence[float]) -> _Pattern:
    """Spread the sources evenly: among the first n samples a source of share p has n p draws, within 1, for every n.

    Draw m of a source may come from place floor(m / p) and must come before ceil((m + 1) / p); earliest deadline first
    meets all deadlines when the shares sum to 1 (Liu & Layland 1973, theorem 7; the "quota" condition).
    """
    shares = _shares(weights)
    period, used = sum(shares), [0] * len(shares)
    place_M = np.empty(period, np.int64)
    for place in range(period):
        ready = [s for s, share in enumerate(shares) if share and used[s] * period // share <= place]
        chosen = min(ready, key=lambda s: -(-(used[s] + 1) * period // shares[s]))
        used[chosen] += 1
        place_M[place] = chosen
    hot = np.eye(len(shares), dtype=np.int64)[place_M]
    return _Pattern(place_M, np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(hot, axis=0)]))


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights`: exactly when they are small fractions, else rounded to 1 / 16384."""
    fractions = [Fraction(w).limit_denominator(10_000) for w in weights]
    exact = all(abs(float(f) - w) <= 1e-12 * max(1.0, w) for f, w in zip(fractions, weights, strict=True))
    scale = math.lcm(*(f.denominator for f in fractions))
    parts = [int(f * scale) for f in fractions]
    parts = [p // math.gcd(*parts) for p in parts] if any(parts) else parts
    if exact and sum(parts) <= _PERIOD:
        return parts
    ideal = [_PERIOD * w / sum(weights) for w in weights]
    parts = [int(x) for x in ideal]
    short = sorted(range(len(parts)), key=lambda s: parts[s] - ideal[s])[: _PERIOD - sum(parts)]
    parts = [p + (s in short) for s, p in enumerate(parts)]
    if lost := [w for w, p in zip(weights, parts, strict=True) if w > 0 and p == 0]:
        raise ValueError(f"Mixture: weights {lost} are below 1/{_PERIOD} of the whole; raise them or set them to 0")
    return parts


# ------------------------------------------------------------------------------------------------------- which row


def _shuffled(draw: Int[np.ndarray, " B"], rows: int, seed: int, source: int) -> Int[np.ndarray, " B"]:
    """Row of each draw: epoch by epoch, each in an order of its own."""
    epoch, within = np.divmod(draw, rows)
    out = np.empty_like(draw)
    for e in np.unique(epoch):
        here = epoch == e
        out[here] = permute(within[here], rows, (seed, source, int(e)))
    return out


def permute(index: Int[np.ndarray, " n"], size: int, key: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """A keyed bijection of 0..size-1, evaluated at `index`: a Feistel network, walked until it lands inside.

    The network permutes 0..4**h - 1 with 4**h < 4 * size, so a walk takes fewer than 4 steps on average
    (Black & Rogaway 2002, "cycle walking"). The same on every machine: only 64-bit integer arithmetic.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    out = _feistel(np.asarray(index).astype(np.uint64), half, keys)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: UInt[np.ndarray, " n"], half: int, keys: UInt[np.ndarray, " rounds"]) -> UInt[np.ndarray, " n"]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for round_key in keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << bits) | right


def _round_keys(key: tuple[int, ...]) -> UInt[np.ndarray, " rounds"]:
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part % (1 << 64)))
    return _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64))


def _mix(x: UInt[np.ndarray, " n"]) -> UInt[np.ndarray, " n"]:
    """The SplitMix64 finaliser (Steele et al. 2014), after its increment."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
