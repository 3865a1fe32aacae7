"""Command R (Cohere 2024): attention and feed-forward side by side on one bias-free LayerNorm, interleaved rotary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, GQA, Block, Full, LayerNorm, LMHead, Pattern, QKNorm, RMSNorm, Rope, Transformer, decoder
from jaxllm.models import common
from jaxllm.models.common import Config, Fields, Row
from jaxllm.models.llama_like import SHAPE, config_of, names_with, spec_from
from jaxllm.models.sparse_like import QK_NORMS
from jaxllm.nn.head import lm_head
from jaxllm.rules import Rule


def command_r() -> Transformer:
    """34,980,831,232 parameters, tied (c4ai-command-r-v01)."""
    norm, attn = LayerNorm(1e-5, bias=False), GQA(64, 64, 128, Rope(8e6, interleaved=True))
    stacks = decoder(Block(attn, GLU(22_528), norm, place="shared"), layers=40)
    return Transformer(256_000, 8192, stacks, norm, 8192, head=LMHead(True, scale=0.0625), name="command_r")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "cohere"
ARCHITECTURES = ("CohereForCausalLM",)
PREFIX = "model."
PRESETS = (command_r,)

COHERE = {
    "vocab_size": 256_000,
    "hidden_size": 8192,
    "intermediate_size": 22_528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
FIELDS = Fields(
    read=SHAPE | COHERE | {"use_qk_norm": False},
    nullable=frozenset({"use_qk_norm"}),
    ignored=frozenset({"model_max_length", "pretraining_tp"}),
)
DEFAULT = Rope(500_000.0, interleaved=True)
NORM: tuple[Row, ...] = (("input_layernorm.weight", "attn_norm/scale", None),)


def spec_with(c: Config, patterns: Sequence[Pattern], qk_norm: bool) -> Transformer:
    """The spec of either Cohere's read fields, with one pattern per layer."""
    norm = LayerNorm(float(c["layer_norm_eps"]), bias=False)
    bias, each = c["attention_bias"], QKNorm(norm, "each") if qk_norm else None
    spec = spec_from(c, list(patterns), bias, bias, False, DEFAULT)
    head = LMHead(c["tie_word_embeddings"], scale=float(c["logit_scale"]))

    def layer(i: int, block: Block) -> Block:
        return replace(block, attn=replace(block.attn, qk_norm=each), norm=norm, place="shared")  # type: ignore[call-arg]

    return common.with_blocks(spec, layer, norm=norm, head=head)


def config_with(spec: Transformer, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields that both Coheres have."""
    attn, norm = common.plain_layer(model_type, spec)[0], spec.norm
    if not isinstance(norm, LayerNorm):
        raise common.foreign(model_type, spec)
    alike = replace(spec, norm=RMSNorm(norm.eps))
    config = config_of(alike, model_type, architecture, common.first_rope(spec, DEFAULT))
    own = {"logit_scale": lm_head(spec).scale, "attention_bias": attn.qkv_bias}
    return config | {"layer_norm_eps": config.pop("rms_norm_eps")} | own


def from_hf(config: Config) -> Transformer:
    """`use_qk_norm` (Command R+) normalises queries and keys, each head with its own weights."""
    c = common.read_fields(config, FIELDS)
    return spec_with(c, [Full()] * c["num_hidden_layers"], bool(c["use_qk_norm"]))


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    config, (attn, _) = config_with(spec, MODEL_TYPE, ARCHITECTURES[0]), common.plain_layer(MODEL_TYPE, spec)
    return config | {"use_qk_norm": attn.qk_norm is not None}


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with one norm."""
    return names_with(spec, NORM + QK_NORMS)
