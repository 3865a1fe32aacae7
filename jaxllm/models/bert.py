"""BERT (Devlin et al. 2019): a post-norm encoder with learned positions and sentence types, masked words and next
sentences as heads."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

from jaxllm.config import Embedding, LayerNorm, Learned, Transformer, decoder
from jaxllm.models import bert_like as like
from jaxllm.models import common
from jaxllm.models.common import Config, Fields
from jaxllm.rules import Rule


def bert(name: str, layers: int, dim: int, heads: int, vocab: int = 30_522) -> Transformer:
    """Head width dim / heads, feed-forward width 4 dim; what `BertModel` holds: no head but the pooler."""
    block = like.block(like.attention(dim, heads), 4 * dim, "gelu", 1e-12)
    embed = Embedding(Learned(512, by="slot"), types=2, norm=LayerNorm(1e-12))
    stacks = decoder(block, layers=layers)
    return Transformer(vocab, dim, stacks, None, 512, embed, None, False, (like.POOLER,), name=name)


def bert_base() -> Transformer:
    """109,482,240 parameters (uncased)."""
    return bert("bert_base", 12, 768, 12)


def bert_large() -> Transformer:
    """335,141,888 parameters (uncased)."""
    return bert("bert_large", 24, 1024, 16)


def bert_base_pretraining() -> Transformer:
    """110,106,428 parameters: with both heads of pretraining, the masked words' tied to the embedding."""
    heads = like.heads_of("ForPreTraining", 2, like.TANH)
    return replace(
        bert_base(), head=like.lm_head(True, "gelu", 1e-12), classifiers=heads[1], name="bert_base_pretraining"
    )


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "bert"
ARCHITECTURES = tuple(
    f"Bert{suffix}"
    for suffix in (
        "Model", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForNextSentencePrediction",
        "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering",
    )
)  # fmt: skip
PREFIX = "bert."
PRESETS = (bert_base, bert_large, bert_base_pretraining)
POOLER_NOTES = {f"pooler_{n}" for n in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")}
FIELDS = Fields(read=like.SHAPE, only=like.ONLY, ignored=frozenset({"directionality", *POOLER_NOTES}) | like.DROPOUT)


def from_hf(config: Config) -> Transformer:
    """The architecture names the head; `is_decoder` makes it causal."""
    c, suffix = common.read_fields(config, FIELDS), like.suffix_of(config, ARCHITECTURES)
    lm, heads = like.heads_of(suffix, like.labels_of(config), like.TANH)
    attn = like.attention(c["hidden_size"], c["num_attention_heads"])
    act = common.activation_from(c["hidden_act"], "hidden_act")
    embed = Embedding(Learned(c["max_position_embeddings"], by="slot"))
    heads = heads or ((like.POOLER,) if suffix == "Model" else ())
    return like.spec_of(c, (lm, heads), [attn] * c["num_hidden_layers"], embed, act)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`, of the class that has these heads."""
    return like.config_of(spec, MODEL_TYPE) | {"architectures": [f"Bert{like.class_of(spec, 'LMHeadModel')}"]}


def settle(spec: Transformer, names: Set[str]) -> Transformer:
    """With or without pooler, as the checkpoint has it."""
    return like.settle(spec, names)


def names(spec: Transformer) -> list[Rule]:
    """Next-sentence and sentence classifiers stand on the pooler."""
    base = like.pooled("pooler.dense", "pooler", "nsp", "labels", "choice")
    heads = (*like.cls_head(spec), *like.CLASSIFIERS, *like.dense("classifier", "classifiers/labels/out"))
    return like.names_with(spec, PREFIX, base, heads, "cls.predictions.decoder")
