"""GLM-4-0414: GLM with norms after attention and feed-forward as well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import RMSNorm, Transformer
from jaxllm.models import glm
from jaxllm.models.common import Config, Row, with_blocks
from jaxllm.models.llama_like import FUSED_GATED, names_with
from jaxllm.rules import Rule


def glm4_9b_0414() -> Transformer:
    """9,400,279,040 parameters (GLM-4-9B-0414)."""
    norm = RMSNorm(1e-5)
    return with_blocks(
        glm.glm4_9b(),
        lambda i, block: replace(block, norm=norm, place="sandwich"),
        norm=norm,
        context=32_768,
        name="glm4_9b_0414",
    )


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "glm4"
ARCHITECTURES = ("Glm4ForCausalLM",)
PREFIX = "model."
PRESETS = (glm4_9b_0414,)

NORMS: tuple[Row, ...] = (
    ("input_layernorm.weight", "attn_norm/scale", None),
    ("post_self_attn_layernorm.weight", "attn_post_norm/scale", None),
    ("post_attention_layernorm.weight", "ffn_norm/scale", None),
    ("post_mlp_layernorm.weight", "ffn_post_norm/scale", None),
)


def from_hf(config: Config) -> Transformer:
    """GLM's fields."""
    return with_blocks(glm.from_hf(config), lambda i, block: replace(block, place="sandwich"))


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    return glm.config_with(spec, MODEL_TYPE, ARCHITECTURES[0])


def names(spec: Transformer) -> list[Rule]:
    """GLM's table with four norms."""
    return names_with(spec, NORMS, ffn=FUSED_GATED)
