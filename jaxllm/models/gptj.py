"""GPT-J (Wang & Komatsuzaki 2021): attention and feed-forward under one norm, interleaved rotary, a head with bias."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Block, LayerNorm, LMHead, Rope, Transformer, decoder
from jaxllm.models.common import Config, Fields, activation_from, activation_to, read_fields, rope_of
from jaxllm.models.gpt_like import (
    feed_forward,
    first_layer,
    head,
    head_width,
    names_with,
    norm,
    projections,
    published,
    written,
)
from jaxllm.rules import Rule


def gptj_6b() -> Transformer:
    """6,050,882,784 parameters."""
    return published(from_hf, "gptj_6b", model_type=MODEL_TYPE)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "gptj"
ARCHITECTURES = ("GPTJForCausalLM",)
PREFIX = "transformer."
PRESETS = (gptj_6b,)

SUMMARY = {f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")}
FIELDS = Fields(
    read={
        "vocab_size": 50_400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_inner": int,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    only={"rotary": (True,), "scale_attn_weights": (True,)},
    ignored=frozenset({"n_ctx", *SUMMARY}),
    aliases={
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
)

TOP = norm("transformer.ln_f", "norm") + head("lm_head") + (("transformer.wte.weight", "embed/tokens", None),)
BLOCK = norm("ln_1", "attn_norm") + projections("attn", "out_proj") + feed_forward("mlp.fc_in", "mlp.fc_out")


def from_hf(config: Config) -> Transformer:
    """The first `rotary_dim` dimensions of each head are rotated."""
    c = read_fields(config, FIELDS)
    dim, heads, layer_norm = c["n_embd"], c["n_head"], LayerNorm(float(c["layer_norm_epsilon"]))
    width = head_width(dim, heads)
    rope = Rope(fraction=c["rotary_dim"] / width, interleaved=True)
    act = activation_from(c["activation_function"], "activation_function")
    block = Block(GQA(heads, heads, width, rope), MLP(c["n_inner"] or 4 * dim, act, bias=True), layer_norm, "shared")
    return Transformer(
        vocab=c["vocab_size"],
        dim=dim,
        stacks=decoder(block, layers=c["n_layer"]),
        norm=layer_norm,
        context=c["n_positions"],
        head=LMHead(c["tie_word_embeddings"], bias=True),
        name=MODEL_TYPE,
    )


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    _, attn, ffn, layer_norm = first_layer(MODEL_TYPE, spec, MLP)
    rotated = rope_of(MODEL_TYPE, spec, attn).width(attn.head_dim)
    values = (spec.vocab, spec.context, spec.dim, spec.layers, attn.heads, ffn.hidden, rotated)
    values += (activation_to(ffn.act), layer_norm.eps, spec.tied)
    return written(MODEL_TYPE, ARCHITECTURES[0], FIELDS.read, values)


def names(spec: Transformer) -> list[Rule]:
    """One norm per layer; the head's bias is there whether it is tied or not."""
    return names_with(spec, TOP, "transformer.h.{}.", BLOCK)
