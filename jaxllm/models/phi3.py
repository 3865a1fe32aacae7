"""Phi-3, Phi-3.5, Phi-4 (Abdin et al. 2024): LLaMA with q, k, v and gate, up in one tensor each, and LongRoPE.

`original_max_position_embeddings` stands beside the rotary settings, where it has priority over a copy among them.
"""

from __future__ import annotations

import math
from typing import Any

from jaxllm.config import Full, Local, LongRope, Pattern, Transformer
from jaxllm.models.common import Config, Fields, layers_of, plain_layer, read_fields, rope_of
from jaxllm.models.gpt_like import joined, names_with, published
from jaxllm.models.llama_like import FUSED_GATED, NORMS, SHAPE, TOP, config_of, spec_from
from jaxllm.models.rope import ORIGINAL, rope_to
from jaxllm.rules import Rule


def phi3_mini() -> Transformer:
    """3,821,079,552 parameters: Phi-3-mini-4k, with a window of 2,047 (Abdin et al. 2024)."""
    return published(from_hf, "phi3_mini", model_type=MODEL_TYPE, sliding_window=2047)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "phi3"
ARCHITECTURES = ("Phi3ForCausalLM",)
PREFIX = "model."
PRESETS = (phi3_mini,)

PHI3 = {
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": int,
    "num_key_value_heads": int,
    "head_dim": int,
    ORIGINAL: 4096,
}
PLAIN: dict[str, tuple[bool, ...]] = dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False,))
DENSE: dict[str, tuple[int, ...]] = dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,))
FIELDS = Fields(
    read=SHAPE | PHI3,
    only={**PLAIN, **DENSE},
)


def from_hf(config: Config) -> Transformer:
    """The rotary types "su" and "yarn" mean LongRoPE here."""
    c = read_fields(config, FIELDS)
    window = c["sliding_window"]
    patterns: list[Pattern] = [Full() if window is None else Local(window)] * c["num_hidden_layers"]
    rope = {ORIGINAL: c[ORIGINAL]} | (c["rope_parameters"] or {})
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ValueError(f"config.json of phi3: rope_type must be 'default' or 'longrope', found {kind!r}")
    rope["rope_type"] = "default" if kind == "default" else "longrope"
    return spec_from(c | {"rope_parameters": rope}, patterns, False, False, False, partial=True)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`; keys that the reference derives are left out, as version 4 knows only three."""
    rope = rope_of(MODEL_TYPE, spec, plain_layer(MODEL_TYPE, spec)[0])
    parameters, original = rope_to(rope), spec.context
    if isinstance(rope.scaling, LongRope):
        original = parameters.pop(ORIGINAL)
        if rope.scaling.temperature == _temperature(spec.context, original):
            del parameters["attention_factor"]
    windows = [b.attn.pattern.window for b in layers_of(spec) if isinstance(b.attn.pattern, Local)]
    config = config_of(spec, MODEL_TYPE, ARCHITECTURES[0]) | {"rope_parameters": parameters}
    return config | {"sliding_window": min(windows, default=None), ORIGINAL: original}


def _temperature(context: int, original: int) -> float:
    """The reference's, where the config gives none."""
    return 1.0 if context <= original else math.sqrt(1 + math.log(context / original) / math.log(original))


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with fewer, wider tensors."""
    attention = joined("self_attn.qkv_proj", "self_attn.o_proj")
    return names_with(spec, TOP, "model.layers.{}.", attention + FUSED_GATED + NORMS)
