"""OLMo 2 (Walsh et al. 2024): norms after attention and feed-forward, and over the whole of queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Full, Transformer
from jaxllm.models.common import Config, Fields, Row, read_fields, with_blocks
from jaxllm.models.llama_like import SHAPE, config_of, names_with, spec_from
from jaxllm.models.sparse_like import QK_NORMS_ALL, attention_of, normalised
from jaxllm.rules import Rule


def olmo2_7b() -> Transformer:
    """7,298,617,344 parameters (OLMo-2-1124-7B)."""
    rest = {"vocab_size": 100_352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    rope = {"rope_parameters": {"rope_theta": 500_000.0}}
    return replace(from_hf({"model_type": MODEL_TYPE} | rest | rope), name="olmo2_7b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "olmo2"
ARCHITECTURES = ("Olmo2ForCausalLM",)
PREFIX = "model."
PRESETS = (olmo2_7b,)

FIELDS = Fields(read=SHAPE | {"vocab_size": 50_304, "rms_norm_eps": 1e-5, "attention_bias": False})
NORMS: tuple[Row, ...] = (
    ("post_attention_layernorm.weight", "attn_norm/scale", None),
    ("post_feedforward_layernorm.weight", "ffn_norm/scale", None),
)


def from_hf(config: Config) -> Transformer:
    """`attention_bias` puts biases on q, k, v and o alike."""
    c = read_fields(config, FIELDS)
    spec = spec_from(c, [Full()] * c["num_hidden_layers"], c["attention_bias"], c["attention_bias"], False)
    return with_blocks(spec, lambda i, block: replace(normalised(block, "all"), place="output"))


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    bias = {"attention_bias": attention_of(MODEL_TYPE, spec).qkv_bias}
    return config_of(spec, MODEL_TYPE, ARCHITECTURES[0]) | bias


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with other norms."""
    return names_with(spec, NORMS + QK_NORMS_ALL)
