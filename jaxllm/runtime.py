"""*How* a model is computed. Swapping a `Runtime` may change rounding, speed and memory, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxllm.lowered import Kind
from jaxllm.remat import Name, Remat, require_valid
from jaxllm.sharding import Layout

Backend = Literal["auto", "reference", "chunked", "tpu", "gpu"]


@dataclass(frozen=True)
class Runtime:
    """One way to run a spec. Hashable: a static argument of `jax.jit`.

    compute_dtype: dtype of activations and of weights as they are multiplied ("bfloat16" on accelerators); softmax,
        norms, router and loss statistics are float32 whatever it is.
    attention: kernel of `jaxllm.kernels`; "auto" takes the Pallas kernel of the platform, or "chunked" on CPU.
    remat: what of a block is saved for its backward pass, which computes the rest again: names of `jaxllm.remat`, or
        "none": nothing is computed again; "full": only each block's input is saved; "attention": the results of
        attentions too; "dots": those of products.
    offload: which of these lie in the host's memory in the meantime; "stream" is each block's input.
    unroll: a Python loop over layers instead of `lax.scan`: slower to compile, sometimes faster to run.
    layout: None on one device.
    taps: names of intermediates that `forward` returns in `aux.taps`: "residual" (each block's input), "attn", "ffn".
    vocab_chunk: columns of logits that the loss holds at a time.
    matmul: "int8" and "fp8" multiply the kernels of layers in 8 bits, in both passes (`jaxllm.lowered`);
        validation does not, and experts, routers, embedding and head are left out.
    experts: how dropless mixtures are computed: "grouped" sorts tokens by expert, "dense" lets every expert see all.
    """

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Backend = "auto"
    remat: Remat = "none"
    offload: tuple[Name, ...] = ()
    unroll: bool = False
    layout: Layout | None = None
    taps: tuple[str, ...] = ()
    vocab_chunk: int = 16_384
    experts: Literal["grouped", "dense"] = "grouped"
    matmul: Literal["default"] | Kind = "default"

    def __post_init__(self) -> None:
        for field in ("remat", "offload"):
            if isinstance(names := getattr(self, field), list):
                object.__setattr__(self, field, tuple(names))
        if isinstance(self.offload, str):
            raise ValueError(f"runtime.offload={self.offload!r} must be a tuple of names; write ({self.offload!r},)")
        kinds = ("default", *get_args(Kind))
        if self.matmul not in kinds:
            raise ValueError(f"runtime.matmul={self.matmul!r} must be one of {', '.join(kinds)}")
        require_valid(self.remat, self.offload)
