"""What DeepSeek V2 and V3 share: latent attention, dense first layers, and experts of which some are shared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, MLA, Block, LMHead, MoE, RMSNorm, Rope, Router, Transformer, Yarn
from jaxllm.models.common import Config, Row, activation_from, activation_to, foreign, layers_of, stacks_of
from jaxllm.models.llama_like import NORMS, names_with
from jaxllm.models.rope import mscale, rope_from, rope_to
from jaxllm.models.sparse_like import EXPERTS, TRAINING, mixture_of, shared
from jaxllm.nn.attention import scale_of
from jaxllm.rules import Rule, Unused

SHAPE: dict[str, Any] = {
    "vocab_size": 102_400,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": None,
    "routed_scaling_factor": 1.0,
    "n_group": None,
    "topk_group": None,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_parameters": None,
}
NULLABLE = frozenset({"q_lora_rank", "n_shared_experts", "n_group", "topk_group"})
IGNORED = TRAINING | {"aux_loss_alpha", "seq_aux", "pretraining_tp", "ep_size", "head_dim", "qk_head_dim"}
"""Of training and of serving; the widths are always made of others."""

LATENT_EPS = 1e-6  # of the norms inside attention, whatever rms_norm_eps says
ATTENTION: tuple[Row, ...] = (
    ("self_attn.q_a_proj.weight", "attn/q_down/kernel", "R D -> D R"),
    ("self_attn.q_a_proj.bias", "attn/q_down/bias", None),
    ("self_attn.q_a_layernorm.weight", "attn/q_norm/scale", None),
    ("self_attn.q_b_proj.weight", "attn/q_up/kernel", "(N H) R -> R N H"),
    ("self_attn.kv_a_proj_with_mqa.weight", ("attn/kv_down/kernel", "attn/k_rope/kernel"), "X D -> D X"),
    ("self_attn.kv_a_proj_with_mqa.bias", ("attn/kv_down/bias", "attn/k_rope/bias"), "X -> X"),
    ("self_attn.kv_a_layernorm.weight", "attn/kv_norm/scale", None),
    ("self_attn.kv_b_proj.weight", ("attn/k_up/kernel", "attn/v_up/kernel"), "(N X) R -> R N X"),
)


def attention_from(c: Config, rope: Rope) -> MLA:
    """`mscale_all_dim` of YaRN is a temperature of the scores: its square multiplies their usual scale."""
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    if kv_heads not in (None, heads):
        raise ValueError(f"config.json: num_key_value_heads must be num_attention_heads={heads}, found {kv_heads}")
    rope = rope_from(c["rope_parameters"], c["max_position_embeddings"], rope)
    ranks, widths = (c["q_lora_rank"], c["kv_lora_rank"]), (c["qk_nope_head_dim"], c["qk_rope_head_dim"])
    norm, always = RMSNorm(LATENT_EPS), (c["rope_parameters"] or {}).get("mscale_all_dim")
    scale = None
    if always and isinstance(rope.scaling, Yarn):
        scale = _scale(sum(widths), rope.scaling.factor, always)
    return MLA(heads, *ranks, *widths, c["v_head_dim"], rope, norm, bias=c["attention_bias"], scale=scale)


def _scale(width: int, factor: float, always: float) -> float:
    return width**-0.5 * mscale(factor, always) * mscale(factor, always)


def spec_from(c: Config, router: Router, rope: Rope, mlp_bias: bool) -> Transformer:
    """From layer `first_k_dense_replace` on, the multiples of `moe_layer_freq` are mixtures."""
    attn, norm = attention_from(c, rope), RMSNorm(float(c["rms_norm_eps"]))
    act, width = activation_from(c["hidden_act"], "hidden_act"), c["moe_intermediate_size"]
    extra = None if c["n_shared_experts"] is None else GLU(width * c["n_shared_experts"], act, mlp_bias)
    mixture = MoE(GLU(width, act), c["n_routed_experts"], router, extra)
    dense = Block(attn, GLU(c["intermediate_size"], act, mlp_bias), norm)
    first, every = c["first_k_dense_replace"], c["moe_layer_freq"]
    layers = [
        replace(dense, ffn=mixture) if i >= first and i % every == 0 else dense for i in range(c["num_hidden_layers"])
    ]
    context, head = c["max_position_embeddings"], LMHead(c["tie_word_embeddings"])
    return Transformer(
        c["vocab_size"], c["hidden_size"], stacks_of(layers), norm, context, head=head, name=c["model_type"]
    )


def config_of(spec: Transformer, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields of SHAPE."""
    (mixture, expert), layers, norm = mixture_of(model_type, spec), layers_of(spec), spec.norm
    attn, router = layers[0].attn, mixture.router
    dense = next((block.ffn for block in layers if isinstance(block.ffn, GLU)), expert)
    if not (isinstance(attn, MLA) and isinstance(norm, RMSNorm)):
        raise foreign(model_type, spec)
    at = [i for i, block in enumerate(layers) if isinstance(block.ffn, MoE)]
    every = at[1] - at[0] if len(at) > 1 else 1
    values = (spec.vocab, spec.dim, dense.hidden, expert.hidden, spec.layers, attn.heads, attn.heads, attn.kv_rank)
    values += (attn.q_rank, attn.nope_dim, attn.rope_dim, attn.value_dim)
    values += (None if mixture.shared is None else mixture.shared.hidden // expert.hidden, mixture.experts)
    values += (router.top_k, router.scale, router.groups, router.top_groups, at[0], every, activation_to(dense.act))
    values += (spec.context, norm.eps, attn.bias, spec.tied, _rope_to(model_type, spec, attn))
    return {"model_type": model_type, "architectures": [architecture]} | dict(zip(SHAPE, values, strict=True))


def _rope_to(model_type: str, spec: Transformer, attn: MLA) -> dict[str, Any]:
    """`rope_parameters` with YaRN's two weights of its temperatures, the shortest decimals that give them exactly."""
    out, rope = rope_to(attn.position), attn.position.scaling
    if attn.scale is None:
        return out
    if not isinstance(rope, Yarn) or rope.factor <= 1:
        raise foreign(model_type, spec)
    width = attn.nope_dim + attn.rope_dim
    always = ((scale_of(attn) * width**0.5) ** 0.5 - 1) / (mscale(rope.factor) - 1)
    tried = [round(always, digits) for digits in range(1, 17)]
    found = [weight for weight in tried if _scale(width, rope.factor, weight) == attn.scale]
    if not found:
        raise foreign(model_type, spec)
    return out | ({"mscale": found[0]} if rope.temperature == 1.0 else {}) | {"mscale_all_dim": found[0]}


def names_of(spec: Transformer) -> list[Rule]:
    """LLaMA's table with latent attention and experts. Layers past the last are of multi-token prediction: unused."""
    rules = names_with(spec, (*NORMS, *ATTENTION, *EXPERTS, *shared("shared_experts"), *CORRECTION))
    return [*rules, Unused(f"model.layers.{spec.layers}.*")]


CORRECTION: tuple[Row, ...] = (("mlp.gate.e_score_correction_bias", "ffn/router/correction", None),)
