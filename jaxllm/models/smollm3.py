"""SmolLM3 (Bakouch et al. 2025): LLaMA without any position in every fourth layer (NoPE)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Block, Full, Rope, Transformer
from jaxllm.models.common import (
    Config,
    Fields,
    first_rope,
    layer_patterns,
    layers_of,
    plain_layer,
    read_fields,
    window_fields,
    with_blocks,
)
from jaxllm.models.llama import llama
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.rules import Rule


def smollm3_3b() -> Transformer:
    """3,075,098,624 parameters, tied."""
    shape = (36, 2048, 16, 4, 128, 128_256, 11_008)
    spec = llama("smollm3_3b", shape, theta=5e6, eps=1e-6, context=65_536, tied=True)
    return without_rope(spec, [bool((i + 1) % 4) for i in range(36)])


def without_rope(spec: Transformer, rotated: list[bool]) -> Transformer:
    """The spec with no position in layers that are not `rotated`."""

    def layer(i: int, block: Block) -> Block:
        return block if rotated[i] else replace(block, attn=replace(block.attn, position=None))

    return with_blocks(spec, layer)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "smollm3"
ARCHITECTURES = ("SmolLM3ForCausalLM",)
PREFIX = "model."
PRESETS = (smollm3_3b,)

SMOLLM3 = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "layer_types": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
FIELDS = Fields(
    read=SHAPE | SMOLLM3,
    nullable=frozenset({"num_key_value_heads"}),
    ignored=frozenset({"pretraining_tp", "max_window_layers"}),
)
DEFAULT = Rope(2e6)


def from_hf(config: Config) -> Transformer:
    """`no_rope_layers` has a 1 for layers that do have rotary. Windows, if used, are on those that do not."""
    c = read_fields(config, FIELDS)
    layers, interval, bias = c["num_hidden_layers"], c["no_rope_layer_interval"], c["attention_bias"]
    listed = c["no_rope_layers"]
    rotated = [bool((i + 1) % interval) for i in range(layers)] if listed is None else [bool(x) for x in listed]
    if len(rotated) < layers:
        raise ValueError(f"config.json: no_rope_layers has {len(rotated)} entries for {layers} layers; give one each")
    window = c["sliding_window"] if c["use_sliding_window"] else None
    kinds = ["full_attention" if window is None or on else "sliding_attention" for on in rotated[:layers]]
    patterns = layer_patterns(c["layer_types"] or kinds, window, [Full()] * layers)
    return without_rope(spec_from(c, patterns, bias, bias, c["mlp_bias"], DEFAULT), rotated)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    blocks, (attn, ffn) = layers_of(spec), plain_layer(MODEL_TYPE, spec)
    windows = window_fields([block.attn.pattern for block in blocks])
    used = {"use_sliding_window": windows["sliding_window"] is not None}
    rotated = {"no_rope_layers": [int(block.attn.position is not None) for block in blocks]}
    config = config_of(spec, MODEL_TYPE, ARCHITECTURES[0], first_rope(spec, DEFAULT))
    return config | {"attention_bias": attn.qkv_bias, "mlp_bias": ffn.bias} | windows | used | rotated


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table."""
    return names_with(spec, NORMS)
