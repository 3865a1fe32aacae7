"""Sparse patterns one by one: which pairs they allow, and the kind of a block of pairs by arithmetic on its bounds.

`pattern.py` combines them. A block's kind is exact but for `Fixed`, where MIXED may stand for FULL.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import Any, assert_never

import numpy as np
from jaxtyping import Int

from jaxllm import config

Slots = Any  # an int, a numpy or a jax integer array; operands broadcast against each other
Sparse = config.Dilated | config.Strided | config.Fixed | config.Blocks | config.RandomBlocks


class Kind(IntEnum):
    """What a block of slots holds; the order is the truth order of the logic."""

    EMPTY = 0
    MIXED = 1
    FULL = 2


def kind(some: Any, every: Any) -> Any:
    """Kind of blocks of which some pairs, or all, may meet."""
    return np.asarray(some, np.int32) + np.asarray(every, np.int32)


def allowed(pattern: Sparse, q_slot: Slots, k_slot: Slots) -> Any:
    """Whether each query slot may see each key slot; as `jaxllm.kernels.pattern.allowed`."""
    match pattern:
        case config.Dilated(window, step):
            distance = q_slot - k_slot
            return (distance < window * step) & (distance > -window * step) & (distance % step == 0)
        case config.Strided(stride, size):
            distance = q_slot // size - k_slot // size
            return (distance < stride) & (distance > -stride) | (distance % stride == 0)
        case config.Fixed(stride, summary):
            return (q_slot // stride == k_slot // stride) | (k_slot % stride >= stride - summary)
        case config.Blocks(size, around):
            distance = q_slot // size - k_slot // size
            return (distance <= around) & (distance >= -around)
        case config.RandomBlocks():
            return _drawn(pattern, q_slot // pattern.size, k_slot // pattern.size) & (q_slot < pattern.length)
        case other:
            assert_never(other)


def block_kind(pattern: Sparse, queries: tuple[Any, Any], keys: tuple[Any, Any]) -> Any:
    """Kind of the blocks of queries [low, high) and keys [low, high); as `jaxllm.kernels.pattern.block_kind`."""
    (q_lo, q_hi), (k_lo, k_hi) = queries, keys
    nearest, furthest = q_lo - (k_hi - 1), (q_hi - 1) - k_lo
    match pattern:
        case config.Dilated(window, step):
            last = window * step - 1
            some = _multiples(np.maximum(nearest, -last), np.minimum(furthest, last), step) > 0
            return kind(some, some & ((nearest == furthest) | (step == 1)) & (furthest <= last) & (nearest >= -last))
        case config.Strided(stride, size):
            nearest, furthest = q_lo // size - (k_hi - 1) // size, (q_hi - 1) // size - k_lo // size
            some = (nearest < stride) & (furthest > -stride) | (_multiples(nearest, furthest, stride) > 0)
            inside = (furthest <= stride) & (nearest >= -stride)
            return kind(some, inside | some & ((nearest == furthest) | (stride == 1)))
        case config.Fixed(stride, summary):
            shared = (q_lo // stride <= (k_hi - 1) // stride) & (k_lo // stride <= (q_hi - 1) // stride)
            single = (q_lo // stride == (k_hi - 1) // stride) & (k_lo // stride == (q_hi - 1) // stride)
            summaries = _summaries(k_hi, stride, summary) - _summaries(k_lo, stride, summary)
            return kind(shared | (summaries > 0), single | (summaries == k_hi - k_lo))
        case config.Blocks(size, around):
            low, high = q_lo // size - (k_hi - 1) // size, (q_hi - 1) // size - k_lo // size
            return kind((low <= around) & (high >= -around), (high <= around) & (low >= -around))
        case config.RandomBlocks():
            return _drawn_kind(pattern, q_lo, q_hi, k_lo, k_hi)
        case other:
            assert_never(other)


def _multiples(low: Any, high: Any, step: int) -> Any:
    """How many multiples of `step` lie in low .. high."""
    return np.maximum(high // step - (low - 1) // step, 0)


def _summaries(end: Any, stride: int, summary: int) -> Any:
    """How many slots below `end` are among the last `summary` of their block."""
    return end // stride * summary + np.maximum(end % stride - (stride - summary), 0)


_PRIME = 32_749  # squares fit int32; cubing is a permutation of the residues, since 3 does not divide _PRIME - 1


def _drawn(cfg: config.RandomBlocks, q_block: Slots, k_block: Slots) -> Any:
    """Whether a key block is among those drawn for a query block. Small int32 arithmetic, so that kernels can do it."""
    blocks = -(-cfg.length // cfg.size)
    found: Any = (q_block < 0) & (k_block < 0)
    for draw in range(cfg.count):
        x = (q_block * 7_919 + (draw * 4_801 + cfg.seed * 6_271 + 1) % _PRIME) % _PRIME
        for salt in (1_237, 20_011):
            x = ((x * x % _PRIME) * x + salt) % _PRIME
        found = found | (x % blocks == k_block)
    return found


@lru_cache(maxsize=16)
def _drawn_sums(cfg: config.RandomBlocks) -> Int[np.ndarray, "n n"]:
    """How many of the blocks before (i, j) are drawn."""
    at = np.arange(-(-cfg.length // cfg.size))
    return np.pad(_drawn(cfg, at[:, None], at[None]).astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))


def _drawn_kind(cfg: config.RandomBlocks, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
    """By sums over a rectangle of blocks; nothing is drawn at or past the length."""
    sums = _drawn_sums(cfg)
    top, bottom, left, right = (
        np.minimum(edge, len(sums) - 1)
        for edge in (q_lo // cfg.size, -(-q_hi // cfg.size), k_lo // cfg.size, -(-k_hi // cfg.size))
    )
    count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    area = (-(-q_hi // cfg.size) - q_lo // cfg.size) * (-(-k_hi // cfg.size) - k_lo // cfg.size)
    return kind((count > 0) & (q_lo < cfg.length), (count == area) & (q_hi <= cfg.length))
