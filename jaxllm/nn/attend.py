"""The attention op inside a forward: on the context mesh, with and without a cache.

With a cache, the keys are the cache's rows and the call's own new ones. A few query tokens (decoding) score the two
parts separately under one softmax, so that the cache is read in place; a long chunk (prefill over a cache) joins them
and takes the memory-O(n) path.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.cache import Cache, Paged, read
from jaxllm.config import BigBird, Pattern
from jaxllm.kernels.attention import DECODE_QUERIES
from jaxllm.kernels.attention import attention as attention_op
from jaxllm.kernels.bigbird import at_length
from jaxllm.kernels.decode import New
from jaxllm.kernels.decode import reference as decode_reference
from jaxllm.kernels.decode_tpu import decode_tpu, refusal
from jaxllm.kernels.modifiers import NONE, Modifiers
from jaxllm.nn.context import around_ring, over_heads, require_plain, ring_of, split_axis
from jaxllm.nn.position import Tables
from jaxllm.records import Inputs, Mask
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout, mesh_sizes, partition

Cached = tuple[Cache, Int[Array, ""] | int]  # a stacked cache, and this layer's index in it
NewRows = tuple[Float[Array, "B K T H"], Float[Array, "B K T h"]]


class Given(NamedTuple):
    """What all layers of a forward share. key: of dropout, None for none.

    shared: keys and values of all layers of a stack, [B, T, K, H]; None: each makes its own.
    """

    inputs: Inputs
    tables: Tables
    runtime: Runtime
    causal: bool
    key: Array | None = None
    shared: tuple[Array, Array] | None = None


class Scoring(NamedTuple):
    """How scores are made of q and k."""

    pattern: Pattern
    scale: float
    softcap: float | None = None
    modifiers: Modifiers = NONE


def self_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K h"],
    scoring: Scoring,
    given: Given,
    cached: Cached | None,
) -> Float[Array, "B T N h"]:
    """Attention of a forward's tokens among themselves, and to the cache's rows when there are any."""
    if cached is not None:
        return _attend_cached(q, k, v, scoring, given, cached)
    inputs = given.inputs
    mask = Mask(inputs.slot_BT, inputs.slot_BT, query_segments(given), inputs.segment_BT, inputs.prefix_B)
    if isinstance(scoring.pattern, BigBird) and not scoring.pattern.whole(q.shape[1]):
        mask = replace(mask, q_segment_BT=inputs.segment_BT)
        k, v, mask = _again(scoring.pattern, k, v, mask)
    scoring, runtime = scoring._replace(pattern=at_length(scoring.pattern, q.shape[1])), given.runtime
    dealt = given.causal and inputs.slot_BT is not None
    shape = scoring.pattern, scoring.scale, scoring.softcap
    ring = ring_of(*shape, runtime, resolve_backend(runtime), dealt)
    if ring is None or runtime.layout is None:
        return attend(q, k, v, scoring, mask, runtime)
    require_plain(mask, scoring.modifiers)
    return around_ring(q, k, v, (mask.q_segment_BT, mask.k_segment_BS), ring, runtime.layout)


def _again(pattern: BigBird, k: Array, v: Array, mask: Mask) -> tuple[Array, Array, Mask]:
    """Keys and values with copies of the first block behind them, where the pattern counts it more than once."""
    copies, T = pattern.copies(k.shape[1]), k.shape[1]
    if not copies:
        return k, v, mask
    if mask.k_slot_BS is not None:
        raise ValueError("BigBird: goes by the place in the row; leave inputs.slot_BT out")

    def behind(x: Array) -> Array:
        return jnp.concatenate([x, *[x[:, : pattern.block]] * (copies // pattern.block)], 1)

    segment = jnp.ones((k.shape[0], T), jnp.int32) if mask.k_segment_BS is None else mask.k_segment_BS
    return behind(k), behind(v), replace(mask, k_segment_BS=behind(segment))


def query_segments(given: Given) -> Int[Array, "B T"] | None:
    """Segments of the queries. In an encoder padding asks as if it were of the first document.

    Nobody reads its answers but poolers of the first slot. The reference does so too, but not where attention is sparse
    (BigBird, Longformer): there padding sees nothing.
    """
    segment_BT = given.inputs.segment_BT
    return segment_BT if given.causal or segment_BT is None else jnp.maximum(segment_BT, 1)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K h"],
    scoring: Scoring,
    mask: Mask,
    runtime: Runtime,
) -> Float[Array, "B T N h"]:
    """The attention op on the context mesh: batch and heads are split by the layout, each device runs the kernel.

    Where tokens are split too ("all_to_all"), heads take their place for as long as the kernel runs.
    """
    backend = resolve_backend(runtime)
    op = partial(attention_op, pattern=scoring.pattern, scale=scoring.scale, softcap=scoring.softcap, backend=backend)

    def run(q: Array, k: Array, v: Array, mask: Mask, modifiers: Modifiers) -> Array:
        return op(q, k, v, mask=mask, modifiers=modifiers)

    layout, m = runtime.layout, scoring.modifiers
    turns = layout is not None and layout.context == "all_to_all" and q.shape[1] == k.shape[1]
    axis = split_axis(layout) if turns else None
    if (backend in ("reference", "chunked") and axis is None) or layout is None or not mesh_sizes():
        return run(q, k, v, mask, m)
    specs = _specs(layout, axis, (q, k, v), mask, m)
    local = run if axis is None else over_heads(run, axis)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(q, k, v, mask, m)


def _specs(layout: Layout, axis: str | None, qkv: tuple[Array, ...], mask: Mask, m: Modifiers) -> tuple[Any, ...]:
    """PartitionSpecs of q, k, v, mask and modifiers. axis: tokens lie on it outside of the kernel, heads inside."""
    sizes, length = mesh_sizes(), None if axis is None else "length"

    def spec(axes: tuple[str | None, ...], x: Array | None) -> Any:
        return None if x is None else partition(axes, x.shape, layout, sizes)

    def of_heads(x: Array | None, dim: int = 0) -> Any:
        names = [a for a in (*layout.mesh_axes("heads"), axis) if a is not None and sizes[a] > 1]
        return None if x is None else PartitionSpec(*[None] * dim, tuple(names) or None)

    heads = ("heads", "kv_heads", "kv_heads")
    return (
        *(spec(("batch", length, of, None), x) for of, x in zip(heads, qkv, strict=True)),
        jax.tree.map(lambda x: spec(("batch", *[None] * (x.ndim - 1)), x), mask),
        replace(
            m,
            slopes_N=of_heads(m.slopes_N),
            table_RN=of_heads(m.table_RN, 1),
            sinks_N=of_heads(m.sinks_N),
            shift_BT=spec(("batch", None), m.shift_BT),
        ),
    )


def resolve_backend(runtime: Runtime) -> Any:
    """ "auto" by the platform that jax computes on."""
    if runtime.attention != "auto":
        return runtime.attention
    return {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}.get(jax.default_backend(), "chunked")


def _attend_cached(
    q: Array, k: Array, v: Array, scoring: Scoring, given: Given, cached: Cached
) -> Float[Array, "B T N h"]:
    inputs, runtime, (cache, index) = given.inputs, given.runtime, cached
    if inputs.slot_BT is None:
        raise ValueError("attention: a forward over a filled cache needs inputs.slot_BT, the slots of the new tokens")
    if cache.ring and inputs.prefix_B is not None:
        raise ValueError(
            "attention: a prefix is seen from everywhere, a ring cache forgets it; init it with ring=False"
        )
    segment_BT = jnp.ones_like(inputs.slot_BT) if inputs.segment_BT is None else inputs.segment_BT
    if q.shape[1] <= DECODE_QUERIES:
        return _decode(q, New(k, v, inputs.slot_BT, segment_BT, inputs.prefix_B), scoring, runtime, cached)
    joined = Mask(
        inputs.slot_BT,
        jnp.concatenate([cache.slot_BS, inputs.slot_BT], 1),
        segment_BT,
        jnp.concatenate([cache.segment_BS, segment_BT], 1),
        inputs.prefix_B,
    )
    old_k, old_v = read(cache, index, v.shape[-1], q.dtype)
    k = jnp.concatenate([old_k.swapaxes(1, 2), k], 1)
    v = jnp.concatenate([old_v.swapaxes(1, 2), v], 1)
    return attend(q, k, v, scoring, joined, Runtime(attention="chunked", layout=runtime.layout))


def _decode(q: Array, new: New, scoring: Scoring, runtime: Runtime, cached: Cached) -> Float[Array, "B T N h"]:
    """A few queries: the kernel where there is one for them, else the plain path."""
    (cache, index), backend, m = cached, resolve_backend(runtime), scoring.modifiers
    options = {"scale": scoring.scale, "softcap": scoring.softcap}
    sizes = mesh_sizes() if runtime.layout is not None else {}
    spread_pages = sizes and isinstance(cache, Paged)  # whose table counts the pages of all devices
    if backend != "tpu" or spread_pages or refusal(q, new, cache, scoring.pattern, m) is not None:
        # XLA on CPU lacks batched dots of two bf16 arrays with a float32 result (UNIMPLEMENTED at run time).
        dtype = jnp.float32 if backend in ("reference", "chunked") else q.dtype
        return decode_reference(q, new, cached, scoring.pattern, m, **options, dtype=dtype)

    def run(q: Array, new: New, cache: Any, index: Any, m: Modifiers) -> Array:
        return decode_tpu(q, new, (cache, index), scoring.pattern, m, **options)

    if not sizes:
        return run(q, new, cache, index, m)

    def spec(x: Array, *axes: str | None) -> Any:
        return partition((*axes, *[None] * (x.ndim - len(axes))), x.shape, runtime.layout, sizes)  # type: ignore[arg-type]

    heads = spec(q, "batch", None, "heads")
    specs = (
        heads,
        New(
            *(spec(x, "batch", None, "kv_heads") for x in new[:2]),
            *(None if x is None else spec(x, "batch") for x in new[2:]),
        ),
        jax.tree.map(lambda x: spec(x, "batch") if x.ndim == 2 else spec(x, None, "batch", "kv_heads"), cache),
        PartitionSpec(),
        jax.tree.map(lambda x: spec(x, "heads"), m),
    )
    return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)(q, new, cache, jnp.asarray(index), m)
