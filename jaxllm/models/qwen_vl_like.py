"""What Qwen2-VL and Qwen2.5-VL share: the text model with M-RoPE, the outer config, rotation and names of the tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxllm.architectures import model_params
from jaxllm.config import GQA, Block, Merger, Patches, Rope, Transformer, Vision, VisionLanguage
from jaxllm.models import common, qwen2
from jaxllm.models.common import Config, Fields, Row
from jaxllm.models.llama_like import NORMS, SHAPE, config_of, names_with, spec_from
from jaxllm.models.rope import modern
from jaxllm.rules import Rule, Unused, applicable

RENAMED = (("model.visual.", "visual."), ("model.language_model.", "model."))  # newer files' names -> the hub's
OUTER = Fields(
    read={"image_token_id": 151_655, "video_token_id": 151_656, "tie_word_embeddings": False},
    ignored=frozenset({"vision_start_token_id", "vision_end_token_id", "vision_token_id"}),
)
TEXT = replace(
    qwen2.FIELDS,
    read=SHAPE
    | {
        "vocab_size": 152_064,
        "hidden_size": 8192,
        "intermediate_size": 29_568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 80,
        "layer_types": None,
    },
    ignored=frozenset({*OUTER.read, *OUTER.ignored} - {"tie_word_embeddings"}),
)
PATCHES: dict[str, Any] = {
    "depth": 32,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "rope_parameters": None,
}
UNREAD = frozenset({"in_chans", "spatial_patch_size"})  # older files have them; the reference does not look
ATTENTION: tuple[Row, ...] = (
    ("norm1.weight", "attn_norm/scale", None),
    ("norm1.bias", "attn_norm/bias", None),
    ("attn.qkv.weight", ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"), "(X H) D -> D X H"),
    ("attn.qkv.bias", ("attn/q/bias", "attn/k/bias", "attn/v/bias"), "(X H) -> X H"),
    ("attn.proj.weight", "attn/o/kernel", "D (N H) -> N H D"),
    ("attn.proj.bias", "attn/o/bias", None),
    ("norm2.weight", "ffn_norm/scale", None),
    ("norm2.bias", "ffn_norm/bias", None),
)
MERGER: tuple[Row, ...] = (
    ("visual.merger.ln_q.weight", "adapter/norm/scale", None),
    ("visual.merger.ln_q.bias", "adapter/norm/bias", None),
    ("visual.merger.mlp.0.weight", "adapter/up/kernel", "E D -> D E"),
    ("visual.merger.mlp.0.bias", "adapter/up/bias", None),
    ("visual.merger.mlp.2.weight", "adapter/down/kernel", "E D -> D E"),
    ("visual.merger.mlp.2.bias", "adapter/down/bias", None),
)


def spec_of(config: Config, fields: Fields, vision: Callable[[Config], Vision], name: str) -> VisionLanguage:
    """The spec of a config; `fields` and `vision` read its tower. Older files have the text's fields at the top."""
    tower = common.read_fields(
        {"model_type": f"{name}.vision_config"} | dict(config.get("vision_config") or {}), fields
    )
    outer, inner = _parts(config, name)
    c = common.read_fields(outer, OUTER)
    text = _text(inner, c["tie_word_embeddings"])
    width = tower.get("out_hidden_size", tower["hidden_size"])
    if width != text.dim:
        raise ValueError(f"config.json of {name}: the tower gives width {width}, the text's hidden_size is {text.dim}")
    cfg, ids = vision(tower), (c["image_token_id"], c["video_token_id"])
    seconds = tower.get("tokens_per_second")
    norm = common.layers_of(cfg)[0].norm
    return VisionLanguage(text, cfg, Merger(norm), *ids, None if seconds is None else float(seconds), name=name)


def _parts(config: Config, name: str) -> tuple[Config, Config]:
    """The outer fields, and the text's; what stands in both places must agree."""
    own = {k: v for k, v in config.items() if k not in ("text_config", "vision_config")}
    flat = {k: own.pop(k) for k in list(own) if k in TEXT.read and k not in OUTER.read}
    if config.get("text_config") is None:
        return own, {k: v for k, v in (own | flat).items() if k not in OUTER.read}
    nested = modern(config["text_config"])
    for key, value in flat.items():
        if nested.get(key, value) != value:
            raise ValueError(f"config.json of {name}: {key} is {value!r}, but {nested[key]!r} in text_config; keep one")
    tied = own.get("tie_word_embeddings", False) or nested.pop("tie_word_embeddings", False)
    return own | {"tie_word_embeddings": tied}, nested


