"""What a model costs, from its spec alone: parameters, FLOPs per token, cache bytes, training memory. No array is made.

FLOPs are those of `jaxllm.flops`: matrix products of the forward pass, times 3 for training, recomputation not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import jax
from jax.sharding import PartitionSpec

from jaxllm import cache
from jaxllm.architectures import Spec, model_params
from jaxllm.config import FFN, GLU, MLP, Block, MoE, Transformer
from jaxllm.experiment import Experiment
from jaxllm.flops import forward_flops_per_token, matmul_weights, train_flops_per_token
from jaxllm.params import Param, count, leaves, paths
from jaxllm.plan.saved import saved_bytes
from jaxllm.sharding import Layout, shares, storage
from jaxllm.train.optimizer import bytes_of_state


@dataclass(frozen=True)
class Info:
    """Costs of a model at a context of `context` tokens.

    parameters: by part, "total" included.  matrix_parameters: those that are multiplied: a tied head, no embedding.
    forward_flops: per token, {"matrices", "attention"}.  train_flops: per token, 3 x their sum.
    kv_bytes: of one more token, in a cache whose windows are not full yet.  kv_bytes_context: of `context` tokens.
    kv_bytes_next: of one token more than these.
    training_bytes: per chip by part, None without an experiment.
    """

    name: str
    context: int
    parameters: Mapping[str, int]
    matrix_parameters: int
    forward_flops: Mapping[str, float]
    train_flops: float
    kv_bytes: int
    kv_bytes_context: int
    kv_bytes_next: int
    training_bytes: Mapping[str, int] | None


@lru_cache(16)
def declared(spec: Transformer) -> Mapping[str, Param]:
    """Every parameter by its path; kept, since searches ask for it hundreds of times."""
    return MappingProxyType(dict(paths(model_params(spec))))


@lru_cache(16)
def info(spec: Transformer, context: int | None = None, dtype: str = "bfloat16") -> Info:
    """Costs of a model. context: default the spec's own.  dtype: of the cache."""
    T = spec.context if context is None else context
    matrices = matmul_weights(spec)
    forward = forward_flops_per_token(spec, T)
    return Info(
        name=spec.name,
        context=T,
        parameters=parameters_by_part(spec),
        matrix_parameters=matrices,
        forward_flops={"matrices": 2.0 * matrices, "attention": forward - 2.0 * matrices},
        train_flops=train_flops_per_token(spec, T),
        kv_bytes=_kv_bytes(spec, 1, dtype),
        kv_bytes_context=_kv_bytes(spec, T, dtype),
        kv_bytes_next=_kv_bytes(spec, T + 1, dtype) - _kv_bytes(spec, T, dtype),
        training_bytes=None,
    )


def _kv_bytes(spec: Transformer, tokens: int, dtype: str) -> int:
    """Keys and values of one row in a cache for so many tokens; an encoder keeps nothing."""
    caches = jax.eval_shape(lambda: cache.init(spec, 1, tokens, dtype)) if spec.causal else ()
    return cache.nbytes([(c.k, c.v) for stack in caches for c in stack])


def parameters_by_part(spec: Spec) -> dict[str, int]:
    """Scalar parameters of embedding, attention, ffn, norms, head, and "total"; of compound models by half as well.

    A parameter counts as the product of its shape.
    """
    parts: Counter[str] = Counter()
    for path, param in paths(model_params(spec)):
        names = path.split("/")
        half = "" if isinstance(spec, Transformer) or len(names) < 3 else f"{names.pop(0)}: "
        part = "norms" if any("norm" in name for name in names) else names[3] if names[0] == "stacks" else names[0]
        parts[half + {"embed": "embedding"}.get(part, part)] += math.prod(param.shape)
    return dict(parts) | {"total": count(model_params(spec))}


def require_formula(layout: Layout) -> None:
    """Raise ValueError for layouts whose memory no formula here speaks of."""
    if layout.stage > 1:
        raise ValueError(
            f"no formula gives the memory of a pipeline, stage={layout.stage}; ask the compiler with "
            "`jaxllm plan CONFIG --topology NAME`, or set runtime.layout.stage=1"
        )


def training_bytes(exp: Experiment, devices: int = 1) -> dict[str, int]:
    """Bytes per chip by part while training, by formula (`jaxllm plan` asks the compiler instead).

    parameters 4 P, optimiser 8 P (less with `optimizer.masters`, `moments`, 0 offloaded), gradients 4 P bytes, P being
    what a chip stores under the layout (gradients whole below ZeRO stage 2); saved: what the backward pass keeps per
    layer under `runtime.remat`, times the tokens of a micro-batch [B, T]. Raises ValueError for layouts with stages.
    """
    layout = exp.runtime.layout or Layout()
    require_formula(layout)
    sizes = layout.sizes(devices)
    tree = model_params(exp.model)
    stored = [(p, math.prod(p.shape) // _ways(storage(p, layout, sizes), sizes)) for p in leaves(tree)]
    held = [(n, *bytes_of_state(exp.optimizer, p)) for p, n in stored]
    tokens = exp.batch_size * exp.data.context // (shares(sizes) * sizes["sequence"] * exp.accumulate)
    kept = sum(n * saved_bytes(b, exp.model, exp.data.context, exp.runtime)[0] for b, n in _blocks(exp.model))
    gradients = count(tree) // sizes["tensor"] if layout.zero < 2 else sum(n for _, n in stored)
    return {
        "parameters": round(sum(n * master for n, master, _ in held)),
        "optimiser": 0 if layout.offload else round(sum(n * moments for n, _, moments in held)),
        "gradients": 4 * gradients,
        "saved": tokens * kept,
    }


def _ways(spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    names = [name for axes in spec for name in ((axes,) if isinstance(axes, str) else axes or ())]
    return math.prod(sizes[name] for name in names)


def _blocks(spec: Transformer) -> list[tuple[Block, int]]:
    """Each distinct block with the number of layers made of it."""
    counts: Counter[Block] = Counter()
    for stack in spec.stacks:
        for block in stack.pattern:
            counts[block] += stack.repeats
    return list(counts.items())


def ffn_width(ffn: FFN) -> int:
    """Numbers per token that the first projections of a layer give."""
    match ffn:
        case GLU(hidden):
            return 2 * hidden
        case MLP(hidden):
            return hidden
        case MoE(expert=expert, router=router, shared=shared):
            return router.top_k * ffn_width(expert) + (0 if shared is None else ffn_width(shared))
        case other:
            assert_never(other)
