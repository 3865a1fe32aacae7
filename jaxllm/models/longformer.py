"""Longformer (Beltagy et al. 2020): RoBERTa with windowed attention, and global tokens chosen per input."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from jaxllm.config import Embedding, LayerNorm, Longformer, Transformer, decoder
from jaxllm.models import bert_like as like
from jaxllm.models import common, roberta
from jaxllm.models.common import Config, Fields, Row
from jaxllm.rules import Rule


def longformer(name: str, layers: int, dim: int, heads: int) -> Transformer:
    """Windows of 512; head width dim / heads, feed-forward width 4 dim; what `LongformerModel` holds."""
    block = like.block(Longformer(heads, dim // heads, 256), 4 * dim, "gelu", 1e-5)
    embed = Embedding(roberta.positions(4098, 1), types=1, norm=LayerNorm(1e-5))
    stacks = decoder(block, layers=layers)
    return Transformer(50_265, dim, stacks, None, 4096, embed, None, False, (like.POOLER,), name=name)


def longformer_base() -> Transformer:
    """148,659,456 parameters (longformer-base-4096)."""
    return longformer("longformer_base", 12, 768, 12)


def longformer_large() -> Transformer:
    """434,600,960 parameters (longformer-large-4096)."""
    return longformer("longformer_large", 24, 1024, 16)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "longformer"
ARCHITECTURES = tuple(f"Longformer{suffix}" for suffix in roberta.SUFFIXES if suffix != "ForCausalLM")
PREFIX = "longformer."
PRESETS = (longformer_base, longformer_large)
SHAPE = {name: value for name, value in like.SHAPE.items() if name != "is_decoder"}
FIELDS = Fields(
    read=SHAPE | {"attention_window": None},
    only=like.ONLY | {"is_decoder": (False,), "attention_mode": ("longformer",), "ignore_attention_mask": (False,)},
    ignored=like.DROPOUT | {"onnx_export"},
)
GLOBAL: tuple[Row, ...] = tuple(
    row
    for name, ours in (("query", "q"), ("key", "k"), ("value", "v"))
    for row in like.projection(f"attention.self.{name}_global", f"attn/{ours}_global")
)


def from_hf(config: Config) -> Transformer:
    """The architecture names the head. `attention_window` is the width of a window, one for all or one per layer."""
    c, suffix = common.read_fields(config, FIELDS) | {"is_decoder": False}, like.suffix_of(config, ARCHITECTURES)
    lm, heads = like.heads_of(suffix, like.labels_of(config), like.TANH)
    width = c["hidden_size"] // c["num_attention_heads"]
    attns = [Longformer(c["num_attention_heads"], width, reach) for reach in reaches(c)]
    embed = Embedding(roberta.positions(c["max_position_embeddings"], like.padding_from(config)))
    heads = heads or ((like.POOLER,) if suffix == "Model" else ())
    return like.spec_of(c, (lm, heads), attns, embed, "gelu")


def reaches(c: Config) -> list[int]:
    """Half of each layer's window."""
    given, layers = 512 if c["attention_window"] is None else c["attention_window"], c["num_hidden_layers"]
    windows = [given] * layers if isinstance(given, int) else list(given)
    if len(windows) != layers or any(w < 2 or w % 2 for w in windows):
        raise ValueError(
            f"config.json of longformer: attention_window must be an even number, or {layers} of them, found {given}"
        )
    return [w // 2 for w in windows]


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`, of the class that has these heads."""
    attns = [block.attn for block in common.layers_of(spec)]
    windows = [2 * attn.reach for attn in attns if isinstance(attn, Longformer)]
    if len(windows) < len(attns):
        raise common.foreign(MODEL_TYPE, spec)
    config = like.config_of(spec, MODEL_TYPE) | {"architectures": [f"Longformer{like.class_of(spec, 'ForMaskedLM')}"]}
    own = {"attention_window": windows} | like.padding_fields(MODEL_TYPE, spec)
    return {name: value for name, value in config.items() if name != "is_decoder"} | own


def settle(spec: Transformer, names: Set[str]) -> Transformer:
    """With or without pooler, as the checkpoint has it."""
    return like.settle(spec, names)


def names(spec: Transformer) -> list[Rule]:
    """RoBERTa's, and the projections of global tokens."""
    base = like.pooled("pooler.dense", "pooler", "choice")
    heads = (*like.roberta_head(spec), *like.CLASSIFIERS, *like.OWN_CLASSIFIER)
    return like.names_with(spec, PREFIX, base, heads, "lm_head.decoder", (*like.BLOCK, *GLOBAL))
