"""LLaVA 1.5 (Liu et al. 2023): CLIP's patches from below its last layer, through two layers, into a LLaMA."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from jaxllm.architectures import model_params
from jaxllm.config import Projector, Transformer, Vision, VisionLanguage
from jaxllm.models import clip_like, common, llama, mistral, qwen2
from jaxllm.models.common import Config, Fields, Row, activation_from, activation_to, foreign, layers_of, stacks_of
from jaxllm.models.rope import modern
from jaxllm.rules import Rule, applicable

MODEL_TYPE = "llava"
ARCHITECTURES = ("LlavaForConditionalGeneration",)
PREFIX = ""
SPEC = VisionLanguage
RENAMED = (  # what newer files call them -> the hub's names
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("vision_tower.embeddings.", "vision_tower.vision_model.embeddings."),
    ("vision_tower.encoder.", "vision_tower.vision_model.encoder."),
    ("vision_tower.pre_layrnorm.", "vision_tower.vision_model.pre_layrnorm."),
    ("vision_tower.post_layernorm.", "vision_tower.vision_model.post_layernorm."),
)
TEXTS = {"llama": llama, "mistral": mistral, "qwen2": qwen2}
FIELDS = Fields(
    read={
        "image_token_index": 32_000,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": None,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
    },
    ignored=frozenset({"image_seq_length", "ignore_index", "vocab_size"}),
)
VISION: dict[str, Any] = {"intermediate_size": 4096, "hidden_size": 1024, "patch_size": 14, "image_size": 336}
VISION |= {"num_hidden_layers": 24, "num_attention_heads": 16, "model_type": "clip_vision_model"}
PROJECTOR: tuple[Row, ...] = (
    ("multi_modal_projector.linear_1.weight", "adapter/up/kernel", "E D -> D E"),
    ("multi_modal_projector.linear_1.bias", "adapter/up/bias", None),
    ("multi_modal_projector.linear_2.weight", "adapter/down/kernel", "E D -> D E"),
    ("multi_modal_projector.linear_2.bias", "adapter/down/bias", None),
)


def llava15_7b() -> VisionLanguage:
    """7,063,427,072 parameters."""
    text = {"model_type": "llama", "vocab_size": 32_064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    return from_hf({"model_type": MODEL_TYPE, "text_config": text})


PRESETS = (llava15_7b,)


def from_hf(config: Config) -> VisionLanguage:
    """`vision_feature_layer` counts hidden states: 0 before the first layer, -1 after the last; one or several."""
    c = clip_like.plain(config, {"text_config": None, "vision_config": None}, FIELDS)
    inner, tower = dict(config.get("text_config") or {}), dict(config.get("vision_config") or VISION)
    kind = inner.setdefault("model_type", "llama")
    if kind not in TEXTS or tower.get("model_type") != VISION["model_type"]:
        raise ValueError(
            f"config.json of llava: text_config.model_type must be one of {sorted(TEXTS)} and vision_config.model_type "
            f"{VISION['model_type']!r}, found {kind!r} and {tower.get('model_type')!r}; nothing else is supported"
        )
    text = TEXTS[kind].from_hf(modern(inner))
    tied = text.tied or c["tie_word_embeddings"]
    text = text if text.head is None else replace(text, head=replace(text.head, tied=tied))
    cfg = clip_like.vision_from(common.read_fields(tower, clip_like.VISION))
    act = activation_from(c["projector_hidden_act"], "projector_hidden_act")
    adapter = Projector(act, c["multimodal_projector_bias"])
    strategy = c["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise ValueError(f"config.json: vision_feature_select_strategy must be 'default' or 'full', found {strategy!r}")
    layer = -2 if c["vision_feature_layer"] is None else c["vision_feature_layer"]
    cfg = replace(taken(cfg, layer if isinstance(layer, list) else [layer]), keep_class=strategy == "full")
    return VisionLanguage(text, cfg, adapter, c["image_token_index"], name=MODEL_TYPE)


def taken(cfg: Vision, states: list[int]) -> Vision:
    """The tower with its features taken at these hidden states, its stacks cut there."""
    blocks = layers_of(cfg)
    if not states or any(type(i) is not int or not -len(blocks) - 1 <= i <= len(blocks) for i in states):
        raise ValueError(f"config.json: vision_feature_layer {states} must name hidden states of {len(blocks)} layers")
    ends = [i % (len(blocks) + 1) for i in states]
    cuts = sorted({0, *ends, len(blocks)})
    parts = [stacks_of(blocks[a:b]) for a, b in pairwise(cuts)]
    before = {end: sum(len(part) for part in parts[:i]) for i, end in enumerate(cuts)}
    return replace(cfg, stacks=tuple(s for part in parts for s in part), features=tuple(before[end] for end in ends))


def to_hf(spec: VisionLanguage) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    if not isinstance(spec, VisionLanguage) or not isinstance(spec.adapter, Projector) or spec.vision.features is None:
        raise foreign(MODEL_TYPE, spec)
    cfg, text = spec.vision, _text_of(spec.text)
    states = [sum(s.layers for s in cfg.stacks[:end]) - cfg.layers - 1 for end in spec.vision.features]
    values = (spec.image_token, activation_to(spec.adapter.act), "full" if cfg.keep_class else "default")
    values += (states[0] if len(states) == 1 else states, spec.adapter.bias, spec.text.tied)
    return (
        {"model_type": MODEL_TYPE, "architectures": list(ARCHITECTURES)}
        | dict(zip(FIELDS.read, values, strict=True))
        | {"text_config": text.to_hf(spec.text), "vision_config": clip_like.vision_to(MODEL_TYPE, cfg)}
    )


def _text_of(text: Transformer) -> Any:
    """The family of the text model."""
    if text.name not in TEXTS:
        raise ValueError(f"llava: the text model must be one of {sorted(TEXTS)}, found {text.name!r}")
    return TEXTS[text.name]


def names(spec: VisionLanguage) -> list[Rule]:
    """As on the hub: `language_model.*`, `vision_tower.vision_model.*`."""
    text = common.within(_text_of(spec.text).names(spec.text), "text/", lambda name: f"language_model.{name}")
    tower = common.within(clip_like.vision_names(spec.vision, "vision_tower.vision_model."), "vision/")
    projector = common.rows_of(replace(spec.vision, stacks=()), PROJECTOR, "", ())
    return [*text, *tower, *applicable(projector, model_params(spec))]
