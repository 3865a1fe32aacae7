"""Qwen3 (Yang et al. 2025): Qwen2 without biases, and with an RMSNorm over each head of queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Transformer
from jaxllm.models import qwen2
from jaxllm.models.common import Config, Fields, read_fields, with_blocks
from jaxllm.models.llama_like import NORMS, config_of, names_with, spec_from
from jaxllm.models.sparse_like import QK_NORMS, attention_of, normalised
from jaxllm.rules import Rule


def qwen3_06b() -> Transformer:
    """596,049,920 parameters, tied."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    rest = {"num_key_value_heads": 8, "max_position_embeddings": 40_960, "tie_word_embeddings": True}
    rope = {"rope_parameters": {"rope_theta": 1e6}}
    return replace(from_hf({"model_type": MODEL_TYPE} | shape | rest | rope), name="qwen3_06b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "qwen3"
ARCHITECTURES = ("Qwen3ForCausalLM",)
PREFIX = "model."
PRESETS = (qwen3_06b,)

FIELDS = Fields(
    read={**qwen2.FIELDS.read, "head_dim": 128, "attention_bias": False},
    nullable=qwen2.FIELDS.nullable | {"head_dim"},
    zero=qwen2.FIELDS.zero,
)


def from_hf(config: Config) -> Transformer:
    """Windows as in Qwen2; `attention_bias` puts biases on q, k, v and o alike."""
    c = read_fields(config, FIELDS)
    spec = spec_from(c, qwen2.windows_from(c), c["attention_bias"], c["attention_bias"], False)
    return with_blocks(spec, lambda i, block: normalised(block, "head"))


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    bias = {"attention_bias": attention_of(MODEL_TYPE, spec).qkv_bias}
    return config_of(spec, MODEL_TYPE, ARCHITECTURES[0]) | qwen2.windows_to(spec) | bias


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with the two norms."""
    return names_with(spec, NORMS + QK_NORMS)
