"""LLaMA and its kin: pre-norm, RMSNorm, rotary, grouped queries, SwiGLU. Also SmolLM2, Yi; the base of others."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GLU, GQA, Block, Full, Llama3, LMHead, Pattern, RMSNorm, Rope, Scaling, Transformer, decoder
from jaxllm.models.common import Config, Fields, plain_layer, read_fields
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.rules import Rule


def llama(
    name: str,
    shape: tuple[int, int, int, int, int, int, int],
    *,
    theta: float = 10_000.0,
    scaling: Scaling | None = None,
    eps: float = 1e-5,
    context: int = 4096,
    tied: bool = False,
    qkv_bias: bool = False,
) -> Transformer:
    """shape: (layers, dim, heads, kv_heads, head_dim, vocab, hidden)."""
    layers, dim, heads, kv_heads, head_dim, vocab, hidden = shape
    attn = GQA(heads, kv_heads, head_dim, position=Rope(theta, scaling=scaling), qkv_bias=qkv_bias)
    block = Block(attn, GLU(hidden, "silu"), RMSNorm(eps))
    return Transformer(vocab, dim, decoder(block, layers=layers), RMSNorm(eps), context, head=LMHead(tied), name=name)


def llama2_7b() -> Transformer:
    """6,738,415,616 parameters (Touvron et al. 2023b)."""
    return llama("llama2_7b", (32, 4096, 32, 32, 128, 32_000, 11_008))


def llama3_8b() -> Transformer:
    """8,030,261,248 parameters (Grattafiori et al. 2024), Llama 3 with a context of 8,192."""
    return llama("llama3_8b", (32, 4096, 32, 8, 128, 128_256, 14_336), theta=500_000.0, context=8192)


def llama31_8b() -> Transformer:
    """8,030,261,248 parameters: Llama 3 8B with Llama 3.1's frequencies, for a context of 131,072."""
    return llama(
        "llama31_8b", (32, 4096, 32, 8, 128, 128_256, 14_336), theta=500_000.0, scaling=Llama3(8.0), context=131_072
    )


def llama3_70b() -> Transformer:
    """70,553,706,496 parameters."""
    return llama("llama3_70b", (80, 8192, 64, 8, 128, 128_256, 28_672), theta=500_000.0, context=8192)


def llama32_1b() -> Transformer:
    """1,235,814,400 parameters, tied."""
    return llama(
        "llama32_1b",
        (16, 2048, 32, 8, 64, 128_256, 8192),
        theta=500_000.0,
        scaling=Llama3(32.0),
        context=131_072,
        tied=True,
    )


def smollm2_135m() -> Transformer:
    """134,515,008 parameters, tied (Allal et al. 2025)."""
    return llama("smollm2_135m", (30, 576, 9, 3, 64, 49_152, 1536), theta=100_000.0, context=8192, tied=True)


def yi_6b() -> Transformer:
    """6,061,035,520 parameters (01.AI 2024)."""
    return llama("yi_6b", (32, 4096, 32, 4, 128, 64_000, 11_008), theta=5e6)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)
PREFIX = "model."
PRESETS = (llama2_7b, llama3_8b, llama31_8b, llama3_70b, llama32_1b, smollm2_135m, yi_6b)
PREFERRED = True

FIELDS = Fields(
    read=SHAPE | {"attention_bias": False, "mlp_bias": False},
    only={"rope_interleaved": (False,)},
    ignored=frozenset({"pretraining_tp", "max_sequence_length"}),
)


def from_hf(config: Config) -> Transformer:
    """`attention_bias` puts biases on q, k, v and o alike."""
    c = read_fields(config, FIELDS)
    patterns: list[Pattern] = [Full()] * c["num_hidden_layers"]
    return spec_from(c, patterns, c["attention_bias"], c["attention_bias"], c["mlp_bias"])


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    config = config_of(spec, MODEL_TYPE, ARCHITECTURES[0])
    attn, ffn = plain_layer(MODEL_TYPE, spec)
    return config | {"attention_bias": attn.qkv_bias, "mlp_bias": ffn.bias}


def names(spec: Transformer) -> list[Rule]:
    """The common table with two norms."""
    return names_with(spec, NORMS)
