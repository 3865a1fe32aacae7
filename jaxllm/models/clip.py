"""CLIP (Radford et al. 2021): a causal text tower read at its end-of-text token, a ViT read at its class token."""

from __future__ import annotations

from typing import Any

from jaxllm.architectures import model_params
from jaxllm.config import Embedding, LayerNorm, Learned, Transformer, TwoTower
from jaxllm.models import common
from jaxllm.models.clip_like import (
    BLOCK,
    IGNORED,
    VISION,
    block_of,
    layer_to,
    plain,
    section,
    vision_from,
    vision_names,
    vision_to,
)
from jaxllm.models.common import Config, Fields, Row
from jaxllm.rules import Rule, Tensor, Unused, applicable

MODEL_TYPE = "clip"
ARCHITECTURES = ("CLIPModel",)
PREFIX = ""
SPEC = TwoTower

PARTS = {"text_config": None, "vision_config": None, "text_config_dict": None, "vision_config_dict": None}
FIELDS = Fields(read={"projection_dim": 512, "logit_scale_init_value": 2.6592}, ignored=IGNORED)
TEXT = Fields(
    read={
        "vocab_size": 49_408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49_407,
    },
    ignored=IGNORED,
)
TOP: tuple[Row, ...] = (
    ("text_model.embeddings.token_embedding.weight", "embed/tokens", None),
    ("text_model.embeddings.position_embedding.weight", "embed/positions", None),
    ("text_model.final_layer_norm.weight", "norm/scale", None),
    ("text_model.final_layer_norm.bias", "norm/bias", None),
)
JOINT: tuple[Rule, ...] = (
    Tensor("text_projection.weight", ("text_projection/kernel",), "E D -> D E"),
    Tensor("visual_projection.weight", ("image_projection/kernel",), "E D -> D E"),
    Tensor("logit_scale", ("log_scale",)),
)


def clip_vit_b32() -> TwoTower:
    """151,277,313 parameters."""
    return from_hf({"model_type": "clip"})


PRESETS = (clip_vit_b32,)


def from_hf(config: Config) -> TwoTower:
    """An `eos_token_id` of 2 says that texts are read at their largest id: the first release's files have it so."""
    c = plain(config, PARTS, FIELDS)
    t, v = section(config, "text_config", TEXT), section(config, "vision_config", VISION)
    block, rows, eos = block_of(t), t["max_position_embeddings"], t["eos_token_id"]
    stacks = common.stacks_of([block] * t["num_hidden_layers"])
    embed, norm = Embedding(Learned(rows, by="slot")), block.norm
    text = Transformer(t["vocab_size"], t["hidden_size"], stacks, norm, rows, embed, head=None, name="clip_text")
    at, start = None if eos == 2 else eos, float(c["logit_scale_init_value"])
    return TwoTower(text, vision_from(v), c["projection_dim"], at, start, name="clip")


def to_hf(spec: TwoTower) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    if not isinstance(spec, TwoTower) or not isinstance(spec.text.norm, LayerNorm):
        raise common.foreign(MODEL_TYPE, spec)
    eos = {"eos_token_id": 2 if spec.eos is None else spec.eos}
    sizes = {"vocab_size": spec.vocab, "max_position_embeddings": spec.context, "projection_dim": spec.dim}
    return {
        "model_type": MODEL_TYPE,
        "architectures": list(ARCHITECTURES),
        "projection_dim": spec.dim,
        "logit_scale_init_value": spec.log_scale,
        "text_config": {"model_type": "clip_text_model"} | layer_to(MODEL_TYPE, spec.text) | sizes | eos,
        "vision_config": vision_to(MODEL_TYPE, spec.vision) | {"projection_dim": spec.dim},
    }


def names(spec: TwoTower) -> list[Rule]:
    """Both towers are named alike; old files also hold position numbers."""
    text = common.rows_of(spec.text, TOP, "text_model.encoder.layers.{}.", BLOCK)
    vision = common.within(vision_names(spec.vision, "vision_model."), "vision/")
    rules = applicable([*common.within(text, "text/"), *JOINT], model_params(spec))
    return [*rules, *vision, Unused("text_model.embeddings.position_ids")]
