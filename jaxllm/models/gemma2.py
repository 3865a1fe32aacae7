"""Gemma 2 (Riviere et al. 2024): sandwich norms with unit offset, windows on every other layer, soft-capped logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, GQA, Block, Embedding, Full, LMHead, Local, RMSNorm, Rope, Transformer, decoder
from jaxllm.models import common
from jaxllm.models.common import Config, Fields, Row
from jaxllm.models.llama_like import SHAPE, config_of, names_with
from jaxllm.models.rope import rope_from
from jaxllm.nn.attention import scale_of
from jaxllm.nn.head import lm_head
from jaxllm.rules import Rule


def gemma2_2b() -> Transformer:
    """2,614,341,888 parameters, tied. Local layers come first, with a window of 4,096."""
    norm = RMSNorm(1e-6, unit_offset=True)
    attn = GQA(8, 4, 256, position=Rope(), softcap=50.0, scale=256**-0.5)
    globl = Block(attn, GLU(9216, "gelu_tanh"), norm, place="sandwich")
    local = replace(globl, attn=replace(attn, pattern=Local(4096)))
    return Transformer(
        vocab=256_000,
        dim=2304,
        stacks=decoder(local, globl, layers=26),
        norm=norm,
        context=8192,
        embed=Embedding(scale=2304**0.5),
        head=LMHead(tied=True, softcap=30.0),
        name="gemma2_2b",
    )


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "gemma2"
ARCHITECTURES = ("Gemma2ForCausalLM",)
PREFIX = "model."
PRESETS = (gemma2_2b,)

GEMMA2 = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "layer_types": None,
}
FIELDS = Fields(
    read=SHAPE | GEMMA2,
    nullable=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    only={"use_bidirectional_attention": (None, False)},
)

NORMS: tuple[Row, ...] = (
    ("input_layernorm.weight", "attn_norm/scale", None),
    ("post_attention_layernorm.weight", "attn_post_norm/scale", None),
    ("pre_feedforward_layernorm.weight", "ffn_norm/scale", None),
    ("post_feedforward_layernorm.weight", "ffn_post_norm/scale", None),
)


def from_hf(config: Config) -> Transformer:
    """Even layers are windowed, unless `layer_types` says which are."""
    c = common.read_fields(config, FIELDS)
    # the reference reads hidden_activation, never hidden_act
    norm, dim, window = RMSNorm(float(c["rms_norm_eps"]), unit_offset=True), c["hidden_size"], c["sliding_window"]
    scale, softcap, bias = c["query_pre_attn_scalar"] ** -0.5, c["attn_logit_softcapping"], c["attention_bias"]
    shape = (
        c["num_attention_heads"],
        c["num_key_value_heads"],
        c["head_dim"],
        rope_from(c["rope_parameters"], c["max_position_embeddings"]),
    )
    ffn = GLU(c["intermediate_size"], common.activation_from(c["hidden_activation"], "hidden_activation"))
    default = [Full() if i % 2 else Local(window) for i in range(c["num_hidden_layers"])]
    layers = [
        Block(GQA(*shape, pattern, bias, bias, softcap=softcap, scale=scale), ffn, norm, place="sandwich")
        for pattern in common.layer_patterns(c["layer_types"], window, default)
    ]
    return Transformer(
        vocab=c["vocab_size"],
        dim=dim,
        stacks=common.stacks_of(layers),
        norm=norm,
        context=c["max_position_embeddings"],
        embed=Embedding(scale=dim**0.5),
        head=LMHead(c["tie_word_embeddings"], softcap=c["final_logit_softcapping"]),
        name="gemma2",
    )


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    attn, ffn = common.plain_layer(MODEL_TYPE, spec)
    act = common.activation_to(ffn.act)
    config = config_of(spec, MODEL_TYPE, ARCHITECTURES[0]) | {"hidden_act": act, "hidden_activation": act}
    caps = {"attn_logit_softcapping": attn.softcap, "final_logit_softcapping": lm_head(spec).softcap}
    rest = {"attention_bias": attn.qkv_bias, "query_pre_attn_scalar": round(scale_of(attn) ** -2)}
    return config | caps | rest | common.window_fields([block.attn.pattern for block in common.layers_of(spec)])


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with four norms."""
    return names_with(spec, NORMS)
