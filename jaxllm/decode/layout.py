"""Decoding on a mesh: rows lie over the batch's axes and heads over those of heads, in the caches too.

Call the verbs of `sample` and `stream` under `jax.set_mesh`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import jax

from jaxllm.config import Transformer
from jaxllm.records import Params
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout, mesh_sizes, use
from jaxllm.transformer import transformer_params


@partial(jax.jit, static_argnums=(1, 2))
def laid_out(params: Params, spec: Transformer, runtime: Runtime) -> Params:
    """The weights in the compute dtype, as they lie in products: whole over data and stages: no token gathers them."""
    layout = None if runtime.layout is None else _without(runtime.layout, "layers")
    return use(transformer_params(spec), params, layout, runtime.compute_dtype)


def _without(layout: Layout, *names: str) -> Layout:
    return replace(layout, rules=tuple((name, axes) for name, axes in layout.rules if name not in names))


def spread(runtime: Runtime, rows: int) -> Runtime:
    """The runtime for so many rows: those that the batch axes of the context mesh do not divide stay whole.

    Rows are never cut along their length: a decoding step has one token of each; nor do they go through stages.
    """
    layout, sizes = runtime.layout, mesh_sizes()
    if layout is None or not sizes:
        return runtime
    ways = math.prod(sizes[axis] for axis in layout.mesh_axes("batch"))
    dropped = ("length", "stream", "layers", *(() if rows % ways == 0 else ("batch",)))
    return replace(runtime, layout=replace(_without(layout, *dropped), split_stream=False))
