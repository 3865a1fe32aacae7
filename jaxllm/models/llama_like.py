"""What LLaMA's descendants share: the fields of their config.json, and the names of their tensors."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GLU, GQA, Block, LMHead, Pattern, RMSNorm, Rope, Transformer
from jaxllm.models.common import (
    Config,
    Row,
    activation_from,
    activation_to,
    foreign,
    plain_layer,
    rope_of,
    stacks_of,
    table,
)
from jaxllm.models.rope import rope_from, rope_to
from jaxllm.rules import Rule, Unused

SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
}

TOP: tuple[Row, ...] = (
    ("model.embed_tokens.weight", "embed/tokens", None),
    ("model.norm.weight", "norm/scale", None),
    ("lm_head.weight", "head/kernel", None),
)
ATTENTION: tuple[Row, ...] = (
    ("self_attn.q_proj.weight", "attn/q/kernel", "(N H) D -> D N H"),
    ("self_attn.k_proj.weight", "attn/k/kernel", "(K H) D -> D K H"),
    ("self_attn.v_proj.weight", "attn/v/kernel", "(K H) D -> D K H"),
    ("self_attn.o_proj.weight", "attn/o/kernel", "D (N H) -> N H D"),
    ("self_attn.q_proj.bias", "attn/q/bias", "(N H) -> N H"),
    ("self_attn.k_proj.bias", "attn/k/bias", "(K H) -> K H"),
    ("self_attn.v_proj.bias", "attn/v/bias", "(K H) -> K H"),
    ("self_attn.o_proj.bias", "attn/o/bias", None),
)
GATED: tuple[Row, ...] = (
    ("mlp.gate_proj.weight", "ffn/gate/kernel", "F D -> D F"),
    ("mlp.up_proj.weight", "ffn/up/kernel", "F D -> D F"),
    ("mlp.down_proj.weight", "ffn/down/kernel", "D F -> F D"),
    ("mlp.gate_proj.bias", "ffn/gate/bias", None),
    ("mlp.up_proj.bias", "ffn/up/bias", None),
    ("mlp.down_proj.bias", "ffn/down/bias", None),
)
FUSED_GATED: tuple[Row, ...] = (
    ("mlp.gate_up_proj.weight", ("ffn/gate/kernel", "ffn/up/kernel"), "X D -> D X"),
    ("mlp.down_proj.weight", "ffn/down/kernel", "D F -> F D"),
)
NORMS: tuple[Row, ...] = (
    ("input_layernorm.weight", "attn_norm/scale", None),
    ("post_attention_layernorm.weight", "ffn_norm/scale", None),
)


def spec_from(
    c: Config,
    patterns: list[Pattern],
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    rope: Rope = Rope(),
    partial: bool = False,
) -> Transformer:
    """The spec of read fields `c`, with one pattern per layer. rope, partial: see `rope_from`."""
    heads, norm = c["num_attention_heads"], RMSNorm(float(c["rms_norm_eps"]))
    rope = rope_from(c["rope_parameters"], c["max_position_embeddings"], rope, partial)
    kv_heads, width = c["num_key_value_heads"] or heads, c["head_dim"] or c["hidden_size"] // heads
    ffn = GLU(c["intermediate_size"], activation_from(c["hidden_act"], "hidden_act"), mlp_bias)

    def block(pattern: Pattern) -> Block:
        return Block(GQA(heads, kv_heads, width, rope, pattern, qkv_bias, out_bias), ffn, norm)

    stacks, context = stacks_of([block(p) for p in patterns]), c["max_position_embeddings"]
    name, tied = c["model_type"], c["tie_word_embeddings"]
    return Transformer(c["vocab_size"], c["hidden_size"], stacks, norm, context, head=LMHead(tied), name=name)


def config_of(spec: Transformer, model_type: str, architecture: str, rope: Rope | None = None) -> dict[str, Any]:
    """The fields of SHAPE for a spec whose layers differ in their pattern at most. rope: None for the first layer's."""
    (attn, ffn), norm = plain_layer(model_type, spec), spec.norm
    rope = rope_of(model_type, spec, attn) if rope is None else rope
    if not (isinstance(ffn, GLU) and isinstance(norm, RMSNorm)):
        raise foreign(model_type, spec)
    values = (spec.vocab, spec.dim, ffn.hidden, spec.layers, attn.heads, attn.kv_heads, attn.head_dim)
    values += (activation_to(ffn.act), spec.context, norm.eps, spec.tied, rope_to(rope))
    return {"model_type": model_type, "architectures": [architecture]} | dict(zip(SHAPE, values, strict=True))


def names_with(
    spec: Transformer,
    rows: tuple[Row, ...],
    sizes: tuple[tuple[str, int], ...] = (),
    ffn: tuple[Row, ...] = GATED,
) -> list[Rule]:
    """The table of a family with these rows (norms ...) in its layers; old files also hold frequency tables."""
    rules = table(spec, TOP, "model.layers.{}.", ATTENTION + ffn + rows, head="lm_head.weight", sizes=sizes)
    return [*rules, Unused("*.rotary_emb.inv_freq")]
