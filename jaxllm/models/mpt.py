"""MPT (MosaicML 2023): ALiBi, no biases at all, norms too; q, k and v clipped if asked.

The reference knows a config field and computes something else for many of MPT's options: learned positions, biases,
normalised queries, scaled logits and another `alibi_bias_max` are in the config class and not in the model, and the
feed-forward width is 4 times the model's whatever `expansion_ratio` says. The former are refused.
"""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Alibi, Block, LayerNorm, LMHead, Transformer, decoder
from jaxllm.models.common import Config, Fields, read_fields
from jaxllm.models.gpt_like import (
    feed_forward,
    first_layer,
    head,
    head_width,
    joined,
    names_with,
    norm,
    published,
    written,
)
from jaxllm.rules import Rule


def mpt_7b() -> Transformer:
    """6,649,286,656 parameters, tied."""
    shape = {"vocab_size": 50_432, "d_model": 4096, "n_heads": 32, "n_layers": 32}
    return published(from_hf, "mpt_7b", model_type=MODEL_TYPE, **shape)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "mpt"
ARCHITECTURES = ("MptForCausalLM", "MPTForCausalLM")
PREFIX = "transformer."
PRESETS = (mpt_7b,)

UNREAD = {"expansion_ratio", "learned_pos_emb", "embedding_fraction"}  # the second is for models without ALiBi
FIELDS = Fields(
    read={
        "vocab_size": 50_368,
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "max_seq_len": 2048,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "attn_config": dict,
    },
    only={
        "no_bias": (True,),
        "logit_scale": (None,),
        "norm_type": ("low_precision_layernorm", "layernorm"),
    },
    ignored=frozenset({"init_device", "init_config", "emb_pdrop", "tokenizer_name", "verbose", *UNREAD}),
    aliases={"num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers"},
)
ATTENTION = Fields(
    read={"clip_qkv": float, "softmax_scale": float},
    only={
        "alibi": (True,),
        "alibi_bias_max": (8,),
        "attn_type": ("multihead_attention",),
        "qk_ln": (False,),
        "prefix_lm": (False,),
        "attn_uses_sequence_id": (False,),
    },
    ignored=frozenset({"attn_impl"}),
)

TOP = norm("transformer.norm_f", "norm") + head("lm_head") + (("transformer.wte.weight", "embed/tokens", None),)
BLOCK = (
    norm("norm_1", "attn_norm")
    + norm("norm_2", "ffn_norm")
    + joined("attn.Wqkv", "attn.out_proj")
    + feed_forward("ffn.up_proj", "ffn.down_proj")
)


def from_hf(config: Config) -> Transformer:
    """`clip_qkv` 0 is none, as in the reference."""
    c = read_fields(config, FIELDS)
    a = read_fields({**(c["attn_config"] or {}), "model_type": MODEL_TYPE}, ATTENTION)
    dim, heads, layer_norm = c["d_model"], c["n_heads"], LayerNorm(float(c["layer_norm_epsilon"]), bias=False)
    clip, scale = (None if a[name] is None else float(a[name]) for name in ("clip_qkv", "softmax_scale"))
    alibi, width = Alibi(order="alternated"), head_width(dim, heads)
    block = Block(GQA(heads, heads, width, alibi, scale=scale, clip=clip or None), MLP(4 * dim, "gelu"), layer_norm)
    stacks, tied = decoder(block, layers=c["n_layers"]), c["tie_word_embeddings"]
    return Transformer(c["vocab_size"], dim, stacks, layer_norm, c["max_seq_len"], head=LMHead(tied), name=MODEL_TYPE)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    _, attn, _, layer_norm = first_layer(MODEL_TYPE, spec, MLP)
    values = (spec.vocab, spec.dim, attn.heads, spec.layers, spec.context, layer_norm.eps, spec.tied)
    values += ({"clip_qkv": attn.clip, "softmax_scale": attn.scale},)
    return written(MODEL_TYPE, ARCHITECTURES[0], FIELDS.read, values)


def names(spec: Transformer) -> list[Rule]:
    """q, k and v are one tensor."""
    return names_with(spec, TOP, "transformer.blocks.{}.", BLOCK)
