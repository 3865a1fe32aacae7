"""What the mixtures of Qwen share: which layers are sparse, and the router's fields."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GLU, MoE, Router, Transformer
from jaxllm.models.common import Config, activation_from, layers_of
from jaxllm.models.llama_like import config_of
from jaxllm.models.sparse_like import dense, mixture_of, one_name, sparse

READ: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
}


def renamed(config: Config) -> dict[str, Any]:
    """The config with `num_experts` under this one of its two names."""
    return one_name(config, "num_experts", "num_local_experts")


def sparse_from(c: Config, spec: Transformer, shared: int | None) -> Transformer:
    """Every `decoder_sparse_step`-th layer is a mixture, but for `mlp_only_layers`. shared: an expert's width."""
    act = activation_from(c["hidden_act"], "hidden_act")
    router = Router(c["num_experts_per_tok"], renormalise=c["norm_topk_prob"])
    own, step, never = GLU(c["moe_intermediate_size"], act), c["decoder_sparse_step"], c["mlp_only_layers"] or []
    extra = None if shared is None else GLU(shared, act)
    mixture = MoE(own, c["num_experts"], router, extra, shared_gate=shared is not None)
    return sparse(spec, mixture, lambda i: (i + 1) % step == 0 and i not in never)


def sparse_to(spec: Transformer, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields of LLaMA and of the mixture."""
    mixture, expert = mixture_of(model_type, spec)
    layers = [i for i, block in enumerate(layers_of(spec)) if not isinstance(block.ffn, MoE)]
    return config_of(dense(model_type, spec), model_type, architecture) | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": layers,
        "moe_intermediate_size": expert.hidden,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.router.top_k,
        "norm_topk_prob": mixture.router.renormalise,
    }
