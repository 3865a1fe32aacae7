"""OPT (Zhang et al. 2022): GPT-3 with ReLU; the 350M model normalises after each branch and has narrow embeddings."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Block, Embedding, LayerNorm, Learned, LMHead, Transformer, decoder
from jaxllm.models.common import Config, Fields, activation_from, activation_to, read_fields
from jaxllm.models.gpt_like import (
    feed_forward,
    first_layer,
    head_width,
    names_with,
    norm,
    projections,
    published,
    written,
)
from jaxllm.rules import Rule

OFFSET = 2  # rows of the position table that no position reads


def opt_125m() -> Transformer:
    """125,239,296 parameters, tied."""
    return published(from_hf, "opt_125m", model_type=MODEL_TYPE)


def opt_350m() -> Transformer:
    """331,196,416 parameters, tied: embeddings of width 512, norms after, none at the end."""
    shape = {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    kind = {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
    return published(from_hf, "opt_350m", model_type=MODEL_TYPE, **shape, **kind)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "opt"
ARCHITECTURES = ("OPTForCausalLM",)
PREFIX = "model."
PRESETS = (opt_125m, opt_350m)

FIELDS = Fields(
    read={
        "vocab_size": 50_272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "word_embed_proj_dim": int,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    ignored=frozenset({"dropout", "activation_dropout", "layerdrop", "init_std"}),
)

TOP = (
    *norm("model.decoder.final_layer_norm", "norm"),
    ("model.decoder.embed_tokens.weight", "embed/tokens", None),
    ("model.decoder.embed_positions.weight", "embed/positions", None),
    ("model.decoder.project_in.weight", "embed/projection/kernel", "D d -> d D"),
    ("model.decoder.project_out.weight", "head/projection/kernel", "d D -> D d"),
    ("lm_head.weight", "head/kernel", None),
)
BLOCK = (
    norm("self_attn_layer_norm", "attn_norm")
    + norm("final_layer_norm", "ffn_norm")
    + projections("self_attn", "out_proj")
    + feed_forward("fc1", "fc2")
)


def from_hf(config: Config) -> Transformer:
    """The norms' eps is no field."""
    c = read_fields(config, FIELDS)
    dim, heads, bias, rows = c["hidden_size"], c["num_attention_heads"], c["enable_bias"], c["max_position_embeddings"]
    weights, before = c["layer_norm_elementwise_affine"], c["do_layer_norm_before"]
    layer_norm = LayerNorm(bias=weights, scale=weights)
    act = activation_from(c["activation_function"], "activation_function")
    attn = GQA(heads, heads, head_width(dim, heads), qkv_bias=bias, out_bias=bias)
    block = Block(attn, MLP(c["ffn_dim"], act, bias), layer_norm, place="pre" if before else "post")
    narrow = c["word_embed_proj_dim"]
    return Transformer(
        vocab=c["vocab_size"],
        dim=dim,
        stacks=decoder(block, layers=c["num_hidden_layers"]),
        norm=layer_norm if before and not c["_remove_final_layer_norm"] else None,
        context=rows,
        embed=Embedding(Learned(rows, OFFSET), dim=None if narrow == dim else narrow),
        head=LMHead(c["tie_word_embeddings"]),
        name=MODEL_TYPE,
    )


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    block, attn, ffn, layer_norm = first_layer(MODEL_TYPE, spec, MLP)
    before, width = block.place == "pre", spec.embed.dim or spec.dim
    values = (spec.vocab, spec.dim, ffn.hidden, spec.layers, attn.heads, spec.context, activation_to(ffn.act), width)
    values += (before, before and spec.norm is None, attn.qkv_bias, layer_norm.scale, spec.tied)
    return written(MODEL_TYPE, ARCHITECTURES[0], FIELDS.read, values)


def names(spec: Transformer) -> list[Rule]:
    """A layer's final_layer_norm stands before its feed-forward layer, the decoder's at the end."""
    return names_with(spec, TOP, "model.decoder.layers.{}.", BLOCK)
