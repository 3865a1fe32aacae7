"""DeepSeek V2 (DeepSeek-AI 2024): multi-head latent attention, softmax router limited to groups of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, Rope, Router, Transformer
from jaxllm.models.common import Config, Fields, read_fields
from jaxllm.models.deepseek_like import IGNORED, NULLABLE, SHAPE, config_of, names_of, spec_from
from jaxllm.models.sparse_like import mixture_of, one_name
from jaxllm.rules import Rule

YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


def deepseek_v2_lite() -> Transformer:
    """15,706,484,224 parameters, of which a token meets 2.4 billion; queries without a latent."""
    shape = {"hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408, "q_lora_rank": None}
    depth = {"num_hidden_layers": 27, "num_attention_heads": 16, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
    rope = {"max_position_embeddings": 163_840, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}
    return replace(from_hf({"model_type": MODEL_TYPE} | shape | depth | rope), name="deepseek_v2_lite")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "deepseek_v2"
ARCHITECTURES = ("DeepseekV2ForCausalLM",)
PREFIX = "model."
PRESETS = (deepseek_v2_lite,)

FIELDS = Fields(
    read=SHAPE | {"mlp_bias": False, "topk_method": "greedy"},
    nullable=NULLABLE,
    zero=frozenset({"first_k_dense_replace"}),
    # Of weights that sum to one the reference implementation knows nothing, the authors' code does: refused.
    only={"norm_topk_prob": (False,), "scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy")},
    ignored=IGNORED,
)


def from_hf(config: Config) -> Transformer:
    """`topk_method` "greedy" looks at all experts, whatever `n_group` says. Pairs are always interleaved."""
    c = read_fields(one_name(config, "n_routed_experts", "num_experts"), FIELDS)
    limited = c["topk_method"] == "group_limited_greedy"
    groups = (c["n_group"] or 1, c["topk_group"] or 1) if limited else (1, 1)
    scale = float(c["routed_scaling_factor"])
    router = Router(c["num_experts_per_tok"], renormalise=False, scale=scale, groups=groups[0], top_groups=groups[1])
    return spec_from(c, router, Rope(interleaved=True), c["mlp_bias"])


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    config, mixture = config_of(spec, MODEL_TYPE, ARCHITECTURES[0]), mixture_of(MODEL_TYPE, spec)[0]
    bias = any(isinstance(ffn, GLU) and ffn.bias for ffn in (mixture.shared, spec.stacks[0].pattern[0].ffn))
    method = "group_limited_greedy" if mixture.router.groups > 1 else "greedy"
    rest = {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": method}
    return config | {"mlp_bias": bias} | rest


def names(spec: Transformer) -> list[Rule]:
    """Shared with V3."""
    return names_of(spec)
