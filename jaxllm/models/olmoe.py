"""OLMoE (Muennighoff et al. 2024): 8 of 64 experts in every layer, norms over the whole of queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, Full, MoE, Router, Transformer
from jaxllm.models.common import Config, Fields, read_fields, with_blocks
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.models.sparse_like import (
    EXPERTS,
    QK_NORMS_ALL,
    TRAINING,
    attention_of,
    dense,
    mixture_of,
    normalised,
    one_name,
    sparse,
)
from jaxllm.rules import Rule


def olmoe_1b_7b() -> Transformer:
    """6,919,161,856 parameters (OLMoE-1B-7B-0924), of which a token meets 1.3 billion."""
    return replace(from_hf({"model_type": MODEL_TYPE, "intermediate_size": 1024}), name="olmoe_1b_7b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "olmoe"
ARCHITECTURES = ("OlmoeForCausalLM",)
PREFIX = "model."
PRESETS = (olmoe_1b_7b,)

OWN = {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "clip_qkv": None,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
FIELDS = Fields(read=SHAPE | OWN, ignored=TRAINING)


def from_hf(config: Config) -> Transformer:
    """`attention_bias` puts biases on q, k, v and o alike; `intermediate_size` is an expert's."""
    c = read_fields(one_name(config, "num_experts", "num_local_experts"), FIELDS)
    spec = spec_from(c, [Full()] * c["num_hidden_layers"], c["attention_bias"], c["attention_bias"], False)
    clip = None if c["clip_qkv"] is None else float(c["clip_qkv"])
    expert = spec.stacks[0].pattern[0].ffn
    assert isinstance(expert, GLU), "spec_from makes gated layers"
    mixture = MoE(expert, c["num_experts"], Router(c["num_experts_per_tok"], renormalise=c["norm_topk_prob"]))
    return sparse(with_blocks(spec, lambda i, block: normalised(block, "all", clip=clip)), mixture, lambda i: True)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    mixture, attn = mixture_of(MODEL_TYPE, spec)[0], attention_of(MODEL_TYPE, spec)
    router = {"num_experts_per_tok": mixture.router.top_k, "norm_topk_prob": mixture.router.renormalise}
    rest = {"num_experts": mixture.experts, "attention_bias": attn.qkv_bias, "clip_qkv": attn.clip}
    return config_of(dense(MODEL_TYPE, spec), MODEL_TYPE, ARCHITECTURES[0]) | router | rest


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with other norms, and experts."""
    return names_with(spec, NORMS + QK_NORMS_ALL + EXPERTS)
