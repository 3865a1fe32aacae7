"""Mistral (Jiang et al. 2023): LLaMA with a sliding window."""

from __future__ import annotations

from typing import Any

from jaxllm.config import Full, Local, Pattern, Transformer
from jaxllm.convert.rules import Rule
from jaxllm.models.common import Config, Fields, layers_of, read_fields
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from

MODEL_TYPE = "mistral"
ARCHITECTURES = ("MistralForCausalLM",)
PREFIX = "model."

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


def from_hf(config: Config) -> Transformer:
    """The window is 4,096 unless the config says otherwise, as in the reference; null means none."""
    c = read_fields(config, FIELDS)
    window = c["sliding_window"]
    pattern: Pattern = Full() if window is None else Local(window)
    return spec_from(c, [pattern] * c["num_hidden_layers"], False, False, False)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    pattern = layers_of(spec)[0].attn.pattern
    window = pattern.window if isinstance(pattern, Local) else None
    return config_of(spec, MODEL_TYPE, ARCHITECTURES[0]) | {"sliding_window": window}


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table."""
    return names_with(spec, NORMS)
