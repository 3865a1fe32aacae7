"""GLM-4 9B (Zeng et al. 2024): LLaMA with half of each head rotated in interleaved pairs, and q, k, v biases."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GLU, GQA, Block, Full, LMHead, RMSNorm, Rope, Transformer, decoder
from jaxllm.models.common import Config, Fields, plain_layer, read_fields, rope_of
from jaxllm.models.llama_like import FUSED_GATED, NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.rules import Rule


def glm4_9b() -> Transformer:
    """9,399,951,360 parameters (glm-4-9b-chat-hf)."""
    norm, attn = RMSNorm(1.5625e-7), GQA(32, 2, 128, Rope(10_000.0, 0.5, True), qkv_bias=True)
    stacks = decoder(Block(attn, GLU(13_696), norm), layers=40)
    return Transformer(151_552, 4096, stacks, norm, 131_072, head=LMHead(), name="glm4_9b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "glm"
ARCHITECTURES = ("GlmForCausalLM",)
PREFIX = "model."
PRESETS = (glm4_9b,)
PREFERRED = True

GLM = {
    "vocab_size": 151_552,
    "intermediate_size": 13_696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}
FIELDS = Fields(read=SHAPE | GLM, nullable=frozenset({"num_key_value_heads", "head_dim"}))
DEFAULT = Rope(10_000.0, 0.5, interleaved=True)


def from_hf(config: Config) -> Transformer:
    """`attention_bias` is of q, k and v alone."""
    c = read_fields(config, FIELDS)
    return spec_from(c, [Full()] * c["num_hidden_layers"], c["attention_bias"], False, False, DEFAULT, partial=True)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    return config_with(spec, MODEL_TYPE, ARCHITECTURES[0])


def config_with(spec: Transformer, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields that both GLMs have."""
    config, (attn, _) = config_of(spec, model_type, architecture), plain_layer(model_type, spec)
    rope = config["rope_parameters"] | {"partial_rotary_factor": rope_of(model_type, spec, attn).fraction}
    return config | {"rope_parameters": rope, "attention_bias": attn.qkv_bias}


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with gate and up in one tensor."""
    return names_with(spec, NORMS, ffn=FUSED_GATED)
