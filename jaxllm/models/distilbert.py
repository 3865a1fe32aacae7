"""DistilBERT (Sanh et al. 2019): BERT with half of the layers, without sentence types and pooler."""

from __future__ import annotations

from typing import Any

from jaxllm.config import Embedding, LayerNorm, Learned, Transform, Transformer, decoder
from jaxllm.models import bert_like as like
from jaxllm.models import common
from jaxllm.models.common import Config, Fields, Row
from jaxllm.rules import Rule, Unused


def distilbert_base() -> Transformer:
    """66,362,880 parameters (uncased), without head."""
    block = like.block(like.attention(768, 12), 3072, "gelu", 1e-12)
    embed = Embedding(Learned(512, by="slot"), norm=LayerNorm(1e-12))
    stacks = decoder(block, layers=6)
    return Transformer(30_522, 768, stacks, None, 512, embed, None, False, name="distilbert_base")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "distilbert"
ARCHITECTURES = tuple(
    f"DistilBert{suffix}"
    for suffix in (
        "Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification",
        "ForQuestionAnswering",
    )
)  # fmt: skip
PREFIX = "distilbert."
PRESETS = (distilbert_base,)
NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
}
SHAPE = {ours: like.SHAPE[theirs] for ours, theirs in NAMES.items()} | {"n_layers": 6}
FIELDS = Fields(
    read=SHAPE,
    only={"is_decoder": (False,)},
    # the sinusoidal table, where there is one, lies in the file as if it were learned
    ignored=frozenset({"dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"}),
)

BLOCK: tuple[Row, ...] = (
    *like.projection("attention.q_lin", "attn/q"),
    *like.projection("attention.k_lin", "attn/k"),
    *like.projection("attention.v_lin", "attn/v"),
    *like.dense("attention.out_lin", "attn/o", "D (N H) -> N H D"),
    *like.normed("sa_layer_norm", "attn_norm"),
    *like.dense("ffn.lin1", "ffn/up"),
    *like.dense("ffn.lin2", "ffn/down"),
    *like.normed("output_layer_norm", "ffn_norm"),
)
HEADS: tuple[Row, ...] = (
    *like.dense("vocab_transform", "head/transform/dense"),
    *like.normed("vocab_layer_norm", "head/transform/norm"),
    ("vocab_projector.weight", "head/kernel", None),
    ("vocab_projector.bias", "head/bias", None),
    *(row for c in ("labels", "choice") for row in like.dense("pre_classifier", f"classifiers/{c}/transform/dense")),
    *(row for c in ("labels", "choice", "tokens") for row in like.dense("classifier", f"classifiers/{c}/out")),
    *like.dense("qa_outputs", "classifiers/span/out"),
)


def from_hf(config: Config) -> Transformer:
    """The architecture names the head."""
    read, suffix = common.read_fields(config, FIELDS), like.suffix_of(config, ARCHITECTURES)
    c = like.SHAPE | {theirs: read[ours] for ours, theirs in NAMES.items()}
    c |= {"model_type": MODEL_TYPE, "type_vocab_size": None}
    relu = Transform("relu")
    heads = like.heads_of(suffix, like.labels_of(config), relu, choice=relu)
    attn = like.attention(c["hidden_size"], c["num_attention_heads"])
    act = common.activation_from(c["hidden_act"], "activation")
    embed = Embedding(Learned(c["max_position_embeddings"], by="slot"))
    return like.spec_of(c, heads, [attn] * c["num_hidden_layers"], embed, act)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`, of the class that has these heads."""
    config = like.config_of(spec, MODEL_TYPE)
    fields = {ours: config[theirs] for ours, theirs in NAMES.items()} | like.label_fields(spec)
    names = {"model_type": MODEL_TYPE, "architectures": [f"DistilBert{like.class_of(spec, 'ForMaskedLM')}"]}
    return names | fields


def names(spec: Transformer) -> list[Rule]:
    """Layers are called `transformer.layer`."""
    prefix = like.prefix_of(spec, PREFIX)
    top = [*like.under(prefix, like.EMBED), *HEADS]
    rules = common.table(spec, top, f"{prefix}transformer.layer.{{}}.", BLOCK, head="vocab_projector.weight")
    return [*rules, Unused("*position_ids")]
