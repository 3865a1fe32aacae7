"""Qwen-VL (Bai et al. 2023): a ViT, one cross-attention that resamples it to 256 vectors, and the first Qwen.

Longer texts than `seq_length` change their rotation and scale their queries (dynamic NTK, log-n): they are refused. The
image's place is `image_start_id` + 2, once per vector; the reference puts the image's path there.
"""

from __future__ import annotations

from typing import Any

from jaxllm.config import (
    GLU,
    GQA,
    MLP,
    Block,
    Cross,
    LayerNorm,
    LMHead,
    Patches,
    Resampler,
    RMSNorm,
    Transformer,
    Vision,
    VisionLanguage,
)
from jaxllm.models import common
from jaxllm.models.common import Config, Fields, foreign, layers_of, plain_layer, stacks_of
from jaxllm.models.qwen_vl_names import names
from jaxllm.models.rope import modern, rope_from

__all__ = ["ARCHITECTURES", "MODEL_TYPE", "PREFIX", "PRESETS", "SPEC", "from_hf", "names", "qwen_vl", "to_hf"]
MODEL_TYPE = "qwen"
ARCHITECTURES = ("QWenLMHeadModel",)
PREFIX = ""
SPEC = VisionLanguage

TABLE = 16  # side of the tower's learned table
FIELDS = Fields(
    read={
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 22_016,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "kv_channels": 128,
        "rope_parameters": None,
    },
    only={"no_bias": (True,), "scale_attn_weights": (True,)},
    ignored=frozenset({"attn_dropout_prob", "emb_dropout_prob", "bf16", "fp16", "fp32", "onnx_safe", "tokenizer_type"})
    | {"use_flash_attn"},
)
VISUAL = Fields(
    read={
        "image_size": 448,
        "patch_size": 14,
        "width": 1664,
        "layers": 48,
        "heads": 16,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "n_queries": 256,
        "image_start_id": 151_857,
    },
)


def qwen_vl() -> VisionLanguage:
    """9,655,886,592 parameters, the resampler's fixed sinusoids not counted."""
    return from_hf({"model_type": MODEL_TYPE, "visual": {}})


PRESETS = (qwen_vl,)


def from_hf(config: Config) -> VisionLanguage:
    """Qwen without `visual` is another family."""
    if config.get("visual") is None:
        raise ValueError("config.json of qwen: visual is missing; of this family only Qwen-VL is supported")
    c = common.read_fields({k: v for k, v in modern(config).items() if k != "visual"}, FIELDS)
    v = common.read_fields(dict(config["visual"]) | {"model_type": "qwen.visual"}, VISUAL)
    text, side, cells = _text(c), round(v["n_queries"] ** 0.5), v["image_size"] // v["patch_size"]
    dim, out = v["width"], v["output_dim"]
    if side**2 != v["n_queries"] or out != text.dim or dim == out or out % 128 or v["image_size"] % v["patch_size"]:
        raise ValueError(
            f"config.json of qwen: visual must have a square n_queries, output_dim equal to hidden_size, a multiple of "
            f"128 and unlike width, and image_size a multiple of patch_size; found {v} and hidden_size {text.dim}"
        )
    norm, heads = LayerNorm(1e-6), v["heads"]
    attn = GQA(heads, heads, dim // heads, qkv_bias=True, out_bias=True)
    block = Block(attn, MLP(int(dim * v["mlp_ratio"]), bias=True), norm)
    cross = Cross(GQA(out // 128, out // 128, 128, qkv_bias=True, out_bias=True), out)
    stacks = stacks_of([block] * v["layers"])
    tower = Vision(dim, stacks, Patches(v["patch_size"]), cells, None if cells == TABLE else TABLE, embed_norm=norm)
    return VisionLanguage(text, tower, Resampler(side, cross, norm), v["image_start_id"] + 2, name=MODEL_TYPE)


def _text(c: Config) -> Transformer:
    heads, dim, norm = c["num_attention_heads"], c["hidden_size"], RMSNorm(float(c["layer_norm_epsilon"]))
    if c["kv_channels"] * heads != dim:
        raise ValueError(f"config.json of qwen: kv_channels must be {dim} / {heads}, found {c['kv_channels']}")
    rope = rope_from(c["rope_parameters"], c["max_position_embeddings"], partial=True)
    if rope.scaling is not None:
        raise ValueError(f"config.json of qwen: rope_type must be 'default', found {rope.scaling}; it is not supported")
    attn = GQA(heads, heads, c["kv_channels"], rope, qkv_bias=True)
    stacks = stacks_of([Block(attn, GLU(c["intermediate_size"] // 2), norm)] * c["num_hidden_layers"])
    changes = c["use_dynamic_ntk"] or c["use_logn_attn"]
    context = c["seq_length"] if changes else c["max_position_embeddings"]
    return Transformer(c["vocab_size"], dim, stacks, norm, context, head=LMHead(c["tie_word_embeddings"]), name="qwen")


def to_hf(spec: VisionLanguage) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    if not isinstance(spec, VisionLanguage) or not isinstance(spec.adapter, Resampler):
        raise foreign(MODEL_TYPE, spec)
    text, cfg, norm = spec.text, spec.vision, spec.text.norm
    (attn, ffn), block = plain_layer(MODEL_TYPE, text), layers_of(cfg)[0]
    rope = common.rope_of(MODEL_TYPE, text, attn)
    if not (isinstance(ffn, GLU) and isinstance(norm, RMSNorm)):
        raise foreign(MODEL_TYPE, spec)
    if not (isinstance(block.ffn, MLP) and isinstance(block.attn, GQA)):
        raise foreign(MODEL_TYPE, spec)
    values = (text.vocab, text.dim, text.layers, attn.heads, 2 * ffn.hidden, norm.eps, text.context, text.context)
    values += (True, True, text.tied, attn.head_dim)
    rotation = {"rotary_emb_base": rope.theta, "rotary_pct": rope.fraction}
    ratio = (block.ffn.hidden + 0.5) / cfg.dim  # cut to whole numbers by the reader
    tower = ((cfg.side or 0) * cfg.patches.size, cfg.patches.size, cfg.dim, cfg.layers, block.attn.heads, ratio)
    tower += (spec.adapter.cross.dim, spec.adapter.side**2, spec.image_token - 2)
    return {
        "model_type": MODEL_TYPE,
        "architectures": list(ARCHITECTURES),
        "visual": dict(zip(VISUAL.read, tower, strict=True)),
        **rotation,
    } | dict(zip([name for name in FIELDS.read if name != "rope_parameters"], values, strict=True))
