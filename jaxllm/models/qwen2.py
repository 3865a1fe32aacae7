"""Qwen2 and Qwen2.5 (Yang et al. 2024): LLaMA with biases on q, k and v, and a window on the upper layers if asked."""

from __future__ import annotations

from typing import Any

from jaxllm.config import Full, Local, Pattern, Transformer
from jaxllm.models.common import Config, Fields, layer_patterns, layers_of, read_fields, window_fields
from jaxllm.models.llama import llama
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.rules import Rule


def qwen2_05b() -> Transformer:
    """494,032,768 parameters, tied, with q/k/v biases."""
    return llama(
        "qwen2_05b", (24, 896, 14, 2, 64, 151_936, 4864), theta=1e6, eps=1e-6, context=32_768, tied=True, qkv_bias=True
    )


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "qwen2"
ARCHITECTURES = ("Qwen2ForCausalLM",)
PREFIX = "model."
PRESETS = (qwen2_05b,)

FIELDS = Fields(
    read=SHAPE
    | {
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    nullable=frozenset({"sliding_window", "num_key_value_heads"}),
    zero=frozenset({"sliding_window", "max_window_layers"}),
    only={"use_mrope": (False, None)},
)


def windows_from(c: Config) -> list[Pattern]:
    """Layers from `max_window_layers` up are windowed, unless `layer_types` says which are."""
    window = c["sliding_window"] if c["use_sliding_window"] else None
    upper: Pattern = Full() if window is None else Local(window)
    default = [Full() if i < c["max_window_layers"] else upper for i in range(c["num_hidden_layers"])]
    return layer_patterns(c["layer_types"], window, default)


def windows_to(spec: Transformer) -> dict[str, Any]:
    """The inverse of `windows_from`."""
    windows = window_fields([block.attn.pattern for block in layers_of(spec)])
    return windows | {"use_sliding_window": windows["sliding_window"] is not None}


def from_hf(config: Config) -> Transformer:
    """Biases on q, k and v."""
    c = read_fields(config, FIELDS)
    return spec_from(c, windows_from(c), True, False, False)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    return config_of(spec, MODEL_TYPE, ARCHITECTURES[0]) | windows_to(spec)


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table."""
    return names_with(spec, NORMS)
