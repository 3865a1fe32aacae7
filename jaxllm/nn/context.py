"""Rows whose tokens lie on several devices: around attention, and around a whole forward.

    all_to_all   inside attention heads are split instead of tokens, so that any kernel sees whole rows
    ring         tokens stay, keys and values travel; forwards of causal models have their tokens in zigzag order

Everything else in a model is done token by token and does not notice, what is sorted by slots goes by `slot_BT`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.config import MoE, Transformer
from jaxllm.kernels.attention import Backend
from jaxllm.kernels.modifiers import Modifiers
from jaxllm.kernels.ring import Ring, ring_attention, zigzag
from jaxllm.records import Inputs, Mask
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout, mesh_sizes, partition, require_length

Op = Callable[..., Float[Array, "B T N h"]]  # of q, k, v, mask, modifiers


def split_axis(layout: Layout | None) -> str | None:
    """The mesh axis that the tokens of a row lie on; None when rows are whole."""
    sizes = mesh_sizes()
    found = [] if layout is None else [axis for axis in layout.mesh_axes("length") if sizes.get(axis, 1) > 1]
    if len(found) > 1:
        raise ValueError(f"layout: one mesh axis can split the length of rows, the rules name {found}; leave one")
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------------- all to all


def over_heads(op: Op, axis: str) -> Op:
    """`op` on whole rows and a share of the heads, for arguments that are shares of rows with all heads."""
    size, turn = mesh_sizes()[axis], partial(lax.all_to_all, axis_name=axis, tiled=True)

    def run(q: Array, k: Array, v: Array, mask: Mask, modifiers: Modifiers) -> Float[Array, "B T N h"]:
        N, K = q.shape[2], k.shape[2]
        if N % size or (K % size and size % K):
            raise ValueError(
                f"layout: sequence={size} must divide the heads of a device, {N}, and divide or be a multiple of its "
                f'kv heads, {K}; set layout.context="ring", or a sequence that does'
            )
        k, v = (jnp.repeat(x, max(1, size // K), 2) for x in (k, v))  # a device needs one kv head at least
        q, k, v = (turn(x, split_axis=2, concat_axis=1) for x in (q, k, v))
        return turn(op(q, k, v, mask, modifiers), split_axis=1, concat_axis=2)

    return run


# ------------------------------------------------------------------------------------------------------------- ring


def around_ring(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K h"],
    segments: tuple[Int[Array, "B T"] | None, Int[Array, "B T"] | None],
    ring: Ring,
    layout: Layout,
) -> Float[Array, "B T N h"]:
    """Ring attention on the context mesh. segments: of queries and of keys."""

    def spec(x: Array | None, *more: str | None) -> Any:
        return None if x is None else partition(("batch", "length", *more), x.shape, layout, mesh_sizes())

    specs = spec(q, "heads", None), spec(k, "kv_heads", None), spec(v, "kv_heads", None), *map(spec, segments)
    run = jax.shard_map(partial(ring_attention, ring), in_specs=specs, out_specs=specs[0], check_vma=False)
    return run(q, k, v, *segments)


def require_plain(mask: Mask, modifiers: Modifiers) -> None:
    """Raise ValueError for what a ring does not do: prefixes, sinks, slopes, learned biases."""
    if mask.prefix_B is not None or not modifiers.plain:
        what = "prefixes" if mask.prefix_B is not None else "ALiBi, relative biases or sinks"
        raise ValueError(f'ring attention: does not do {what}; set layout.context="all_to_all"')


def in_ring_order(spec: Transformer, inputs: Inputs, runtime: Runtime) -> Inputs:
    """Inputs with their tokens in zigzag order and slots that say so, where the layout has a ring; else as they are.

    Raises ValueError for slots given by the caller, and for mixtures that drop tokens by their order.
    """
    layout, axis = runtime.layout, split_axis(runtime.layout)
    if layout is None or axis is None or layout.context != "ring" or not spec.causal:
        return inputs
    if inputs.slot_BT is not None:
        raise ValueError(
            'ring attention: slots are 0..T-1; leave inputs.slot_BT out or set layout.context="all_to_all"'
        )
    ffns = [block.ffn for stack in spec.stacks for block in stack.pattern]
    if any(isinstance(ffn, MoE) and ffn.capacity is not None for ffn in ffns):
        raise ValueError(
            "ring attention: a capacity drops tokens by their order in the row, which a ring changes; set "
            'layout.context="all_to_all", or capacity=None'
        )
    position = inputs.position_BT
    slot = jnp.broadcast_to(jnp.arange(position.shape[-1]), position.shape[-2:])

    def turned(x: Array | None, dim: int = 1) -> Any:
        return None if x is None else _turned(x, dim, axis, layout)

    return replace(
        inputs,
        tokens_BT=turned(inputs.tokens_BT),
        embeds_BTD=turned(inputs.embeds_BTD),
        position_BT=turned(position, position.ndim - 1),
        slot_BT=turned(slot),
        segment_BT=turned(inputs.segment_BT),
        type_BT=turned(inputs.type_BT),
        window_BT=turned(inputs.window_BT),
    )


def in_row_order(x: Float[Array, "*L B T D"], runtime: Runtime) -> Float[Array, "*L B T D"]:
    """Undoes `in_ring_order` for what came of its tokens."""
    layout, axis = runtime.layout, split_axis(runtime.layout)
    return x if layout is None or axis is None else _turned(x, x.ndim - 2, axis, layout, back=True)


def _turned(x: Array, dim: int, axis: str, layout: Layout, *, back: bool = False) -> Float[Array, ...]:
    sizes = mesh_sizes()
    require_length(x.shape[dim], layout, sizes)
    names = [None] * (dim - 1) + ["batch", "length"] + [None] * (x.ndim - dim - 1)
    spec: PartitionSpec = partition(tuple(names), x.shape, layout, sizes)
    run = partial(zigzag, dim=dim, axis=axis, size=sizes[axis], back=back)
    return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)(x)


def ring_of(
    pattern: Any, scale: float, softcap: float | None, runtime: Runtime, backend: Backend, dealt: bool
) -> Ring | None:
    """The ring that the layout asks for, if it does. dealt: whether tokens are in zigzag order."""
    layout, axis = runtime.layout, split_axis(runtime.layout)
    if layout is None or axis is None or layout.context != "ring":
        return None
    return Ring(axis, mesh_sizes()[axis], dealt, pattern, scale, softcap, backend)
