"""Baichuan 1 and 2 (Yang et al. 2023): LLaMA with q, k, v in one tensor; 13B has ALiBi, Baichuan 2 a normalised head.

The published code is four files for one `model_type`. What they differ in is read from the fields that each one's
config class has: `max_position_embeddings` means rotary (7B), only `model_max_length` ALiBi (13B); `z_loss_weight`, or
Baichuan 2's vocabulary of 125,696, means that the rows of the head are divided by their norms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Alibi, Block, Full, LMHead, Rope, Transformer
from jaxllm.models.common import Config, Fields, Row, layers_of, read_fields, table, with_blocks
from jaxllm.models.llama import llama
from jaxllm.models.llama_like import ATTENTION, GATED, NORMS, SHAPE, TOP, config_of, spec_from
from jaxllm.nn.head import lm_head
from jaxllm.rules import Rule, Unused


def baichuan_7b() -> Transformer:
    """7,000,559,616 parameters."""
    return llama("baichuan_7b", (32, 4096, 32, 32, 128, 64_000, 11_008), eps=1e-6)


def baichuan2_7b() -> Transformer:
    """7,505,973,248 parameters."""
    return replace(baichuan_7b(), vocab=NORMALISED_VOCAB, head=LMHead(normalised=True), name="baichuan2_7b")


def baichuan2_13b() -> Transformer:
    """13,896,668,160 parameters."""
    shape = (40, 5120, 40, 40, 128, NORMALISED_VOCAB, 13_696)
    spec = replace(llama("baichuan2_13b", shape, eps=1e-6), head=LMHead(normalised=True))
    return with_blocks(spec, _with_alibi)


def _with_alibi(i: int, block: Block) -> Block:
    return replace(block, attn=replace(block.attn, position=Alibi()))


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "baichuan"
ARCHITECTURES = ("BaichuanForCausalLM", "BaiChuanForCausalLM")
PREFIX = "model."
PRESETS = (baichuan_7b, baichuan2_7b, baichuan2_13b)
NORMALISED_VOCAB = 125_696

BAICHUAN = {
    "vocab_size": 64_000,
    "max_position_embeddings": None,
    "model_max_length": 4096,
    "z_loss_weight": None,
    "hidden_act": "silu",
}
UNSAID = ("num_key_value_heads", "head_dim", "rope_parameters")  # what the published code has no fields for
FIELDS = Fields(
    read={k: v for k, v in SHAPE.items() if k not in UNSAID} | BAICHUAN,
    only={"rope_parameters": (None, {"rope_type": "default"}, {"rope_theta": 10_000.0})},
    ignored=frozenset({"_from_model_config"}),
)
WHOLE: tuple[Row, ...] = (
    ("self_attn.W_pack.weight", ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"), "(X H) D -> D X H"),
)


def from_hf(config: Config) -> Transformer:
    """See above for what the fields mean."""
    c = read_fields(config, FIELDS)
    rotary, full = c["max_position_embeddings"] is not None, [Full()] * c["num_hidden_layers"]
    context = c["max_position_embeddings"] if rotary else c["model_max_length"]
    c |= dict.fromkeys(UNSAID) | {"max_position_embeddings": context}
    normalised = c["z_loss_weight"] is not None or c["vocab_size"] == NORMALISED_VOCAB
    spec = replace(
        spec_from(c, full, False, False, False), head=LMHead(c["tie_word_embeddings"], normalised=normalised)
    )
    return spec if rotary else with_blocks(spec, _with_alibi)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    rotary, head = isinstance(layers_of(spec)[0].attn.position, Rope), lm_head(spec)
    config = {k: v for k, v in config_of(spec, MODEL_TYPE, ARCHITECTURES[0], Rope()).items() if k not in UNSAID}
    context = config.pop("max_position_embeddings")
    config["max_position_embeddings" if rotary else "model_max_length"] = context
    return config | ({"z_loss_weight": 0.0} if head.normalised else {})


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with one tensor for q, k and v."""
    rows = WHOLE + ATTENTION[3:4] + GATED + NORMS
    rules = table(spec, TOP, "model.layers.{}.", rows, head="lm_head.weight")
    return [*rules, Unused("*.rotary_emb.inv_freq")]
