"""RoBERTa (Liu et al. 2019): BERT whose positions count the tokens that are not padding, from padding's id + 1 on."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from jaxllm.config import Embedding, LayerNorm, Learned, Transformer, decoder
from jaxllm.models import bert_like as like
from jaxllm.models import common
from jaxllm.models.common import Config, Fields
from jaxllm.rules import Rule


def roberta(name: str, layers: int, dim: int, heads: int) -> Transformer:
    """Head width dim / heads, feed-forward width 4 dim; what `RobertaModel` holds: no head but the pooler."""
    block = like.block(like.attention(dim, heads), 4 * dim, "gelu", 1e-5)
    embed = Embedding(positions(514, 1), types=1, norm=LayerNorm(1e-5))
    stacks = decoder(block, layers=layers)
    return Transformer(50_265, dim, stacks, None, 512, embed, None, False, (like.POOLER,), name=name)


def roberta_base() -> Transformer:
    """124,645,632 parameters."""
    return roberta("roberta_base", 12, 768, 12)


def roberta_large() -> Transformer:
    """355,359,744 parameters."""
    return roberta("roberta_large", 24, 1024, 16)


def positions(rows: int, padding: int) -> Learned:
    """The table of `rows`, the first padding + 1 of which are for padding."""
    return Learned(rows - padding - 1, offset=padding + 1, padding=padding)


# ------------------------------------------------------------------------------------------------- published format

SUFFIXES = (
    "Model", "ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification",
    "ForQuestionAnswering",
)  # fmt: skip
MODEL_TYPE = "roberta"
ARCHITECTURES = tuple(f"Roberta{suffix}" for suffix in SUFFIXES)
PREFIX = "roberta."
PRESETS = (roberta_base, roberta_large)
FIELDS = Fields(read=like.SHAPE | {"vocab_size": 50_265}, only=like.ONLY, ignored=like.DROPOUT)


def from_hf(config: Config) -> Transformer:
    """The architecture names the head; `is_decoder` makes it causal."""
    c, suffix = common.read_fields(config, FIELDS), like.suffix_of(config, ARCHITECTURES)
    lm, heads = like.heads_of(suffix, like.labels_of(config), like.TANH)
    attn = like.attention(c["hidden_size"], c["num_attention_heads"])
    embed = Embedding(positions(c["max_position_embeddings"], like.padding_from(config)))
    heads = heads or ((like.POOLER,) if suffix == "Model" else ())
    return like.spec_of(c, (lm, heads), [attn] * c["num_hidden_layers"], embed, "gelu")


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`, of the class that has these heads."""
    config = like.config_of(spec, MODEL_TYPE) | {"architectures": [f"Roberta{like.class_of(spec, 'ForCausalLM')}"]}
    return config | like.padding_fields(MODEL_TYPE, spec)


def settle(spec: Transformer, names: Set[str]) -> Transformer:
    """With or without pooler, as the checkpoint has it."""
    return like.settle(spec, names)


def names(spec: Transformer) -> list[Rule]:
    """The classifier of whole rows has a transform of its own."""
    base = like.pooled("pooler.dense", "pooler", "choice")
    heads = (*like.roberta_head(spec), *like.CLASSIFIERS, *like.OWN_CLASSIFIER)
    return like.names_with(spec, PREFIX, base, heads, "lm_head.decoder")
