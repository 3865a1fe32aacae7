"""Qwen2-MoE (Qwen Team 2024): Qwen2 with 4 of 60 small experts, and a shared one behind a gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Full, Local, Pattern, Transformer
from jaxllm.models.common import Config, Fields, layer_patterns, read_fields
from jaxllm.models.llama_like import NORMS, SHAPE, names_with, spec_from
from jaxllm.models.qwen2 import windows_to
from jaxllm.models.qwen_moe_like import READ, renamed, sparse_from, sparse_to
from jaxllm.models.sparse_like import EXPERTS, TRAINING, attention_of, mixture_of, shared
from jaxllm.rules import Rule


def qwen15_moe_a27b() -> Transformer:
    """14,315,784,192 parameters (Qwen1.5-MoE-A2.7B), of which a token meets 2.7 billion."""
    rest = {"max_position_embeddings": 8192, "rope_parameters": {"rope_theta": 1e6}}
    return replace(from_hf({"model_type": MODEL_TYPE} | rest), name="qwen15_moe_a27b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "qwen2_moe"
ARCHITECTURES = ("Qwen2MoeForCausalLM",)
PREFIX = "model."
PRESETS = (qwen15_moe_a27b,)

OWN = {
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_window_layers": 28,
    "layer_types": None,
    "qkv_bias": True,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}
FIELDS = Fields(
    read=SHAPE | READ | OWN,
    nullable=frozenset({"sliding_window", "mlp_only_layers", "num_key_value_heads"}),
    zero=frozenset({"sliding_window", "max_window_layers"}),
    ignored=TRAINING,
)
GATE = ("mlp.shared_expert_gate.weight", "ffn/shared_gate/kernel", "I D -> D I")


def from_hf(config: Config) -> Transformer:
    """With `use_sliding_window` even layers below `max_window_layers` are windowed, or those of `layer_types`."""
    c = read_fields(renamed(config), FIELDS)
    window = c["sliding_window"] if c["use_sliding_window"] else None
    even: Pattern = Full() if window is None else Local(window)
    default = [Full() if i % 2 or i >= c["max_window_layers"] else even for i in range(c["num_hidden_layers"])]
    spec = spec_from(c, layer_patterns(c["layer_types"], window, default), c["qkv_bias"], False, False)
    return sparse_from(c, spec, c["shared_expert_intermediate_size"])


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    mixture = mixture_of(MODEL_TYPE, spec)[0]
    width = {} if mixture.shared is None else {"shared_expert_intermediate_size": mixture.shared.hidden}
    bias = {"qkv_bias": attention_of(MODEL_TYPE, spec).qkv_bias}
    return sparse_to(spec, MODEL_TYPE, ARCHITECTURES[0]) | windows_to(spec) | width | bias


def names(spec: Transformer) -> list[Rule]:
    """Qwen2's table with experts; the gate has one output."""
    return names_with(spec, NORMS + EXPERTS + shared("shared_expert") + (GATE,))
