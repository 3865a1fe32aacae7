"""What BERT's descendants share: encoder layers, and the heads that the name of a published class stands for.

A class is the family's name and a suffix. What the class leaves open (is there a pooler?) is told by the tensors that a
checkpoint holds: `settle`.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

from jaxllm.config import (
    GQA,
    MLP,
    Activation,
    Attention,
    Block,
    Classifier,
    Embedding,
    LayerNorm,
    Learned,
    LMHead,
    Longformer,
    Transform,
    Transformer,
)
from jaxllm.models.common import Config, Row, activation_from, activation_to, foreign, layers_of, stacks_of, table
from jaxllm.rules import Alias, Rule, Unused

SHAPE: dict[str, Any] = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "is_decoder": False,
    "tie_word_embeddings": True,
}
DROPOUT = frozenset({"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"})
ONLY: dict[str, tuple[Any, ...]] = {"position_embedding_type": ("absolute", None)}

TANH = Transform("tanh")
POOLER = ("pooler", Classifier(None, transform=TANH))


def block(attn: Attention, hidden: int, act: Activation, eps: float) -> Block:
    """A post-norm layer with biases everywhere."""
    return Block(attn, MLP(hidden, act, bias=True), LayerNorm(eps), "post")


def attention(dim: int, heads: int) -> GQA:
    """Full attention with biases."""
    return GQA(heads, heads, dim // heads, qkv_bias=True, out_bias=True)


# ------------------------------------------------------------------------------------------------------------ heads

Heads = tuple[bool, tuple[tuple[str, Classifier], ...]]  # whether there is a masked-language-model head; classifiers


def heads_of(suffix: str, labels: int, sentence: Transform, choice: Transform = TANH) -> Heads:
    """The heads of a class. sentence, choice: what stands before the scores of a whole row."""
    row = {"labels": Classifier(labels, transform=sentence), "choice": Classifier(1, transform=choice)}
    return {
        "Model": (False, ()),
        "ForMaskedLM": (True, ()),
        "LMHeadModel": (True, ()),
        "ForCausalLM": (True, ()),
        "ForPreTraining": (True, (("nsp", Classifier(2, transform=TANH)),)),
        "ForNextSentencePrediction": (False, (("nsp", Classifier(2, transform=TANH)),)),
        "ForSequenceClassification": (False, (("labels", row["labels"]),)),
        "ForMultipleChoice": (False, (("choice", row["choice"]),)),
        "ForTokenClassification": (False, (("tokens", Classifier(labels, "tokens")),)),
        "ForQuestionAnswering": (False, (("span", Classifier(labels, "tokens")),)),
    }[suffix]


def suffix_of(config: Config, architectures: Sequence[str]) -> str:
    """Which class a config is of: the first known one of its `architectures`, or the family's first."""
    named = [a for a in config.get("architectures") or () if a in architectures] or architectures[:1]
    base = next(a for a in architectures if a.endswith("Model") and not a.endswith("LMHeadModel"))
    return named[0].removeprefix(base.removesuffix("Model"))


def labels_of(config: Config) -> int:
    """How many labels a classifier has."""
    named = config.get("id2label")
    return len(named) if named else int(config.get("num_labels") or 2)


def class_of(spec: Transformer, causal: str) -> str:
    """The suffix of the class with these heads. causal: that of a decoder."""
    kinds = {name for name, _ in spec.classifiers} - {"pooler"}
    if spec.head is not None:
        return "ForPreTraining" if kinds else causal if spec.causal else "ForMaskedLM"
    names = {"nsp": "NextSentencePrediction", "labels": "SequenceClassification", "choice": "MultipleChoice"}
    names |= {"tokens": "TokenClassification", "span": "QuestionAnswering"}
    return "For" + names[next(iter(kinds))] if kinds else "Model"


def label_fields(spec: Transformer) -> dict[str, Any]:
    """`id2label` and `label2id`, with made-up names, when there are labels."""
    found = [c.labels for name, c in spec.classifiers if name in ("labels", "tokens", "span") and c.labels is not None]
    numbered = [(i, f"LABEL_{i}") for i in range(found[0])] if found else []
    return {"id2label": {str(i): n for i, n in numbered}, "label2id": {n: i for i, n in numbered}} if found else {}


