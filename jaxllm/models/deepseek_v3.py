"""DeepSeek V3 (DeepSeek-AI 2024b): V2 with a sigmoid router, whose choice a bias corrects and weights sum to one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import MLA, Rope, Router, Transformer
from jaxllm.models.common import Config, Fields, layers_of, read_fields
from jaxllm.models.deepseek_like import IGNORED, NULLABLE, SHAPE, config_of, names_of, spec_from
from jaxllm.models.deepseek_v2 import YARN
from jaxllm.models.sparse_like import mixture_of, one_name
from jaxllm.rules import Rule


def deepseek_v3() -> Transformer:
    """671,026,419,200 parameters without multi-token prediction, of which a token meets 37 billion."""
    rope = {"max_position_embeddings": 163_840, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    return replace(from_hf({"model_type": MODEL_TYPE} | rope), name="deepseek_v3")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "deepseek_v3"
ARCHITECTURES = ("DeepseekV3ForCausalLM",)
PREFIX = "model."
PRESETS = (deepseek_v3,)

OWN = {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "rope_interleave": True,
}
FIELDS = Fields(
    read=SHAPE | OWN,
    nullable=NULLABLE | {"num_key_value_heads"},
    zero=frozenset({"first_k_dense_replace"}),
    only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ignored=IGNORED | {"num_nextn_predict_layers", "num_mtp_layers"},
)


def from_hf(config: Config) -> Transformer:
    """A group of experts counts as the sum of its best two."""
    c = read_fields(one_name(config, "n_routed_experts", "num_local_experts"), FIELDS)
    router = Router(
        c["num_experts_per_tok"],
        score="sigmoid",
        renormalise=c["norm_topk_prob"],
        scale=float(c["routed_scaling_factor"]),
        correction=True,
        groups=c["n_group"] or 1,
        top_groups=c["topk_group"] or 1,
        group_score="top2",
    )
    return spec_from(c, router, Rope(interleaved=c["rope_interleave"]), False)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    config, mixture = config_of(spec, MODEL_TYPE, ARCHITECTURES[0]), mixture_of(MODEL_TYPE, spec)[0]
    attn = layers_of(spec)[0].attn
    pairs = {"rope_interleave": isinstance(attn, MLA) and attn.position.interleaved}
    rest = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
    return config | {"norm_topk_prob": mixture.router.renormalise} | pairs | rest


def names(spec: Transformer) -> list[Rule]:
    """Shared with V2."""
    return names_of(spec)
