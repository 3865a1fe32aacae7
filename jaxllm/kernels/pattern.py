"""The static half of a mask as a three-valued logic over blocks of (query, key) slots.

A block is EMPTY (no pair may meet), FULL (every pair may) or MIXED. Ordered so, `&` of two patterns is the minimum of
their kinds and `|` the maximum (Kleene's strong logic): exact for a single pattern, conservative (MIXED when unsure)
for combinations. A new pattern is one more case in `allowed` and one in `block_kind`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, assert_never

import numpy as np
from jaxtyping import Int

from jaxllm import config
from jaxllm.kernels import sparse
from jaxllm.kernels.sparse import Kind, kind

Slots = Any  # an int, a numpy or a jax integer array; operands broadcast against each other


class Blocks(NamedTuple):
    """Blocks that are not empty, sorted by query block, then key block.

    q, k: int32 [n] block indices.  kind: int32 [n], Kind.MIXED or Kind.FULL.
    """

    q: Int[np.ndarray, " n"]
    k: Int[np.ndarray, " n"]
    kind: Int[np.ndarray, " n"]

    def only(self, kind: Kind) -> Blocks:
        """The blocks of one kind."""
        at = self.kind == kind
        return Blocks(self.q[at], self.k[at], self.kind[at])


def allowed(pattern: config.Pattern, q_slot: Slots, k_slot: Slots) -> Any:
    """Whether each query slot may see each key slot: bool, of the operands' broadcast shape (numpy or jax)."""
    match pattern:
        case config.Full():
            found = (q_slot >= k_slot) | True
        case config.Causal():
            found = q_slot >= k_slot
        case config.Local(window):
            found = abs(q_slot - k_slot) < window
        case config.Dilated() | config.Strided() | config.Fixed() | config.Blocks() | config.RandomBlocks():
            found = sparse.allowed(pattern, q_slot, k_slot)
        case config.Rows(start, stop):
            found = (q_slot >= start) & (q_slot < stop) & (k_slot >= 0)
        case config.Columns(start, stop):
            found = (k_slot >= start) & (k_slot < stop) & (q_slot >= 0)
        case config.GlobalTokens(count):
            found = (q_slot < count) | (k_slot < count)
        case config.BigBird():
            raise ValueError(f"{pattern} depends on the row's length; take kernels.bigbird.at_length(pattern, length)")
        case config.And(left, right):
            found = allowed(left, q_slot, k_slot) & allowed(right, q_slot, k_slot)
        case config.Or(left, right):
            found = allowed(left, q_slot, k_slot) | allowed(right, q_slot, k_slot)
        case config.Later(pattern, by):
            found = allowed(pattern, q_slot + by, k_slot)
        case other:
            assert_never(other)
    return found


def block_kind(pattern: config.Pattern, q_lo: Slots, q_hi: Slots, k_lo: Slots, k_hi: Slots) -> Any:
    """Kind of the blocks of queries [q_lo, q_hi) and keys [k_lo, k_hi), by interval arithmetic on slots.

    Bounds are ints or numpy arrays that broadcast; intervals must not be empty. Returns int arrays of `Kind` values.
    """
    nearest, furthest = q_lo - (k_hi - 1), (q_hi - 1) - k_lo  # the range of q - k, both ends reached
    match pattern:
        case config.Full():
            found = kind(nearest <= furthest, nearest <= furthest)
        case config.Causal():
            found = kind(furthest >= 0, nearest >= 0)
        case config.Local(window):
            inside = (furthest < window) & (nearest > -window)
            found = kind((nearest < window) & (furthest > -window), inside)
        case config.Dilated() | config.Strided() | config.Fixed() | config.Blocks() | config.RandomBlocks():
            found = sparse.block_kind(pattern, (q_lo, q_hi), (k_lo, k_hi))
        case config.Rows(start, stop):
            found = kind((q_lo < stop) & (q_hi > start) & (k_lo < k_hi), (q_lo >= start) & (q_hi <= stop))
        case config.Columns(start, stop):
            found = kind((k_lo < stop) & (k_hi > start) & (q_lo < q_hi), (k_lo >= start) & (k_hi <= stop))
        case config.GlobalTokens(count):
            found = kind((q_lo < count) | (k_lo < count), (q_hi <= count) | (k_hi <= count))
        case config.BigBird():
            raise ValueError(f"{pattern} depends on the row's length; take kernels.bigbird.at_length(pattern, length)")
        case config.And(left, right):
            bounds = (q_lo, q_hi, k_lo, k_hi)
            found = np.minimum(block_kind(left, *bounds), block_kind(right, *bounds))
        case config.Or(left, right):
            bounds = (q_lo, q_hi, k_lo, k_hi)
            found = np.maximum(block_kind(left, *bounds), block_kind(right, *bounds))
        case config.Later(pattern, by):
            found = block_kind(pattern, q_lo + by, q_hi + by, k_lo, k_hi)
        case other:
            assert_never(other)
    return found


def by_distance(pattern: config.Pattern) -> bool:
    """Whether only the distance of two slots matters, not where they stand."""
    match pattern:
        case config.Full() | config.Causal() | config.Local() | config.Dilated():
            return True
        case config.And(left, right) | config.Or(left, right):
            return by_distance(left) and by_distance(right)
        case config.Later(pattern):
            return by_distance(pattern)
        case _:
            return False


def narrowed(pattern: config.Pattern, q_lo: Slots, q_hi: Slots, k_lo: Slots, k_hi: Slots) -> config.Pattern:
    """A simpler pattern that allows the same pairs within all the blocks given (see `block_kind`); Full() for all."""
    bounds = (q_lo, q_hi, k_lo, k_hi)
    found = block_kind(pattern, *bounds)
    if (found == Kind.FULL).all():
        return config.Full()
    match pattern:
        case config.And(left, right):
            sides = [side for side in (narrowed(left, *bounds), narrowed(right, *bounds)) if side != config.Full()]
            return sides[0] if len(sides) == 1 else config.And(*sides)
        case config.Or(left, right):
            sides = [side for side in (left, right) if (block_kind(side, *bounds) != Kind.EMPTY).any()]
            return narrowed(sides[0], *bounds) if len(sides) == 1 else pattern
        case _:
            return pattern


def kinds(pattern: config.Pattern, T: int, S: int, block_q: int, block_k: int) -> Int[np.ndarray, "nq nk"]:
    """Kind of every block of a [T, S] score matrix, slots being 0..T-1 and 0..S-1. A ragged last key block is MIXED."""
    q_lo = np.arange(0, T, block_q)[:, None]
    k_lo = np.arange(0, S, block_k)[None, :]
    kind = block_kind(pattern, q_lo, np.minimum(q_lo + block_q, T), k_lo, np.minimum(k_lo + block_k, S))
    return np.where(k_lo + block_k > S, np.minimum(kind, Kind.MIXED), kind).astype(np.int32)


def block_lists(pattern: config.Pattern, T: int, S: int, block_q: int, block_k: int) -> Blocks:
    """The non-empty blocks of a [T, S] score matrix in blocks of [block_q, block_k]; see `kinds`."""
    table = kinds(pattern, T, S, block_q, block_k)
    q, k = np.nonzero(table)
    return Blocks(q.astype(np.int32), k.astype(np.int32), table[q, k])
