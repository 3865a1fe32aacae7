"""Names of BLIP-2's tensors."""

from __future__ import annotations

from jaxllm.architectures import model_params
from jaxllm.config import QFormer, VisionLanguage
from jaxllm.models import clip_like, opt
from jaxllm.models.common import Row, rows_of, within
from jaxllm.rules import Rule, Unused, applicable


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
    """A BERT attention and the norm behind it."""
    inner = (("query", "q", "N"), ("key", "k", "N"), ("value", "v", "N"))
    return (
        *((f"{theirs}.attention.{a}.weight", f"{ours}/{b}/kernel", f"({n} H) D -> D {n} H") for a, b, n in inner),
        *((f"{theirs}.attention.{a}.bias", f"{ours}/{b}/bias", f"({n} H) -> {n} H") for a, b, n in inner),
        (f"{theirs}.output.dense.weight", f"{ours}/o/kernel", "D (N H) -> N H D"),
        (f"{theirs}.output.dense.bias", f"{ours}/o/bias", None),
        (f"{theirs}.output.LayerNorm.weight", f"{ours}_norm/scale", None),
        (f"{theirs}.output.LayerNorm.bias", f"{ours}_norm/bias", None),
    )


LAYER: tuple[Row, ...] = (
    *_attention("attention", "attn"),
    *_attention("crossattention", "cross"),
    ("intermediate_query.dense.weight", "ffn/up/kernel", "F D -> D F"),
    ("intermediate_query.dense.bias", "ffn/up/bias", None),
    ("output_query.dense.weight", "ffn/down/kernel", "D F -> F D"),
    ("output_query.dense.bias", "ffn/down/bias", None),
    ("output_query.LayerNorm.weight", "ffn_norm/scale", None),
    ("output_query.LayerNorm.bias", "ffn_norm/bias", None),
)
QUERIES: tuple[Row, ...] = (
    ("query_tokens", "queries", "A S D -> (A S) D"),
    ("qformer.layernorm.weight", "norm/scale", None),
    ("qformer.layernorm.bias", "norm/bias", None),
    ("language_projection.weight", "out/kernel", "E D -> D E"),
    ("language_projection.bias", "out/bias", None),
)
TOWER: tuple[Row, ...] = (
    ("vision_model.embeddings.class_embedding", "patch/class", "A B D -> (A B D)"),
    ("vision_model.embeddings.patch_embedding.weight", "patch/map/kernel", "D C P Q -> (C P Q) D"),
    ("vision_model.embeddings.patch_embedding.bias", "patch/map/bias", None),
    ("vision_model.embeddings.position_embedding", "patch/positions", "A S D -> (A S) D"),
    ("vision_model.post_layernorm.weight", "norm/scale", None),
    ("vision_model.post_layernorm.bias", "norm/bias", None),
)
FUSED: tuple[Row, ...] = (
    ("self_attn.qkv.weight", ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"), "(X H) D -> D X H"),
    ("self_attn.qkv.bias", ("attn/q/bias", "attn/k/bias", "attn/v/bias"), "(X H) -> X H"),
    ("self_attn.projection.weight", "attn/o/kernel", "D (N H) -> N H D"),
    ("self_attn.projection.bias", "attn/o/bias", None),
    *(row for row in clip_like.BLOCK if not row[0].startswith("self_attn")),
)


def names(spec: VisionLanguage) -> list[Rule]:
    """The tower's q, k and v are one tensor."""
    cfg, one = spec.vision, (("A", 1), ("B", 1), ("C", 3), ("P", spec.vision.patches.size))
    assert isinstance(spec.adapter, QFormer), "to_hf gives no other spec"
    text = within(opt.names(spec.text), "text/", lambda name: f"language_model.{name}")
    tower = within(rows_of(cfg, TOWER, "vision_model.encoder.layers.{}.", FUSED, one), "vision/")
    former = within(rows_of(spec.adapter, QUERIES, "qformer.encoder.layer.{}.", LAYER, one), "adapter/")
    return [*text, *applicable([*tower, *former], model_params(spec)), Unused("qformer.embeddings.position_ids")]
