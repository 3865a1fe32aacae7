"""Qwen2-VL (Wang et al. 2024): images of any size, 2-D rotation, 2 x 2 merging, M-RoPE in Qwen2."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Block, LayerNorm, Merger, Vision, VisionLanguage
from jaxllm.models import common, qwen_vl_like
from jaxllm.models.common import Config, Fields, Row
from jaxllm.models.qwen_vl_like import PATCHES, UNREAD, outer_to, patches_of, spec_of, tower_rope
from jaxllm.rules import Rule

MODEL_TYPE = "qwen2_vl"
ARCHITECTURES = ("Qwen2VLForConditionalGeneration",)
PREFIX = ""
SPEC = VisionLanguage
RENAMED = qwen_vl_like.RENAMED

VISION = Fields(
    read=PATCHES | {"embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4.0},
    ignored=UNREAD,
)
FFN: tuple[Row, ...] = (
    ("mlp.fc1.weight", "ffn/up/kernel", "F D -> D F"),
    ("mlp.fc1.bias", "ffn/up/bias", None),
    ("mlp.fc2.weight", "ffn/down/kernel", "D F -> F D"),
    ("mlp.fc2.bias", "ffn/down/bias", None),
)


def qwen2_vl_2b() -> VisionLanguage:
    """2,208,985,600 parameters."""
    text = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    return from_hf({"model_type": MODEL_TYPE, "text_config": text, "vision_config": {"hidden_size": 1536}})


PRESETS = (qwen2_vl_2b,)


def from_hf(config: Config) -> VisionLanguage:
    """Layers of the tower are those of a ViT, with LayerNorm."""
    return spec_of(config, VISION, _vision, MODEL_TYPE)


def _vision(c: Config) -> Vision:
    dim, heads = c["embed_dim"], c["num_heads"]
    rope = tower_rope(c["rope_parameters"], dim // heads)
    attn = GQA(heads, heads, dim // heads, rope, qkv_bias=True, out_bias=True)
    hidden = int(dim * c["mlp_ratio"])
    ffn = MLP(hidden, common.activation_from(c["hidden_act"], "hidden_act"), bias=True)
    stacks = common.stacks_of([Block(attn, ffn, LayerNorm(1e-6))] * c["depth"])
    return Vision(dim, stacks, patches_of(c), merge=c["spatial_merge_size"])


def to_hf(spec: VisionLanguage) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    if not isinstance(spec, VisionLanguage) or not isinstance(spec.adapter, Merger):
        raise common.foreign(MODEL_TYPE, spec)
    ffn, dim = common.layers_of(spec.vision)[0].ffn, spec.vision.dim
    if not isinstance(ffn, MLP):
        raise common.foreign(MODEL_TYPE, spec)
    ratio = ffn.hidden // dim if ffn.hidden % dim == 0 else ffn.hidden / dim
    own = {"embed_dim": dim, "hidden_size": spec.text.dim, "hidden_act": common.activation_to(ffn.act)}
    return outer_to(spec, MODEL_TYPE, ARCHITECTURES[0], own | {"mlp_ratio": ratio})


def names(spec: VisionLanguage) -> list[Rule]:
    """`visual.*` and `model.*`, as the hub has them."""
    return qwen_vl_like.names_of(spec, FFN)
