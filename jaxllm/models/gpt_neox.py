"""GPT-NeoX and Pythia (Black et al. 2022, §2.1): attention and feed-forward side by side, each with its own norm."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Block, LayerNorm, LMHead, Rope, Transformer, decoder
from jaxllm.models.common import Config, Fields, activation_from, activation_to, read_fields, rope_of
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
from jaxllm.models.rope import rope_from, rope_to
from jaxllm.rules import Rule


def pythia_160m() -> Transformer:
    """162,322,944 parameters (Biderman et al. 2023)."""
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    return published(from_hf, "pythia_160m", model_type=MODEL_TYPE, vocab_size=50_304, **shape)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "gpt_neox"
ARCHITECTURES = ("GPTNeoXForCausalLM",)
PREFIX = "gpt_neox."
PRESETS = (pythia_160m,)

FIELDS = Fields(
    read={
        "vocab_size": 50_432,
        "hidden_size": 6144,
        "intermediate_size": 24_576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rope_parameters": None,
    },
    ignored=frozenset({"classifier_dropout", "rotary_pct", "rotary_emb_base"}),  # rotary: in rope_parameters by now
)

TOP = (
    norm("gpt_neox.final_layer_norm", "norm")
    + head("embed_out")
    + (("gpt_neox.embed_in.weight", "embed/tokens", None),)
)
BLOCK = (
    norm("input_layernorm", "attn_norm")
    + norm("post_attention_layernorm", "ffn_norm")
    + grouped("attention.query_key_value", "attention.dense")
    + feed_forward("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
)


def from_hf(config: Config) -> Transformer:
    """A quarter of each head is rotated unless the config says otherwise."""
    c = read_fields(config, FIELDS)
    dim, heads, bias = c["hidden_size"], c["num_attention_heads"], c["attention_bias"]
    context, layer_norm = c["max_position_embeddings"], LayerNorm(float(c["layer_norm_eps"]))
    rope = rope_from(c["rope_parameters"], context, Rope(fraction=0.25), partial=True)
    block = Block(
        GQA(heads, heads, head_width(dim, heads), rope, qkv_bias=bias, out_bias=bias),
        MLP(c["intermediate_size"], activation_from(c["hidden_act"], "hidden_act"), bias=True),
        layer_norm,
        place="parallel" if c["use_parallel_residual"] else "pre",
    )
    stacks, tied = decoder(block, layers=c["num_hidden_layers"]), c["tie_word_embeddings"]
    return Transformer(c["vocab_size"], dim, stacks, layer_norm, context, head=LMHead(tied), name=MODEL_TYPE)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`. The reference looks for rotary settings under the names that only this family has."""
    block, attn, ffn, layer_norm = first_layer(MODEL_TYPE, spec, MLP)
    rope = rope_of(MODEL_TYPE, spec, attn)
    values = (spec.vocab, spec.dim, ffn.hidden, spec.layers, attn.heads, activation_to(ffn.act), spec.context)
    values += (layer_norm.eps, spec.tied, block.place == "parallel", attn.qkv_bias)
    values += (rope_to(rope) | {"partial_rotary_factor": rope.fraction},)
    own = {"rotary_pct": rope.fraction, "rotary_emb_base": rope.theta}
    return written(MODEL_TYPE, ARCHITECTURES[0], FIELDS.read, values) | own


def names(spec: Transformer) -> list[Rule]:
    """q, k and v of a head stand together."""
    return names_with(spec, TOP, "gpt_neox.layers.{}.", BLOCK, alias="embed_out.weight")
