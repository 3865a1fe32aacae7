"""BLOOM (Le Scao et al. 2022): ALiBi, and a norm right after the embedding."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Alibi, Block, Embedding, LayerNorm, LMHead, Transformer, decoder
from jaxllm.models.common import Config, Fields, read_fields
from jaxllm.models.gpt_like import (
    feed_forward,
    first_layer,
    grouped,
    head,
    head_width,
    names_with,
    norm,
    published,
    written,
)
from jaxllm.rules import Rule


def bloom_560m() -> Transformer:
    """559,214,592 parameters, tied."""
    shape = {"vocab_size": 250_880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}
    return published(from_hf, "bloom_560m", model_type=MODEL_TYPE, **shape)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "bloom"
ARCHITECTURES = ("BloomForCausalLM",)
PREFIX = "transformer."
PRESETS = (bloom_560m,)

TRAINING = "attention_softmax_in_fp32 masked_softmax_fusion bias_dropout_fusion skip_bias_add skip_bias_add_qkv"
FIELDS = Fields(
    read={
        "vocab_size": 250_880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    },
    only={"n_inner": (None,), "slow_but_exact": (False,)},  # "exact" products leave out biases
    ignored=frozenset({"pretraining_tp", "offset_alibi", *TRAINING.split()}),
    aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
)

TOP = (
    ("transformer.word_embeddings.weight", "embed/tokens", None),
    *norm("transformer.word_embeddings_layernorm", "embed/norm"),
    *norm("transformer.ln_f", "norm"),
    *head("lm_head"),
)
BLOCK = (
    norm("input_layernorm", "attn_norm")
    + norm("post_attention_layernorm", "ffn_norm")
    + grouped("self_attention.query_key_value", "self_attention.dense")
    + feed_forward("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
)


def from_hf(config: Config) -> Transformer:
    """`apply_residual_connection_post_layernorm` adds to what the norm gives, not to what it takes."""
    c = read_fields(config, FIELDS)
    dim, heads, layer_norm = c["hidden_size"], c["n_head"], LayerNorm(float(c["layer_norm_epsilon"]))
    attn = GQA(heads, heads, head_width(dim, heads), Alibi(), qkv_bias=True, out_bias=True)
    place = "normed" if c["apply_residual_connection_post_layernorm"] else "pre"
    block = Block(attn, MLP(4 * dim, "gelu_tanh", bias=True), layer_norm, place)
    return Transformer(
        vocab=c["vocab_size"],
        dim=dim,
        stacks=decoder(block, layers=c["n_layer"]),
        norm=layer_norm,
        context=c["seq_length"],
        embed=Embedding(norm=layer_norm),
        head=LMHead(c["tie_word_embeddings"]),
        name=MODEL_TYPE,
    )


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    block, attn, _, layer_norm = first_layer(MODEL_TYPE, spec, MLP)
    values = (spec.vocab, spec.dim, spec.layers, attn.heads, spec.context, layer_norm.eps)
    return written(MODEL_TYPE, ARCHITECTURES[0], FIELDS.read, (*values, block.place == "normed", spec.tied))


def names(spec: Transformer) -> list[Rule]:
    """q, k and v of a head stand together."""
    return names_with(spec, TOP, "transformer.h.{}.", BLOCK)
