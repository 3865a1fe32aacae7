"""Mixtral (Jiang et al. 2024): Mistral with 2 of 8 experts in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, MoE, Rope, Router, Transformer
from jaxllm.models import mistral
from jaxllm.models.common import Config, Fields, Row, read_fields
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.models.sparse_like import TRAINING, dense, mixture_of, one_name, sparse
from jaxllm.rules import Rule


def mixtral_8x7b() -> Transformer:
    """46,702,792,704 parameters, of which a token meets 12.9 billion."""
    return replace(from_hf({"model_type": MODEL_TYPE, "max_position_embeddings": 32_768}), name="mixtral_8x7b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "mixtral"
ARCHITECTURES = ("MixtralForCausalLM",)
PREFIX = "model."
PRESETS = (mixtral_8x7b,)

OWN = {"intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
FIELDS = Fields(
    read=SHAPE | OWN | {"sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8},
    nullable=frozenset({"num_key_value_heads"}),
    ignored=TRAINING,
)
EXPERTS: tuple[Row, ...] = (
    ("block_sparse_moe.gate.weight", "ffn/router/kernel", "E D -> D E"),
    ("block_sparse_moe.experts.{}.w1.weight", "ffn/experts/gate/kernel", "F D -> D F"),
    ("block_sparse_moe.experts.{}.w3.weight", "ffn/experts/up/kernel", "F D -> D F"),
    ("block_sparse_moe.experts.{}.w2.weight", "ffn/experts/down/kernel", "D F -> F D"),
)


def from_hf(config: Config) -> Transformer:
    """The chosen weights are renormalised; `intermediate_size` is an expert's."""
    c = read_fields(one_name(config, "num_local_experts", "num_experts"), FIELDS)
    patterns = [mistral.window_from(c)] * c["num_hidden_layers"]
    spec = spec_from(c, patterns, False, False, False, Rope(1e6))
    expert = spec.stacks[0].pattern[0].ffn
    assert isinstance(expert, GLU), "spec_from makes gated layers"
    return sparse(spec, MoE(expert, c["num_local_experts"], Router(c["num_experts_per_tok"])), lambda i: True)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    mixture = mixture_of(MODEL_TYPE, spec)[0]
    config = config_of(dense(MODEL_TYPE, spec), MODEL_TYPE, ARCHITECTURES[0])
    router = {"num_local_experts": mixture.experts, "num_experts_per_tok": mixture.router.top_k}
    return config | mistral.window_to(spec) | router


def names(spec: Transformer) -> list[Rule]:
    """Its experts have names of their own."""
    return names_with(spec, NORMS + EXPERTS)
