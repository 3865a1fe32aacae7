"""ChatGLM 2 and 3, and GLM-4's first files (Du et al. 2022, Zeng et al. 2024): LLaMA under field names of its own.

The first half of each head is rotated in interleaved pairs, a few kv heads serve all queries, and q, k, v as well as
gate and up are one tensor each. `apply_query_key_layer_scaling` divides and multiplies scores by the same number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, GQA, Block, LayerNorm, LMHead, RMSNorm, Rope, Transformer, decoder
from jaxllm.models.common import Config, Fields, Row, plain_layer, read_fields, rope_of, table
from jaxllm.rules import Rule, Unused


def chatglm3_6b() -> Transformer:
    """6,243,584,000 parameters."""
    norm, attn = RMSNorm(1e-5), GQA(32, 2, 128, HALF, qkv_bias=True)
    stacks = decoder(Block(attn, GLU(13_696), norm), layers=28)
    return Transformer(65_024, 4096, stacks, norm, 8192, head=LMHead(), name="chatglm3_6b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "chatglm"
ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
PREFIX = "transformer."
PRESETS = (chatglm3_6b,)
HALF = Rope(10_000.0, 0.5, interleaved=True)

NEUTRAL = (  # the reference goes by padded_vocab_size; the others are precision, fusion, dropout
    "vocab_size apply_query_key_layer_scaling attention_softmax_in_fp32 fp32_residual_connection bias_dropout_fusion "
    "classifier_dropout prefix_projection"
)
PLAIN = ("apply_residual_connection_post_layernorm", "interleaved_qkv", "tie_word_embeddings")
FIELDS = Fields(
    read={
        "padded_vocab_size": 65_024,
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "multi_query_attention": False,
        "multi_query_group_num": 1,
        "ffn_hidden_size": 13_696,
        "seq_length": 2048,
        "layernorm_epsilon": 1e-5,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "rope_ratio": 1.0,
    },
    only=dict.fromkeys(PLAIN, (False,)) | {"original_rope": (True,), "pre_seq_len": (None,), "quantization_bit": (0,)},
    ignored=frozenset(NEUTRAL.split()),
)

TOP: tuple[Row, ...] = (
    ("transformer.embedding.word_embeddings.weight", "embed/tokens", None),
    ("transformer.encoder.final_layernorm.weight", "norm/scale", None),
    ("transformer.encoder.final_layernorm.bias", "norm/bias", None),
    ("transformer.output_layer.weight", "head/kernel", None),
)
BLOCK: tuple[Row, ...] = (
    ("input_layernorm.weight", "attn_norm/scale", None),
    ("input_layernorm.bias", "attn_norm/bias", None),
    ("self_attention.dense.weight", "attn/o/kernel", "D (N H) -> N H D"),
    ("self_attention.dense.bias", "attn/o/bias", None),
    ("post_attention_layernorm.weight", "ffn_norm/scale", None),
    ("post_attention_layernorm.bias", "ffn_norm/bias", None),
    ("mlp.dense_h_to_4h.weight", ("ffn/gate/kernel", "ffn/up/kernel"), "X D -> D X"),
    ("mlp.dense_h_to_4h.bias", ("ffn/gate/bias", "ffn/up/bias"), "X -> X"),
    ("mlp.dense_4h_to_h.weight", "ffn/down/kernel", "D F -> F D"),
    ("mlp.dense_4h_to_h.bias", "ffn/down/bias", None),
)
QKV = "self_attention.query_key_value"


def from_hf(config: Config) -> Transformer:
    """`rope_ratio` multiplies theta, as ChatGLM 3 and GLM-4 read it; `add_bias_linear` puts biases everywhere."""
    c = read_fields(config, FIELDS)
    heads, everywhere = c["num_attention_heads"], c["add_bias_linear"]
    kv_heads = c["multi_query_group_num"] if c["multi_query_attention"] else heads
    if c["multi_query_attention"] and kv_heads == heads:
        raise ValueError(
            f"config.json: multi_query_group_num={kv_heads} must be less than num_attention_heads={heads}; how as many "
            "are laid out is not published"
        )
    rope, eps = replace(HALF, theta=HALF.theta * c["rope_ratio"]), float(c["layernorm_epsilon"])
    norm = RMSNorm(eps) if c["rmsnorm"] else LayerNorm(eps)
    attn = GQA(heads, kv_heads, c["kv_channels"], rope, qkv_bias=everywhere or c["add_qkv_bias"], out_bias=everywhere)
    stacks = decoder(Block(attn, GLU(c["ffn_hidden_size"], bias=everywhere), norm), layers=c["num_layers"])
    final = norm if c["post_layer_norm"] else None
    return Transformer(
        c["padded_vocab_size"], c["hidden_size"], stacks, final, c["seq_length"], head=LMHead(), name="chatglm"
    )


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    attn, ffn = plain_layer(MODEL_TYPE, spec)
    norm, rope = spec.stacks[0].pattern[0].norm, rope_of(MODEL_TYPE, spec, attn)
    grouped = attn.kv_heads < attn.heads
    values = (spec.vocab, spec.dim, spec.layers, attn.heads, attn.head_dim, grouped, attn.kv_heads if grouped else 1)
    values += (ffn.hidden, spec.context, norm.eps, isinstance(norm, RMSNorm), spec.norm is not None)
    values += (attn.out_bias, attn.qkv_bias, rope.theta / HALF.theta)
    fields = dict(zip(FIELDS.read, values, strict=True))
    return {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURES[0]], "tie_word_embeddings": False} | fields


def names(spec: Transformer) -> list[Rule]:
    """q, k, v and gate, up are one tensor each; q, k, v head by head when they are equally many."""
    attn, _ = plain_layer(MODEL_TYPE, spec)
    theirs, ours = ("X H", "X") if attn.kv_heads < attn.heads else ("N X H", "(N X)")
    parts = [tuple(f"attn/{x}/{kind}" for x in "qkv") for kind in ("kernel", "bias")]
    rows = (
        (f"{QKV}.weight", parts[0], f"({theirs}) D -> D {ours} H"),
        (f"{QKV}.bias", parts[1], f"({theirs}) -> {ours} H"),
    )
    rules = table(spec, TOP, "transformer.encoder.layers.{}.", BLOCK + rows, sizes=(("N", attn.heads),))
    return [*rules, Unused("*.rotary_pos_emb.inv_freq")]
