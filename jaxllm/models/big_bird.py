"""BigBird (Zaheer et al. 2020): BERT whose layers see a few blocks of a long row: `config.BigBird`."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from jaxllm.config import GQA, BigBird, Embedding, Full, LayerNorm, Learned, Pattern, Transform, Transformer, decoder
from jaxllm.models import bert_like as like
from jaxllm.models import common
from jaxllm.models.common import Config, Fields
from jaxllm.rules import Rule


def attention(dim: int, heads: int, pattern: Pattern, bias: bool = True) -> GQA:
    """Head width dim / heads; `bias` is that of queries, keys and values."""
    return GQA(heads, heads, dim // heads, pattern=pattern, qkv_bias=bias, out_bias=True)


def bigbird_roberta_base() -> Transformer:
    """127,468,800 parameters: what `BigBirdModel` holds, the pooler included."""
    block = like.block(attention(768, 12, BigBird(64, 3)), 3072, "gelu_tanh", 1e-12)
    embed, heads = Embedding(Learned(4096, by="slot"), types=2, norm=LayerNorm(1e-12)), (like.POOLER,)
    stacks = decoder(block, layers=12)
    return Transformer(50_358, 768, stacks, None, 4096, embed, None, False, heads, name="bigbird_roberta_base")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "big_bird"
ARCHITECTURES = tuple(
    f"BigBird{suffix}"
    for suffix in (
        "Model", "ForMaskedLM", "ForPreTraining", "ForCausalLM", "ForSequenceClassification", "ForMultipleChoice",
        "ForTokenClassification",
    )
)  # fmt: skip
PREFIX = "bert."
PRESETS = (bigbird_roberta_base,)
OWN = {"vocab_size": 50_358, "hidden_act": "gelu_new", "max_position_embeddings": 4096}
SPARSE = {"attention_type": "block_sparse", "block_size": 64, "num_random_blocks": None}
FIELDS = Fields(
    read=like.SHAPE | OWN | SPARSE | {"use_bias": True, "rescale_embeddings": False},
    only=like.ONLY,
    ignored=like.DROPOUT,
)


def from_hf(config: Config) -> Transformer:
    """Every class has a pooler, whether it reads it or not; a decoder (`is_decoder`) sees its whole past."""
    c, suffix = common.read_fields(config, FIELDS), like.suffix_of(config, ARCHITECTURES)
    act, dim = common.activation_from(c["hidden_act"], "hidden_act"), c["hidden_size"]
    lm, heads = like.heads_of(suffix, like.labels_of(config), Transform(act))
    attn = attention(dim, c["num_attention_heads"], pattern_from(c), c["use_bias"])
    embed = Embedding(Learned(c["max_position_embeddings"], by="slot"), dim**0.5 if c["rescale_embeddings"] else None)
    heads = heads if {name for name, _ in heads} & {"nsp", "choice"} else (*heads, like.POOLER)
    return like.spec_of(c, (lm, heads), [attn] * c["num_hidden_layers"], embed, act)


def pattern_from(c: Config) -> Pattern:
    """The pattern of `attention_type`."""
    kind, random = c["attention_type"], 3 if c["num_random_blocks"] is None else c["num_random_blocks"]
    if kind not in ("block_sparse", "original_full") or (kind == "block_sparse" and c["is_decoder"]):
        raise ValueError(
            f"config.json of big_bird: attention_type must be 'original_full', or 'block_sparse' with "
            f"is_decoder=false, found {kind!r} and is_decoder={c['is_decoder']}"
        )
    return Full() if kind == "original_full" else BigBird(c["block_size"], random)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`, of the class that has these heads."""
    config, (attn, ffn) = like.config_of(spec, MODEL_TYPE), common.plain_layer(MODEL_TYPE, spec)
    match attn.pattern:
        case BigBird(block, random, None):
            sparse: dict[str, Any] = dict(zip(SPARSE, ("block_sparse", block, random), strict=True))
        case Full():
            sparse = {"attention_type": "original_full"}
        case _:
            raise common.foreign(MODEL_TYPE, spec)
    act = "gelu_new" if ffn.act == "gelu_tanh" else config["hidden_act"]
    names = {"architectures": [f"BigBird{like.class_of(spec, 'ForCausalLM')}"], "hidden_act": act}
    flags = {"use_bias": attn.qkv_bias, "rescale_embeddings": spec.embed.scale is not None}
    return config | names | sparse | flags


def settle(spec: Transformer, names: Set[str]) -> Transformer:
    """With or without pooler, as the checkpoint has it."""
    return like.settle(spec, names, "pooler.weight")


def names(spec: Transformer) -> list[Rule]:
    """BERT's, but for the pooler and the classifier of whole rows, which has a transform of its own."""
    base = like.pooled("pooler", "pooler", "nsp", "choice")
    heads = (*like.cls_head(spec), *like.CLASSIFIERS, *like.OWN_CLASSIFIER)
    return like.names_with(spec, PREFIX, base, heads, "cls.predictions.decoder")
