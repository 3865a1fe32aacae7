"""Granite 3 (IBM 2024): LLaMA with muP-like multipliers on embeddings, scores, residual branches and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Block, Embedding, Full, LMHead, Transformer
from jaxllm.models.common import Config, Fields, layers_of, plain_layer, read_fields, with_blocks
from jaxllm.models.llama import llama
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.nn.attention import scale_of
from jaxllm.nn.head import lm_head
from jaxllm.rules import Rule


def granite3_2b() -> Transformer:
    """2,533,531,648 parameters, tied (granite-3.0-2b)."""
    spec = llama("granite3_2b", (40, 2048, 32, 8, 64, 49_155, 8192), tied=True)
    return multiplied(spec, {"embedding": 12.0, "attention": 0.015625, "residual": 0.22}, 8.0)


def multiplied(spec: Transformer, by: dict[str, float], divisor: float) -> Transformer:
    """The spec with Granite's multipliers, its logits divided by `divisor`."""

    def layer(i: int, block: Block) -> Block:
        return replace(block, attn=replace(block.attn, scale=by["attention"]), branch_scale=by["residual"])

    embed = Embedding(scale=None if by["embedding"] == 1.0 else by["embedding"])
    return with_blocks(spec, layer, embed=embed, head=LMHead(spec.tied, scale=1 / divisor))


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "granite"
ARCHITECTURES = ("GraniteForCausalLM",)
PREFIX = "model."
PRESETS = (granite3_2b,)

MULTIPLIERS = ("embedding", "attention", "residual")
SCALES = {f"{name}_multiplier": 1.0 for name in MULTIPLIERS} | {"logits_scaling": 1.0}
FIELDS = Fields(read=SHAPE | SCALES | {"attention_bias": False, "mlp_bias": False})


def from_hf(config: Config) -> Transformer:
    """`attention_multiplier` takes the place of 1 / sqrt(head width)."""
    c = read_fields(config, FIELDS)
    bias, by = c["attention_bias"], {name: float(c[f"{name}_multiplier"]) for name in MULTIPLIERS}
    spec = spec_from(c, [Full()] * c["num_hidden_layers"], bias, bias, c["mlp_bias"])
    return multiplied(spec, by, float(c["logits_scaling"]))


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    config, (attn, ffn) = config_of(spec, MODEL_TYPE, ARCHITECTURES[0]), plain_layer(MODEL_TYPE, spec)
    values = (spec.embed.scale or 1.0, scale_of(attn), layers_of(spec)[0].branch_scale, _divisor(lm_head(spec).scale))
    return config | dict(zip(SCALES, values, strict=True)) | {"attention_bias": attn.qkv_bias, "mlp_bias": ffn.bias}


def _divisor(scale: float) -> float:
    """The short decimal whose inverse is `scale`."""
    return float(f"{1 / scale:.12g}")


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table."""
    return names_with(spec, NORMS)
