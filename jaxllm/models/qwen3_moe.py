"""Qwen3-MoE (Yang et al. 2025): Qwen3 with 8 of 128 small experts, none shared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Full, Local, Pattern, Transformer
from jaxllm.models.common import Config, Fields, layers_of, read_fields, window_fields, with_blocks
from jaxllm.models.llama_like import NORMS, SHAPE, names_with, spec_from
from jaxllm.models.qwen_moe_like import READ, renamed, sparse_from, sparse_to
from jaxllm.models.sparse_like import EXPERTS, QK_NORMS, TRAINING, attention_of, normalised
from jaxllm.rules import Rule


def qwen3_30b_a3b() -> Transformer:
    """30,532,122,624 parameters, of which a token meets 3.3 billion."""
    shape = {"num_hidden_layers": 48, "head_dim": 128, "max_position_embeddings": 40_960, "norm_topk_prob": True}
    return replace(
        from_hf({"model_type": MODEL_TYPE} | shape | {"rope_parameters": {"rope_theta": 1e6}}), name="qwen3_30b_a3b"
    )


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "qwen3_moe"
ARCHITECTURES = ("Qwen3MoeForCausalLM",)
PREFIX = "model."
PRESETS = (qwen3_30b_a3b,)

OWN = {"intermediate_size": 6144, "num_key_value_heads": 4, "attention_bias": False}
MIXTURE = {"moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128}
FIELDS = Fields(
    read=SHAPE | READ | OWN | MIXTURE,
    nullable=frozenset({"sliding_window", "mlp_only_layers"}),
    zero=frozenset({"sliding_window"}),
    ignored=TRAINING | {"max_window_layers"},
)


def from_hf(config: Config) -> Transformer:
    """With `use_sliding_window` all layers are windowed: the reference does not look at `max_window_layers` here."""
    c = read_fields(renamed(config), FIELDS)
    window = c["sliding_window"] if c["use_sliding_window"] else None
    pattern: Pattern = Full() if window is None else Local(window)
    bias = c["attention_bias"]
    spec = spec_from(c, [pattern] * c["num_hidden_layers"], bias, bias, False)
    return sparse_from(c, with_blocks(spec, lambda i, block: normalised(block, "head")), None)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    window = window_fields([block.attn.pattern for block in layers_of(spec)])["sliding_window"]
    windows = {"use_sliding_window": window is not None, "sliding_window": window}
    bias = {"attention_bias": attention_of(MODEL_TYPE, spec).qkv_bias}
    return sparse_to(spec, MODEL_TYPE, ARCHITECTURES[0]) | windows | bias


def names(spec: Transformer) -> list[Rule]:
    """Qwen3's table with experts."""
    return names_with(spec, NORMS + QK_NORMS + EXPERTS)
