"""Mistral (Jiang et al. 2023): LLaMA with a sliding window."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GLU, GQA, Block, Full, Local, Pattern, RMSNorm, Rope, Transformer, decoder
from jaxllm.models.common import Config, Fields, layers_of, read_fields
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.rules import Rule


def mistral_7b() -> Transformer:
    """7,241,732,096 parameters; the first version, with a window of 4,096."""
    attn = GQA(32, 8, 128, Rope(), Local(4096))
    block = Block(attn, GLU(14_336), RMSNorm())
    return Transformer(32_000, 4096, decoder(block, layers=32), RMSNorm(), 32_768, name="mistral_7b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "mistral"
ARCHITECTURES = ("MistralForCausalLM",)
PREFIX = "model."
PRESETS = (mistral_7b,)

FIELDS = Fields(
    read=SHAPE
    | {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    nullable=frozenset({"sliding_window", "num_key_value_heads"}),
)


def window_from(c: Config) -> Pattern:
    """What all layers see; null means everything."""
    return Full() if c["sliding_window"] is None else Local(c["sliding_window"])


def window_to(spec: Transformer) -> dict[str, Any]:
    """The inverse of `window_from`."""
    pattern = layers_of(spec)[0].attn.pattern
    return {"sliding_window": pattern.window if isinstance(pattern, Local) else None}


def from_hf(config: Config) -> Transformer:
    """The window is 4,096 unless the config says otherwise, as in the reference."""
    c = read_fields(config, FIELDS)
    return spec_from(c, [window_from(c)] * c["num_hidden_layers"], False, False, False)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    return config_of(spec, MODEL_TYPE, ARCHITECTURES[0]) | window_to(spec)


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table."""
    return names_with(spec, NORMS)
