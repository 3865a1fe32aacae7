"""What steers a TPU kernel: scalars fetched ahead, and which blocks each grid step reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxllm.kernels.call import Call, Operands, codes
from jaxllm.kernels.schedule import Schedule
from jaxllm.kernels.tpu_sizes import Tile


class Fixed(NamedTuple):
    """Arrays without a gradient. prefix: int32 [B].  slopes: float32 [N], times log2(e)."""

    prefix: Array | None
    slopes: Array | None


class Guide(NamedTuple):
    """Scalars that steer a kernel. query [n]; fetch, code [n] or [B * n]; prefix [B] or [1]: int32, flat.

    slope [N] or [1]: float32.
    """

    query: Any
    fetch: Any
    code: Any
    prefix: Any
    slope: Any


SCALARS = len(Guide._fields)


def make_guide(call: Call, plan: Schedule, tile: Tile, x: Operands, fixed: Fixed) -> Guide:
    """The scalars of one kernel call; fetch and code as `schedule.choose` finds them for these arrays."""
    code, fetch = codes(call, plan, call.shape(tile.q, tile.k), x, fixed.prefix)
    prefix = jnp.zeros(1, jnp.int32) if fixed.prefix is None else fixed.prefix.astype(jnp.int32)
    slope = jnp.zeros(1, jnp.float32) if fixed.slopes is None else fixed.slopes
    return Guide(jnp.asarray(plan.visits.q), fetch.ravel(), code.ravel(), prefix, slope)


class Layout(NamedTuple):
    """Block specs of what a kernel reads and writes. o: like q, as wide as the values."""

    q: pl.BlockSpec
    k: pl.BlockSpec
    v: pl.BlockSpec
    o: pl.BlockSpec
    statistic: pl.BlockSpec
    q_segment: pl.BlockSpec
    k_segment: pl.BlockSpec


def flat(call: Call, visits: int, head: Any, visit: Any) -> Any:
    """Where the fetch and the code of a visit stand."""
    return head // call.N * visits + visit if any(call.arrays) else visit


def make_layout(call: Call, x: Operands, visits: int, place: Callable[..., tuple[Any, Any]]) -> Layout:
    """place: grid indices -> (query head in B * N, visit). Index maps get the grid's indices, then the guide."""
    bq, bk, G, H, h = call.block_q, call.block_k, call.N // call.K, x.q.shape[2], x.v.shape[2]

    def query(grid: tuple[Any, ...]) -> tuple[Any, Any]:
        head, visit = place(*grid[:-SCALARS])
        return head, Guide(*grid[-SCALARS:]).query[visit]

    def key(grid: tuple[Any, ...]) -> tuple[Any, Any]:
        head, visit = place(*grid[:-SCALARS])
        return head, Guide(*grid[-SCALARS:]).fetch[flat(call, visits, head, visit)]

    def q_like(*grid: Any) -> tuple[Any, ...]:
        head, i = query(grid)
        return head, i, 0

    def k_like(*grid: Any) -> tuple[Any, ...]:
        head, j = key(grid)
        return head // G, j, 0

    def statistic(*grid: Any) -> tuple[Any, ...]:
        head, i = query(grid)
        return head, 0, i

    def q_segment(*grid: Any) -> tuple[Any, ...]:
        head, i = query(grid)
        return head // call.N, 0, i

    def k_segment(*grid: Any) -> tuple[Any, ...]:
        head, j = key(grid)
        return head // call.N, 0, j

    return Layout(
        pl.BlockSpec((None, bq, H), q_like),
        pl.BlockSpec((None, bk, H), k_like),
        pl.BlockSpec((None, bk, h), k_like),
        pl.BlockSpec((None, bq, h), q_like),
        pl.BlockSpec((None, 1, bq), statistic),
        pl.BlockSpec((None, 1, bq), q_segment),
        pl.BlockSpec((None, 1, bk), k_segment),
    )


def present(layout: Layout, x: Operands) -> tuple[list[pl.BlockSpec], list[Array]]:
    """Specs and arrays of the operands that are there."""
    specs = (layout.q, layout.k, layout.v, layout.q_segment, layout.k_segment)  # in the order of Operands
    there = [(spec, array) for spec, array in zip(specs, x, strict=True) if array is not None]
    return [spec for spec, _ in there], [array for _, array in there]


def unpack(call: Call, refs: tuple[Any, ...]) -> tuple[Guide, Operands, list[Any]]:
    """A kernel's references: the guide, the operands, the rest."""
    guide, rest = Guide(*refs[:SCALARS]), list(refs[SCALARS:])
    q, k, v = rest.pop(0), rest.pop(0), rest.pop(0)
    q_segment = rest.pop(0) if call.arrays.q_segment else None
    k_segment = rest.pop(0) if call.arrays.k_segment else None
    return guide, Operands(q, k, v, q_segment, k_segment), rest