def _text(config: Config, tied: bool) -> Transformer:
    rope = dict(config.get("rope_parameters") or {})
    sections = tuple(rope.pop("mrope_section", (16, 24, 24)))
    own = {"model_type": "qwen2_vl_text", "rope_parameters": rope, "tie_word_embeddings": tied}
    c = common.read_fields(dict(config) | own, TEXT)
    width = c["hidden_size"] // c["num_attention_heads"]
    if c["head_dim"] not in (None, width):
        raise ValueError(f"config.json: head_dim must be hidden_size / num_attention_heads = {width} here")
    if len(sections) != 3 or sum(sections) * 2 != width:
        raise ValueError(f"config.json: mrope_section {list(sections)} must be three numbers that sum to {width // 2}")
    return spec_from(c, qwen2.windows_from(c), True, False, False, Rope(1_000_000.0, sections=sections))


def tower_rope(parameters: Config | None, width: int) -> Rope:
    """The rotation by (row, column) of heads of `width`."""
    p = dict(parameters or {})
    theta, kind = float(p.pop("rope_theta", 10_000.0)), p.pop("rope_type", "axial")
    if kind != "axial" or p or width % 4:
        raise ValueError(
            f"config.json: the tower's rope_parameters must be of type 'axial' and nothing more, its head width "
            f"{width} a multiple of 4; found type {kind!r} and {sorted(p)}"
        )
    return Rope(theta, sections=(width // 4, width // 4), restart=True)


def patches_of(c: Config) -> Patches:
    """How the tower cuts images."""
    return Patches(c["patch_size"], c["in_channels"], c["temporal_patch_size"])


def outer_to(spec: VisionLanguage, model_type: str, architecture: str, tower: dict[str, Any]) -> dict[str, Any]:
    """The config of a spec in today's style, but for what is the family's own in its `tower`."""
    block, cfg = common.layers_of(spec.vision)[0], spec.vision
    if not isinstance(block.attn, GQA) or not isinstance(block.attn.position, Rope) or spec.video_token is None:
        raise common.foreign(model_type, spec)
    text = config_of(spec.text, model_type, architecture) | qwen2.windows_to(spec.text)
    rope = common.rope_of(model_type, spec.text, common.plain_layer(model_type, spec.text)[0])
    text["rope_parameters"] |= {"mrope_section": list(rope.sections or ())}
    sizes = (cfg.layers, block.attn.heads, cfg.patches.channels, cfg.patches.size, cfg.merge, cfg.patches.frames)
    axial = {"rope_theta": block.attn.position.theta, "rope_type": "axial"}
    ids = {"image_token_id": spec.image_token, "video_token_id": spec.video_token}
    dropped = ("architectures", "tie_word_embeddings")
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "tie_word_embeddings": spec.text.tied,
        "text_config": {k: v for k, v in text.items() if k not in dropped} | {"model_type": f"{model_type}_text"},
        "vision_config": {"model_type": f"{model_type}_vision"}
        | dict(zip(PATCHES, (*sizes, axial), strict=True))
        | tower,
    } | ids


def names_of(spec: VisionLanguage, ffn: tuple[Row, ...]) -> list[Rule]:
    """The table, `ffn` being the rows of the tower's feed-forward layers."""
    cfg = spec.vision
    sizes = (("C", cfg.patches.channels), ("T", cfg.patches.frames), ("P", cfg.patches.size))
    top: tuple[Row, ...] = (("visual.patch_embed.proj.weight", "patch/map/kernel", "D C T P Q -> (C T P Q) D"),)
    tower = common.within(common.rows_of(cfg, top, "visual.blocks.{}.", ATTENTION + ffn, sizes), "vision/")
    merger = common.rows_of(replace(cfg, stacks=()), MERGER, "", ())
    text = common.within(names_with(spec.text, NORMS), "text/")
    return [*text, *applicable([*tower, *merger], model_params(spec)), Unused("visual.rotary_pos_emb.inv_freq")]


def block_with(template: Block, windowed: bool) -> Block:
    """The same layer, seeing its window alone or all of its image."""
    assert isinstance(template.attn, GQA), "towers of this kind have plain attention"
    return replace(template, attn=replace(template.attn, windowed=windowed))
