"""BLIP-2 (Li et al. 2023): a ViT, the Q-Former's learned queries that read it, and OPT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GQA, MLP, Cross, LayerNorm, Patches, QFormer, Vision, VisionLanguage
from jaxllm.models import opt
from jaxllm.models.blip2_names import names
from jaxllm.models.clip_like import block_of, layer_to, plain, section, side_of
from jaxllm.models.common import Config, Fields, foreign, layers_of, stacks_of

__all__ = ["ARCHITECTURES", "MODEL_TYPE", "PREFIX", "PRESETS", "SPEC", "blip2_opt_27b", "from_hf", "names", "to_hf"]
MODEL_TYPE = "blip-2"
ARCHITECTURES = ("Blip2ForConditionalGeneration",)
PREFIX = ""
SPEC = VisionLanguage

DROPOUT = frozenset({"hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "initializer_factor"})
FIELDS = Fields(
    read={"num_query_tokens": 32, "image_token_index": None},
    only={"use_decoder_only_language_model": (True,), "tie_word_embeddings": (True, False)},
    ignored=frozenset({"image_text_hidden_size", "initializer_factor"}),
)
VISION = Fields(
    read={
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    },
    only={"num_channels": (3,)},
    ignored=DROPOUT | {"projection_dim", "tie_word_embeddings"},
)
QFORMER = Fields(
    read={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "cross_attention_frequency": 2,
    },
    only={"use_qformer_text_input": (False,), "position_embedding_type": ("absolute",)},
    ignored=DROPOUT
    | {"vocab_size", "max_position_embeddings", "encoder_hidden_size", "tie_word_embeddings", "classifier_dropout"},
)


def blip2_opt_27b() -> VisionLanguage:
    """3,744,761,856 parameters."""
    text = {"vocab_size": 50_304, "hidden_size": 2560, "ffn_dim": 10_240, "num_hidden_layers": 32}
    text |= {"num_attention_heads": 32, "word_embed_proj_dim": 2560}
    return from_hf({"model_type": MODEL_TYPE, "text_config": text, "image_token_index": 50_265})


PRESETS = (blip2_opt_27b,)


def from_hf(config: Config) -> VisionLanguage:
    """Every `cross_attention_frequency`-th layer of the Q-Former, from the first on, reads the image."""
    c = plain(config, {"text_config": None, "vision_config": None, "qformer_config": None}, FIELDS)
    inner = {"model_type": "opt"} | dict(config.get("text_config") or {})
    if inner["model_type"] != "opt" or c["image_token_index"] is None:
        raise ValueError(
            f"config.json of blip-2: text_config.model_type must be 'opt' and image_token_index a token id, found "
            f"{inner['model_type']!r} and {c['image_token_index']!r}; nothing else is supported"
        )
    v, q = section(config, "vision_config", VISION), section(config, "qformer_config", QFORMER)
    block = block_of(v, v["qkv_bias"])
    stacks, patches = stacks_of([block] * v["num_hidden_layers"]), Patches(v["patch_size"], bias=True)
    tower = Vision(v["hidden_size"], stacks, patches, side_of(v), class_token=True, norm=block.norm)
    former = _qformer(q, c["num_query_tokens"], tower.width)
    return VisionLanguage(opt.from_hf(inner), tower, former, c["image_token_index"], name=MODEL_TYPE)


def _qformer(q: Config, queries: int, width: int) -> QFormer:
    block = replace(block_of(q), place="post")
    assert isinstance(block.attn, GQA), "block_of gives plain attention"
    cross = Cross(block.attn, width)
    every, layers = q["cross_attention_frequency"], range(q["num_hidden_layers"])
    blocks = [replace(block, cross=None if i % every else cross) for i in layers]
    return QFormer(queries, q["hidden_size"], stacks_of(blocks), block.norm)


def to_hf(spec: VisionLanguage) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    if not isinstance(spec, VisionLanguage) or not isinstance(spec.adapter, QFormer):
        raise foreign(MODEL_TYPE, spec)
    cfg, former, block = spec.vision, spec.adapter, layers_of(spec.vision)[0]
    if not isinstance(block.attn, GQA) or not isinstance(block.ffn, MLP) or not isinstance(cfg.norm, LayerNorm):
        raise foreign(MODEL_TYPE, spec)
    reads = [i for i, b in enumerate(layers_of(former)) if b.cross is not None]
    every = reads[1] if len(reads) > 1 else len(layers_of(former))
    pixels = {"image_size": (cfg.side or 0) * cfg.patches.size, "patch_size": cfg.patches.size}
    width, deep = {"encoder_hidden_size": cfg.width}, {"cross_attention_frequency": every}
    return {
        "model_type": MODEL_TYPE,
        "architectures": list(ARCHITECTURES),
        "num_query_tokens": former.queries,
        "image_token_index": spec.image_token,
        "use_decoder_only_language_model": True,
        "text_config": opt.to_hf(spec.text),
        "vision_config": {"model_type": "blip_2_vision_model", "qkv_bias": block.attn.qkv_bias}
        | layer_to(MODEL_TYPE, cfg)
        | pixels,
        "qformer_config": {"model_type": "blip_2_qformer"} | layer_to(MODEL_TYPE, former) | width | deep,
    }
