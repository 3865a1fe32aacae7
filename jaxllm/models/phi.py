"""Phi-1, 1.5 and 2 (Li et al. 2023): attention and feed-forward under one norm, partial rotary, biases everywhere."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Block, LayerNorm, LMHead, QKNorm, Rope, Transformer, decoder
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
from jaxllm.models.rope import rope_from, rope_to
from jaxllm.rules import Rule


def phi2() -> Transformer:
    """2,779,683,840 parameters."""
    shape = {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 32}
    return published(from_hf, "phi2", model_type=MODEL_TYPE, partial_rotary_factor=0.4, **shape)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "phi"
ARCHITECTURES = ("PhiForCausalLM",)
PREFIX = "model."
PRESETS = (phi2,)

FIELDS = Fields(
    read={
        "vocab_size": 51_200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": int,
        "head_dim": int,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "qk_layernorm": False,
        "rope_parameters": None,
    },
)

TOP = norm("model.final_layernorm", "norm") + head("lm_head") + (("model.embed_tokens.weight", "embed/tokens", None),)
BLOCK = (
    norm("input_layernorm", "attn_norm")
    + projections("self_attn", "dense")
    + norm("self_attn.q_layernorm", "attn/q_norm")
    + norm("self_attn.k_layernorm", "attn/k_norm")
    + feed_forward("mlp.fc1", "mlp.fc2")
)


def from_hf(config: Config) -> Transformer:
    """Half of each head is rotated unless the config says otherwise."""
    c = read_fields(config, FIELDS)
    dim, heads, context = c["hidden_size"], c["num_attention_heads"], c["max_position_embeddings"]
    layer_norm = LayerNorm(float(c["layer_norm_eps"]))
    kv_heads, width = c["num_key_value_heads"] or heads, c["head_dim"] or head_width(dim, heads)
    rope = rope_from(c["rope_parameters"], context, Rope(fraction=0.5), partial=True)
    qk_norm = QKNorm(layer_norm) if c["qk_layernorm"] else None
    ffn = MLP(c["intermediate_size"], activation_from(c["hidden_act"], "hidden_act"), bias=True)
    attn = GQA(heads, kv_heads, width, rope, qkv_bias=True, out_bias=True, qk_norm=qk_norm)
    stacks = decoder(Block(attn, ffn, layer_norm, "shared"), layers=c["num_hidden_layers"])
    lm_head = LMHead(c["tie_word_embeddings"], bias=True)
    return Transformer(c["vocab_size"], dim, stacks, layer_norm, context, head=lm_head, name=MODEL_TYPE)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    _, attn, ffn, layer_norm = first_layer(MODEL_TYPE, spec, MLP)
    rope = rope_of(MODEL_TYPE, spec, attn)
    values = (spec.vocab, spec.dim, ffn.hidden, spec.layers, attn.heads, attn.kv_heads, attn.head_dim)
    values += (activation_to(ffn.act), spec.context, layer_norm.eps, spec.tied, attn.qk_norm is not None)
    values += (rope_to(rope) | {"partial_rotary_factor": rope.fraction},)
    return written(MODEL_TYPE, ARCHITECTURES[0], FIELDS.read, values)


def names(spec: Transformer) -> list[Rule]:
    """One norm per layer; the head's bias is there whether it is tied or not."""
    return names_with(spec, TOP, "model.layers.{}.", BLOCK)
