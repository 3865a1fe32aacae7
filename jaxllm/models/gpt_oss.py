"""GPT-OSS (OpenAI 2025): sinks, windows on every other layer, YaRN, experts with biases and a clipped Swish gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, Full, Local, MoE, Rope, Router, Transformer
from jaxllm.models.common import Config, Fields, Row, layer_patterns, layers_of, read_fields, window_fields, with_blocks
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.models.rope import ORIGINAL
from jaxllm.models.sparse_like import TRAINING, attention_of, dense, mixture_of, one_name, sparse
from jaxllm.rules import Rule


def gpt_oss_20b() -> Transformer:
    """20,914,757,184 parameters, of which a token meets 3.6 billion."""
    shape = {"num_hidden_layers": 24, "num_local_experts": 32}
    return replace(from_hf({"model_type": MODEL_TYPE} | shape), name="gpt_oss_20b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "gpt_oss"
ARCHITECTURES = ("GptOssForCausalLM",)
PREFIX = "model."
PRESETS = (gpt_oss_20b,)

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
OWN = {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": None,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
FIELDS = Fields(
    read=SHAPE | OWN,
    nullable=frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
    only={"hidden_act": ("silu",)},  # the reference never looks at it
    ignored=TRAINING | {"initial_context_length"},
)
EXPERTS: tuple[Row, ...] = (
    ("self_attn.sinks", "attn/sinks", None),
    ("mlp.router.weight", "ffn/router/kernel", "E D -> D E"),
    ("mlp.router.bias", "ffn/router/bias", None),
    ("mlp.experts.gate_up_proj", ("ffn/experts/gate/kernel", "ffn/experts/up/kernel"), "E D (F X) -> E D (F X)"),
    ("mlp.experts.gate_up_proj_bias", ("ffn/experts/gate/bias", "ffn/experts/up/bias"), "E (F X) -> E (F X)"),
    ("mlp.experts.down_proj", "ffn/experts/down/kernel", None),
    ("mlp.experts.down_proj_bias", "ffn/experts/down/bias", None),
)


def from_hf(config: Config) -> Transformer:
    """Even layers are windowed, unless `layer_types` says which are. Without a `rope_type` it is YaRN of factor 32."""
    c = read_fields(one_name(one_name(config, "num_local_experts", "num_experts"), *SECOND), FIELDS)
    rope = c["rope_parameters"] or {}
    if "rope_type" not in rope:
        c |= {"rope_parameters": YARN | {ORIGINAL: 4096} | rope}
    window, bias = c["sliding_window"], c["attention_bias"]
    default = [Full() if i % 2 or window is None else Local(window) for i in range(c["num_hidden_layers"])]
    patterns = layer_patterns(c["layer_types"], window, default)
    spec = spec_from(c, patterns, bias, bias, False, Rope(150_000.0))
    limit, beta = float(c["swiglu_limit"]), float(c["swiglu_alpha"])
    expert = GLU(c["intermediate_size"], "silu", bias=True, limit=limit, offset=1.0, beta=beta)
    mixture = MoE(expert, c["num_local_experts"], Router(c["num_experts_per_tok"], bias=True))
    sunk = with_blocks(spec, lambda i, block: replace(block, attn=replace(block.attn, sinks=True)))
    return sparse(sunk, mixture, lambda i: True)


SECOND = ("num_experts_per_tok", "experts_per_token")


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    (mixture, expert), attn = mixture_of(MODEL_TYPE, spec), attention_of(MODEL_TYPE, spec)
    config = config_of(dense(MODEL_TYPE, spec), MODEL_TYPE, ARCHITECTURES[0])
    gate = {"swiglu_alpha": expert.beta, "swiglu_limit": expert.limit, "attention_bias": attn.qkv_bias}
    router = {"num_local_experts": mixture.experts, "num_experts_per_tok": mixture.router.top_k}
    if config["rope_parameters"]["rope_type"] == "default":  # one more key, or the classic style would write null: YaRN
        config["rope_parameters"] |= {ORIGINAL: spec.context}
    return config | gate | router | window_fields([block.attn.pattern for block in layers_of(spec)])


def names(spec: Transformer) -> list[Rule]:
    """Gate and up are one tensor of all experts, their columns in turn."""
    return names_with(spec, NORMS + EXPERTS, sizes=(("X", 1),))
