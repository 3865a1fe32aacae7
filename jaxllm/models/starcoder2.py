"""StarCoder2 (Lozhkov et al. 2024): grouped queries and a window, with LayerNorm and a plain feed-forward layer."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Block, Full, LayerNorm, LMHead, Local, Transformer, decoder
from jaxllm.models.common import Config, Fields, activation_from, activation_to, read_fields, rope_of
from jaxllm.models.gpt_like import feed_forward, first_layer, head_width, names_with, norm, published, written
from jaxllm.models.llama_like import ATTENTION
from jaxllm.models.llama_like import TOP as LLAMA_TOP
from jaxllm.models.rope import rope_from, rope_to
from jaxllm.rules import Rule


def starcoder2_3b() -> Transformer:
    """3,030,371,328 parameters, tied."""
    positions = {"max_position_embeddings": 16_384, "rope_theta": 999_999.4420358813, "sliding_window": 4096}
    return published(from_hf, "starcoder2_3b", model_type=MODEL_TYPE, **positions)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "starcoder2"
ARCHITECTURES = ("Starcoder2ForCausalLM",)
PREFIX = "model."
PRESETS = (starcoder2_3b,)

UNREAD = {"activation_function", "layer_norm_epsilon"}  # published beside hidden_act and norm_epsilon
FIELDS = Fields(
    read={
        "vocab_size": 49_152,
        "hidden_size": 3072,
        "intermediate_size": 12_288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "head_dim": int,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": True,
        "sliding_window": int,
        "rope_parameters": None,
    },
    only={"mlp_type": ("default",), "norm_type": ("layer_norm",), "scale_attn_weights": (True,)},
    ignored=frozenset({"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "residual_dropout", *UNREAD}),
)

TOP = (*LLAMA_TOP, ("model.norm.bias", "norm/bias", None))
NORMS = norm("input_layernorm", "attn_norm") + norm("post_attention_layernorm", "ffn_norm")
BLOCK = ATTENTION + feed_forward("mlp.c_fc", "mlp.c_proj") + NORMS


def from_hf(config: Config) -> Transformer:
    """`use_bias` puts biases on all linear layers."""
    c = read_fields(config, FIELDS)
    dim, heads, context = c["hidden_size"], c["num_attention_heads"], c["max_position_embeddings"]
    layer_norm, bias, window = LayerNorm(float(c["norm_epsilon"])), c["use_bias"], c["sliding_window"]
    width, rope = c["head_dim"] or head_width(dim, heads), rope_from(c["rope_parameters"], context)
    block = Block(
        GQA(heads, c["num_key_value_heads"], width, rope, Full() if window is None else Local(window), bias, bias),
        MLP(c["intermediate_size"], activation_from(c["hidden_act"], "hidden_act"), bias),
        layer_norm,
    )
    stacks, head = decoder(block, layers=c["num_hidden_layers"]), LMHead(c["tie_word_embeddings"])
    return Transformer(c["vocab_size"], dim, stacks, layer_norm, context, head=head, name=MODEL_TYPE)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    _, attn, ffn, layer_norm = first_layer(MODEL_TYPE, spec, MLP)
    window = attn.pattern.window if isinstance(attn.pattern, Local) else None
    values = (spec.vocab, spec.dim, ffn.hidden, spec.layers, attn.heads, attn.kv_heads, attn.head_dim)
    values += (activation_to(ffn.act), spec.context, layer_norm.eps, spec.tied, ffn.bias, window)
    values += (rope_to(rope_of(MODEL_TYPE, spec, attn)),)
    return written(MODEL_TYPE, ARCHITECTURES[0], FIELDS.read, values)


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's names but for the feed-forward layer."""
    return names_with(spec, TOP, "model.layers.{}.", BLOCK)
