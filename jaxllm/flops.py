"""How much arithmetic a model takes, counted from its spec; what the hardware could do at best.

Forward FLOPs per token = 2 x (weights that are multiplied: every projection, of experts the chosen, and the head, but
not the embedding lookup) + 2 x heads x (width of a key + of a value) x (mean number of visible keys) per attention
layer. Causal attention sees half of the
context on average. Training = 3 x forward (the backward pass has two products for each of the forward's).
Recomputation (remat) is not counted: this is *model* FLOPs, the numerator of MFU (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, assert_never

import jax
import jax.numpy as jnp

from jaxllm.cache import window
from jaxllm.config import GQA, MLA, Attention, Longformer, MoE, Transformer
from jaxllm.params import Param, paths
from jaxllm.transformer import transformer_params

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "Tesla T4": 65e12,
}
"""Dense bf16 (fp16 on T4) peak FLOP/s per device, from the makers' data sheets, by jax's device_kind."""


def matmul_weights(spec: Transformer) -> int:
    """Weights that a token is multiplied by: kernels (top_k experts' of a mixture), and a tied embedding."""
    kernels = 0.0
    for path, p in paths(transformer_params(spec)):
        if path.endswith("kernel"):
            kernels += math.prod(p.shape) * _used(spec, path, p)
    return round(kernels) + (spec.vocab * (spec.embed.dim or spec.dim) if spec.tied else 0)


def _used(spec: Transformer, path: str, p: Param) -> float:
    """The share of a kernel that one token meets."""
    if "experts" not in p.axes:
        return 1.0
    _, stack, place, *_ = path.split("/")
    ffn = spec.stacks[int(stack)].pattern[int(place)].ffn
    assert isinstance(ffn, MoE), "only a mixture has experts"
    return ffn.router.top_k / ffn.experts


def score_width(attn: Attention) -> int:
    """Multiplications per visible key: heads x (width of a key + width of a value)."""
    match attn:
        case GQA():
            return attn.heads * 2 * attn.head_dim
        case Longformer():
            return attn.heads * 2 * attn.head_dim
        case MLA():
            return attn.heads * (attn.nope_dim + attn.rope_dim + attn.value_dim)
        case other:
            assert_never(other)


def mean_keys(context: int, bound: int | None, causal: bool) -> float:
    """Keys that a query sees on average in a row of `context` tokens, with at most `bound` of the latest."""
    if not causal:
        return context if bound is None else min(context, 2 * bound - 1)
    w = context if bound is None else min(bound, context)
    return (w * (w + 1) / 2 + (context - w) * w) / context


def forward_flops_per_token(spec: Transformer, context: int) -> float:
    """Forward FLOPs per token at this context length (formula in the module's docstring)."""
    attention = sum(
        stack.repeats * 2 * score_width(b.attn) * mean_keys(context, window(b.attn.pattern), spec.causal)
        for stack in spec.stacks
        for b in stack.pattern
    )
    return 2 * matmul_weights(spec) + attention


def train_flops_per_token(spec: Transformer, context: int) -> float:
    """Forward + backward FLOPs per token, without recomputation: 3 x forward."""
    return 3 * forward_flops_per_token(spec, context)


def peak_flops(devices: Sequence[Any]) -> tuple[float, str]:
    """(peak FLOP/s of these devices together, where the figure is from).

    A device that is not in the table is measured: the best of five float32 products of 1,024 x 1,024.
    """
    kind = devices[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind] * len(devices), f"{kind} data sheet, bf16"
    n = 1024
    x = jax.device_put(jnp.ones((n, n), jnp.float32), devices[0])
    product = jax.jit(jnp.dot)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # Virtual CPU devices share the machine's cores: one product already uses them all.
    return 2 * n**3 / best * (1 if kind == "cpu" else len(devices)), f"{kind}, measured f32 matmul"