def lm_head(tied: bool, act: Activation, eps: float) -> LMHead:
    """BERT's masked-language-model head."""
    return LMHead(tied, bias=True, transform=Transform(act, LayerNorm(eps)))


def settle(spec: Transformer, names: Set[str], pooler: str = "pooler.dense.weight") -> Transformer:
    """The spec with the pooler and the next-sentence head that these tensors (without the family's prefix) hold."""
    heads = tuple((name, c) for name, c in spec.classifiers if name != "pooler")
    through_pooler = {"nsp", "choice"} | ({"labels"} if "classifier.weight" in names else set())
    if pooler in names and not through_pooler & {name for name, _ in heads}:
        nsp = "cls.seq_relationship.weight" in names
        heads += (("nsp", Classifier(2, transform=TANH)),) if nsp else (POOLER,)
    return replace(spec, classifiers=heads)


# ---------------------------------------------------------------------------------------------------- specs, configs


def spec_of(c: Config, heads: Heads, attns: Sequence[Attention], embed: Embedding, head_act: Activation) -> Transformer:
    """The spec of read fields `c`. attns: one per layer."""
    act, eps = activation_from(c["hidden_act"], "hidden_act"), float(c["layer_norm_eps"])
    layers = [block(attn, c["intermediate_size"], act, eps) for attn in attns]
    embed = replace(embed, types=c["type_vocab_size"], norm=LayerNorm(eps))
    head = lm_head(c["tie_word_embeddings"], head_act, eps) if heads[0] else None
    size = embed.position.length if embed.position is not None else c["max_position_embeddings"]
    return Transformer(
        c["vocab_size"], c["hidden_size"], stacks_of(layers), None, size, embed, head, c["is_decoder"], heads[1],
        name=c["model_type"],
    )  # fmt: skip


def config_of(spec: Transformer, model_type: str) -> dict[str, Any]:
    """The fields of SHAPE and the labels; ValueError for a spec of another shape."""
    block, norm, position = layers_of(spec)[0], spec.embed.norm, spec.embed.position
    attn, ffn = block.attn, block.ffn
    if not (isinstance(attn, GQA | Longformer) and isinstance(ffn, MLP)):
        raise foreign(model_type, spec)
    if not (isinstance(norm, LayerNorm) and isinstance(position, Learned)):
        raise foreign(model_type, spec)
    rows = position.length + position.offset
    values = (spec.vocab, spec.dim, spec.layers, attn.heads, ffn.hidden, activation_to(ffn.act), rows)
    values += (spec.embed.types, norm.eps, spec.causal, spec.head is None or spec.tied)
    return {"model_type": model_type} | dict(zip(SHAPE, values, strict=True)) | label_fields(spec)


def padding_from(config: Config) -> int:
    """The id that positions do not count."""
    padding = config.get("pad_token_id", 1)
    if not isinstance(padding, int):
        raise ValueError(f"config.json: pad_token_id must be an id, since positions go by it, found {padding!r}")
    return padding


def padding_fields(model_type: str, spec: Transformer) -> dict[str, int]:
    """`pad_token_id`; ValueError for positions that count padding."""
    position = spec.embed.position
    if not isinstance(position, Learned) or position.padding is None or position.offset != position.padding + 1:
        raise foreign(model_type, spec)
    return {"pad_token_id": position.padding}


# ------------------------------------------------------------------------------------------------------------ names

E_D = "E D -> D E"  # a PyTorch linear [out, in]


def dense(name: str, path: str, layout: str | None = E_D) -> tuple[Row, Row]:
    """Weight and bias of a linear map."""
    return (f"{name}.weight", f"{path}/kernel", layout), (f"{name}.bias", f"{path}/bias", None)


def normed(name: str, path: str) -> tuple[Row, Row]:
    """Weight and bias of a norm."""
    return (f"{name}.weight", f"{path}/scale", None), (f"{name}.bias", f"{path}/bias", None)


