"""OLMo (Groeneveld et al. 2024): LLaMA with a LayerNorm that has no weights, and queries, keys and values clipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Full, LayerNorm, RMSNorm, Transformer
from jaxllm.models.common import Config, Fields, read_fields, with_blocks
from jaxllm.models.llama_like import SHAPE, config_of, names_with, spec_from
from jaxllm.models.sparse_like import attention_of
from jaxllm.rules import Rule

EPS = 1e-5
NORM = LayerNorm(EPS, bias=False, scale=False)


def olmo_1b() -> Transformer:
    """1,176,764,416 parameters, tied."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16}
    return replace(from_hf({"model_type": MODEL_TYPE, "tie_word_embeddings": True} | shape), name="olmo_1b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "olmo"
ARCHITECTURES = ("OlmoForCausalLM",)
PREFIX = "model."
PRESETS = (olmo_1b,)

OWN = {"vocab_size": 50_304, "attention_bias": False, "clip_qkv": None}
FIELDS = Fields(read={name: value for name, value in (SHAPE | OWN).items() if name != "rms_norm_eps"})


def from_hf(config: Config) -> Transformer:
    """`attention_bias` puts biases on q, k, v and o alike; the norm's eps is no field."""
    c: dict[str, Any] = read_fields(config, FIELDS) | {"rms_norm_eps": EPS}
    spec = spec_from(c, [Full()] * c["num_hidden_layers"], c["attention_bias"], c["attention_bias"], False)
    clip = None if c["clip_qkv"] is None else float(c["clip_qkv"])
    return with_blocks(spec, lambda i, b: replace(b, norm=NORM, attn=replace(b.attn, clip=clip)), norm=NORM)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    attn = attention_of(MODEL_TYPE, spec)
    config = config_of(replace(spec, norm=RMSNorm(EPS)), MODEL_TYPE, ARCHITECTURES[0])
    del config["rms_norm_eps"]
    return config | {"attention_bias": attn.qkv_bias, "clip_qkv": attn.clip}


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table without norms."""
    return names_with(spec, ())
