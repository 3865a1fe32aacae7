"""Gemma 3, its text model (Kamath et al. 2025): five local layers to a global one, each kind with its own rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, GQA, Block, Embedding, Full, LMHead, Local, QKNorm, RMSNorm, Rope, Transformer
from jaxllm.models import common
from jaxllm.models.common import Config, Fields
from jaxllm.models.gemma2 import NORMS
from jaxllm.models.llama_like import SHAPE, config_of, names_with, spec_from
from jaxllm.models.rope import rope_from, rope_to
from jaxllm.models.sparse_like import QK_NORMS
from jaxllm.nn.attention import scale_of
from jaxllm.nn.head import lm_head
from jaxllm.rules import Rule


def gemma3_1b() -> Transformer:
    """999,885,952 parameters, tied. Windows of 512, a global layer after every five, 26 layers in all."""
    norm = RMSNorm(1e-6, unit_offset=True)
    attn = GQA(4, 1, 256, Rope(10_000.0), Local(512), qk_norm=QKNorm(norm), scale=256**-0.5)
    local = Block(attn, GLU(6912, "gelu_tanh"), norm, place="sandwich")
    globl = replace(local, attn=replace(attn, position=Rope(1e6), pattern=Full()))
    layers = [globl if kind == FULL else local for kind in common.every(6, 26)]
    embed, head = Embedding(scale=1152**0.5), LMHead(tied=True)
    return Transformer(262_144, 1152, common.stacks_of(layers), norm, 32_768, embed, head, name="gemma3_1b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "gemma3_text"
ARCHITECTURES = ("Gemma3ForCausalLM",)
PREFIX = "model."
PRESETS = (gemma3_1b,)
FULL, SLIDING = "full_attention", "sliding_attention"

GEMMA3 = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256.0,
    "final_logit_softcapping": None,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "layer_types": None,
    "rope_local_base_freq": 10_000.0,
}
FIELDS = Fields(
    read=SHAPE | GEMMA3,
    nullable=frozenset({"sliding_window"}),
    only={"use_bidirectional_attention": (None, False)},
    ignored=frozenset({"attn_logit_softcapping", "_sliding_window_pattern"}),  # the reference never applies them
)


def from_hf(config: Config) -> Transformer:
    """Scores are not capped: the reference implementation reads `attn_logit_softcapping` and leaves it at that."""
    c = common.read_fields(config, FIELDS)
    of_global, of_local = _rotations(c)
    context, bias, window = c["max_position_embeddings"], c["attention_bias"], c["sliding_window"]
    local, scale = rope_from(of_local, context, Rope(c["rope_local_base_freq"])), c["query_pre_attn_scalar"] ** -0.5
    types = c["layer_types"] or common.every(c["sliding_window_pattern"], c["num_hidden_layers"])
    patterns = common.layer_patterns(types, window, [Full()] * c["num_hidden_layers"])
    plain = c | {"rope_parameters": of_global, "hidden_act": c["hidden_activation"]}
    spec, norm = spec_from(plain, patterns, bias, bias, False, Rope(1e6)), RMSNorm(float(c["rms_norm_eps"]), True)

    def layer(i: int, block: Block) -> Block:
        position = local if isinstance(patterns[i], Local) else block.attn.position
        attn = replace(block.attn, position=position, qk_norm=QKNorm(norm), scale=scale)  # type: ignore[call-arg]
        return replace(block, attn=attn, norm=norm, place="sandwich")

    head = LMHead(c["tie_word_embeddings"], softcap=c["final_logit_softcapping"])
    return common.with_blocks(spec, layer, norm=norm, embed=Embedding(scale=spec.dim**0.5), head=head)


def _rotations(c: Config) -> tuple[Config, Config]:
    """rope_parameters of global and of local layers; older files have only those of global ones."""
    given = c["rope_parameters"] or {}
    if not any(isinstance(value, Mapping) for value in given.values()):
        return given, {}
    if given.keys() - {FULL, SLIDING}:
        raise ValueError(f"config.json: rope_parameters must have {FULL} and {SLIDING}, found {sorted(given)}")
    return given.get(FULL) or {}, given.get(SLIDING) or {}


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    blocks, (attn, _) = common.layers_of(spec), common.plain_layer(MODEL_TYPE, spec)
    is_local = [isinstance(block.attn.pattern, Local) for block in blocks]
    ropes = {local: block.attn.position for local, block in zip(is_local, blocks, strict=True)}
    found = {kind: ropes.get(local, Rope()) for kind, local in ((FULL, False), (SLIDING, True))}
    if not all(isinstance(rope, Rope) for rope in found.values()):
        raise common.foreign(MODEL_TYPE, spec)
    config = config_of(spec, MODEL_TYPE, ARCHITECTURES[0], Rope())
    scale = {"query_pre_attn_scalar": round(scale_of(attn) ** -2), "attention_bias": attn.qkv_bias}
    caps = {"final_logit_softcapping": lm_head(spec).softcap, "attn_logit_softcapping": None}
    rotations = {"rope_parameters": {kind: rope_to(rope) for kind, rope in found.items()}}  # type: ignore[arg-type]
    windows = common.window_fields([block.attn.pattern for block in blocks])
    return config | {"hidden_activation": config["hidden_act"]} | scale | caps | rotations | windows


def names(spec: Transformer) -> list[Rule]:
    """Gemma 2's norms, and two more on queries and keys."""
    return names_with(spec, NORMS + QK_NORMS)
