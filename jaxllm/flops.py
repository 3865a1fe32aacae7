"""How much arithmetic a model takes, counted from its spec; what the hardware could do at best.

Forward FLOPs per token = 2 x (weights that are multiplied: every projection, and the head, but not the embedding
lookup) + 4 x heads x head width x (mean number of visible keys) per attention layer. Causal attention sees half of the
context on average. Training = 3 x forward (the backward pass has two products for each of the forward's).
Recomputation (remat) is not counted: this is *model* FLOPs, the numerator of MFU (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.cache import window
from jaxllm.config import Transformer
from jaxllm.params import paths
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
    """Weights that take part in a matrix product for every token: kernels, and the embedding if it is also the head."""
    kernels = sum(math.prod(p.shape) for path, p in paths(transformer_params(spec)) if path.endswith("kernel"))
    return kernels + (spec.vocab * spec.dim if spec.tied else 0)


def mean_keys(context: int, bound: int | None, causal: bool) -> float:
    """Keys that a query sees on average in a row of `context` tokens, with at most `bound` of the latest."""
    if not causal:
        return context if bound is None else min(context, 2 * bound - 1)
    w = context if bound is None else min(bound, context)
    return (w * (w + 1) / 2 + (context - w) * w) / context


def forward_flops_per_token(spec: Transformer, context: int) -> float:
    """Forward FLOPs per token at this context length (formula in the module's docstring)."""
    attention = sum(
        stack.repeats * 4 * b.attn.heads * b.attn.head_dim * mean_keys(context, window(b.attn.pattern), spec.causal)
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
