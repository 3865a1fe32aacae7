"""Weights laid out for decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from jaxllm import params as trees
from jaxllm.config import EncoderDecoder, Stack, Transformer, VisionLanguage
from jaxllm.decode.layout import laid_out
from jaxllm.encoder_decoder import half
from jaxllm.leaves import Weight, matrix
from jaxllm.nn.head import lm_head
from jaxllm.records import Params
from jaxllm.runtime import Runtime
from jaxllm.sharding import use
from jaxllm.transformer import place_params, transformer_params


def prepare(params: Params, spec: Transformer | VisionLanguage | EncoderDecoder, runtime: Runtime) -> Params:
    """The same weights, laid out once for decoding: in the compute dtype and, on a CPU, layer by layer as `Matrix`.

    Optional, and idempotent. Costs one copy of the weights, and saves casting (and on CPU copying) them at every token.
    With a layout, under its mesh: sharded over tensor alone, so that no token waits for weights to be gathered.
    """
    if isinstance(spec, VisionLanguage):
        return params | {"text": prepare(params["text"], spec.text, runtime)}
    if isinstance(spec, EncoderDecoder):
        ready = prepare(half(params, "decoder"), spec.decoder, runtime)
        embed = {name: x for name, x in ready["embed"].items() if name != "tokens"}
        return params | {"decoder": ready | {"embed": embed}}
    if runtime.layout is not None:
        return laid_out(params, spec, runtime)
    if _prepared(params):
        return params
    tree = transformer_params(spec)
    ready = use(tree, params, None, runtime.compute_dtype)
    if jax.default_backend() != "cpu":
        return ready
    ready = trees.unstack(ready)
    stacks = {
        s: {b: [_flat(spec.stacks[int(s)], int(b), spec.dim, p) for p in layers] for b, layers in stack.items()}
        for s, stack in ready["stacks"].items()
    }
    embed = ready["embed"] | {"tokens": matrix(ready["embed"]["tokens"], 1)}
    own = "kernel" in ready.get("head", {}) and not lm_head(spec).normalised
    head = {"head": ready["head"] | {"kernel": matrix(ready["head"]["kernel"], 1)}} if own else {}
    return ready | head | {"embed": embed, "stacks": stacks}


def _flat(stack: Stack, place: int, dim: int, layer: Params) -> Params:
    """One layer with its kernels as matrices: [embed, ...] or [..., embed]."""

    def one(path: tuple[Any, ...], p: trees.Param, w: Weight) -> Weight:
        kernel = trees.path_name(path).endswith("kernel")
        return matrix(w, len(p.axes) - p.outputs) if kernel and "experts" not in p.axes else w

    return jax.tree_util.tree_map_with_path(one, place_params(stack, place, dim), layer, is_leaf=trees.is_param)


def layered(spec: Transformer, params: Params) -> tuple[Transformer, Params]:
    """The same function with every layer a place of its own, if the weights come layer by layer; free of charge.

    Then each layer has its own cache arrays, where a slice of a stacked cache would be copied by XLA on CPU.
    """
    if not _prepared(params):
        return spec, params
    stacks, weights = [], {}
    for s, stack in enumerate(spec.stacks):
        held = [params["stacks"][str(s)][str(b)][i] for i in range(stack.repeats) for b in range(len(stack.pattern))]
        stacks.append(replace(stack, pattern=stack.pattern * stack.repeats, repeats=1))
        weights[str(s)] = {str(b): [layer] for b, layer in enumerate(held)}
    return replace(spec, stacks=tuple(stacks)), params | {"stacks": weights}


def _prepared(params: Params) -> bool:
    return any(isinstance(block, list) for stack in params["stacks"].values() for block in stack.values())
