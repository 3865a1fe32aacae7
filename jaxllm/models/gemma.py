"""Gemma 1 (Mesnard et al. 2024): LLaMA with norms of unit offset, scaled embeddings, wide heads and a GeGLU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, GQA, Block, Embedding, Full, LMHead, RMSNorm, Rope, Transformer, decoder
from jaxllm.models.common import Config, Fields, activation_from, plain_layer, read_fields, with_blocks
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.rules import Rule


def gemma_2b() -> Transformer:
    """2,506,172,416 parameters, tied, one kv head."""
    norm = RMSNorm(1e-6, unit_offset=True)
    block = Block(GQA(8, 1, 256, Rope()), GLU(16_384, "gelu_tanh"), norm)
    stacks, embed = decoder(block, layers=18), Embedding(scale=2048**0.5)
    return Transformer(256_000, 2048, stacks, norm, 8192, embed, LMHead(tied=True), name="gemma_2b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "gemma"
ARCHITECTURES = ("GemmaForCausalLM",)
PREFIX = "model."
PRESETS = (gemma_2b,)

GEMMA = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
FIELDS = Fields(read=SHAPE | GEMMA, only={"use_bidirectional_attention": (None, False)})


def from_hf(config: Config) -> Transformer:
    """`hidden_act` "gelu" means the tanh form, as the first files said it; `hidden_activation` must agree with it."""
    c = read_fields(config, FIELDS)
    act = "gelu_pytorch_tanh" if c["hidden_act"] == "gelu" else c["hidden_act"]
    other = c["hidden_activation"]
    if other is not None and activation_from(other, "hidden_activation") != activation_from(act, "hidden_act"):
        raise ValueError(
            f"config.json: hidden_act={c['hidden_act']!r} means {act!r}, hidden_activation is {other!r}; keep one"
        )
    full, bias = [Full()] * c["num_hidden_layers"], c["attention_bias"]
    spec, norm = spec_from(c | {"hidden_act": act}, full, bias, bias, False), RMSNorm(float(c["rms_norm_eps"]), True)
    return with_blocks(
        spec, lambda i, block: replace(block, norm=norm), norm=norm, embed=Embedding(scale=spec.dim**0.5)
    )


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    config, (attn, _) = config_of(spec, MODEL_TYPE, ARCHITECTURES[0]), plain_layer(MODEL_TYPE, spec)
    return config | {"hidden_activation": config["hidden_act"], "attention_bias": attn.qkv_bias}


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table."""
    return names_with(spec, NORMS)