def projection(name: str, path: str) -> tuple[Row, Row]:
    """Weight and bias of a projection to heads."""
    return (f"{name}.weight", f"{path}/kernel", "(N H) D -> D N H"), (f"{name}.bias", f"{path}/bias", "(N H) -> N H")


EMBED: tuple[Row, ...] = (
    ("embeddings.word_embeddings.weight", "embed/tokens", None),
    ("embeddings.position_embeddings.weight", "embed/positions", None),
    ("embeddings.token_type_embeddings.weight", "embed/types", None),
    *normed("embeddings.LayerNorm", "embed/norm"),
)
BLOCK: tuple[Row, ...] = (
    *projection("attention.self.query", "attn/q"),
    *projection("attention.self.key", "attn/k"),
    *projection("attention.self.value", "attn/v"),
    *dense("attention.output.dense", "attn/o", "D (N H) -> N H D"),
    *normed("attention.output.LayerNorm", "attn_norm"),
    *dense("intermediate.dense", "ffn/up"),
    *dense("output.dense", "ffn/down"),
    *normed("output.LayerNorm", "ffn_norm"),
)
CLASSIFIERS: tuple[Row, ...] = (
    *dense("cls.seq_relationship", "classifiers/nsp/out"),
    *dense("classifier", "classifiers/choice/out"),
    *dense("classifier", "classifiers/tokens/out"),
    *dense("qa_outputs", "classifiers/span/out"),
)
OWN_CLASSIFIER: tuple[Row, ...] = (  # RoBERTa's head over whole rows, which leaves the pooler alone
    *dense("classifier.dense", "classifiers/labels/transform/dense"),
    *dense("classifier.out_proj", "classifiers/labels/out"),
)


def pooled(name: str, *classifiers: str) -> tuple[Row, ...]:
    """The pooler's rows, wherever it stands."""
    return tuple(row for c in classifiers for row in dense(name, f"classifiers/{c}/transform/dense"))


def cls_head(spec: Transformer) -> tuple[Row, ...]:
    """BERT's head. An untied one has a bias of its own, beside one that nothing reads and that is not written."""
    own = "cls.predictions.bias" if spec.tied else "cls.predictions.decoder.bias"
    return (
        *dense("cls.predictions.transform.dense", "head/transform/dense"),
        *normed("cls.predictions.transform.LayerNorm", "head/transform/norm"),
        ("cls.predictions.decoder.weight", "head/kernel", None),
        (own, "head/bias", None),
    )


def roberta_head(spec: Transformer) -> tuple[Row, ...]:
    """RoBERTa's names of the same."""
    return (
        *dense("lm_head.dense", "head/transform/dense"),
        *normed("lm_head.layer_norm", "head/transform/norm"),
        ("lm_head.decoder.weight", "head/kernel", None),
        ("lm_head.bias" if spec.tied else "lm_head.decoder.bias", "head/bias", None),
    )


def prefix_of(spec: Transformer, prefix: str) -> str:
    """What names begin with: nothing without heads."""
    return "" if spec.head is None and {name for name, _ in spec.classifiers} <= {"pooler"} else prefix


def under(prefix: str, rows: Sequence[Row]) -> list[Row]:
    """The rows with a prefix to their names."""
    return [(prefix + name, path, layout) for name, path, layout in rows]


def names_with(
    spec: Transformer,
    prefix: str,
    base: Sequence[Row],
    heads: Sequence[Row],
    decoder: str,
    layer: Sequence[Row] = BLOCK,
) -> list[Rule]:
    """The table. base: rows under the prefix, which a checkpoint without heads lacks.  decoder: name of the head."""
    prefix = prefix_of(spec, prefix)
    rules = table(
        spec, [*under(prefix, (*EMBED, *base)), *heads], f"{prefix}encoder.layer.{{}}.", layer, head=f"{decoder}.weight"
    )
    stem = decoder.removesuffix(".decoder")
    spare: list[Rule] = [Alias(f"{decoder}.bias", "head/bias")] if spec.tied else [Unused(f"{stem}.bias")]
    return [*rules, *(spare if spec.head is not None else ()), Unused("*position_ids")]
