"""Qwen2.5-VL (Bai et al. 2025): a tower of SwiGLU layers that attend within windows, temporal positions by seconds."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GLU, GQA, Block, Merger, RMSNorm, Vision, VisionLanguage
from jaxllm.models import common, qwen_vl_like
from jaxllm.models.common import Config, Fields, Row
from jaxllm.models.qwen_vl_like import PATCHES, UNREAD, block_with, outer_to, patches_of, spec_of, tower_rope
from jaxllm.rules import Rule

MODEL_TYPE = "qwen2_5_vl"
ARCHITECTURES = ("Qwen2_5_VLForConditionalGeneration",)
PREFIX = ""
SPEC = VisionLanguage
RENAMED = qwen_vl_like.RENAMED

VISION = Fields(
    read=PATCHES
    | {
        "hidden_size": 3584,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "tokens_per_second": 4.0,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    ignored=UNREAD,
)
FFN: tuple[Row, ...] = tuple(
    row
    for name in ("gate", "up", "down")
    for row in (
        (f"mlp.{name}_proj.weight", f"ffn/{name}/kernel", "E D -> D E"),
        (f"mlp.{name}_proj.bias", f"ffn/{name}/bias", None),
    )
)


def qwen25_vl_3b() -> VisionLanguage:
    """3,754,622,976 parameters."""
    text = {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    tower = {"hidden_size": 1280, "out_hidden_size": 2048, "tokens_per_second": 2}
    text |= {"max_position_embeddings": 128_000}
    return from_hf({"model_type": MODEL_TYPE, "text_config": text, "vision_config": tower})


PRESETS = (qwen25_vl_3b,)


def from_hf(config: Config) -> VisionLanguage:
    """All layers of the tower attend within windows but those of `fullatt_block_indexes`."""
    return spec_of(config, VISION, _vision, MODEL_TYPE)


def _vision(c: Config) -> Vision:
    dim, heads, merge = c["hidden_size"], c["num_heads"], c["spatial_merge_size"]
    rope = tower_rope(c["rope_parameters"], dim // heads)
    attn = GQA(heads, heads, dim // heads, rope, qkv_bias=True, out_bias=True)
    ffn = GLU(c["intermediate_size"], common.activation_from(c["hidden_act"], "hidden_act"), bias=True)
    template, full = Block(attn, ffn, RMSNorm(1e-6)), set(c["fullatt_block_indexes"])
    window = c["window_size"] // merge // c["patch_size"]
    if window < 1:
        raise ValueError(f"config.json: window_size {c['window_size']} must hold {merge} patches of {c['patch_size']}")
    stacks = common.stacks_of([block_with(template, i not in full) for i in range(c["depth"])])
    return Vision(dim, stacks, patches_of(c), merge=merge, window=window)


def to_hf(spec: VisionLanguage) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    if not isinstance(spec, VisionLanguage) or not isinstance(spec.adapter, Merger):
        raise common.foreign(MODEL_TYPE, spec)
    cfg, blocks = spec.vision, common.layers_of(spec.vision)
    ffn = blocks[0].ffn
    if not isinstance(ffn, GLU) or cfg.window is None or spec.tokens_per_second is None:
        raise common.foreign(MODEL_TYPE, spec)
    full = [i for i, block in enumerate(blocks) if isinstance(block.attn, GQA) and not block.attn.windowed]
    rate = spec.tokens_per_second
    values = (cfg.dim, common.activation_to(ffn.act), ffn.hidden, int(rate) if rate == int(rate) else rate)
    values += (cfg.window * cfg.merge * cfg.patches.size, spec.text.dim, full)
    own = dict(zip([k for k in VISION.read if k not in PATCHES], values, strict=True))
    return outer_to(spec, MODEL_TYPE, ARCHITECTURES[0], own)


def names(spec: VisionLanguage) -> list[Rule]:
    """`visual.*` and `model.*`, as the hub has them."""
    return qwen_vl_like.names_of(spec, FFN)
