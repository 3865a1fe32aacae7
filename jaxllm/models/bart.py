"""BART (Lewis et al. 2020): a post-norm encoder-decoder with learned positions, a norm after the embedding, and a bias
on the logits that is not trained."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

from jaxllm.config import (
    GQA,
    MLP,
    Embedding,
    EncoderDecoder,
    LayerNorm,
    Learned,
    LMHead,
)
from jaxllm.models import common, seq2seq
from jaxllm.models.bart_like import FFN, HEAD, attention_rows, half
from jaxllm.models.bert_like import normed
from jaxllm.models.common import Config, Fields, Row
from jaxllm.rules import Rule


def bart(name: str, dim: int, layers: int, heads: int, vocab: int = 50_265) -> EncoderDecoder:
    """Both halves alike; feed-forward width 4 dim."""
    embed = Embedding(Learned(1024, offset=2, by="slot"), norm=LayerNorm())
    shape, head = (layers, heads, 4 * dim), LMHead(True, bias=True)
    parts = [half(vocab, dim, shape, "gelu", embed, head if own else None, own) for own in (False, True)]
    return EncoderDecoder(*parts, start=2, name=name)


def bart_base() -> EncoderDecoder:
    """139,470,681 parameters: 139,420,416 and the bias of the logits."""
    return bart("bart_base", 768, 6, 12)


def bart_large() -> EncoderDecoder:
    """406,341,721 parameters: 406,291,456 and the bias of the logits (bart-large-cnn has one id less)."""
    return bart("bart_large", 1024, 12, 16)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "bart"
SPEC = EncoderDecoder
ARCHITECTURES = ("BartForConditionalGeneration", "BartModel")
PREFIX = "model."
PRESETS = (bart_base, bart_large)
FIELDS = Fields(
    read={
        "vocab_size": 50_265,
        "d_model": 1024,
        "max_position_embeddings": 1024,
        "encoder_layers": 12,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_layers": 12,
        "decoder_attention_heads": 16,
        "decoder_ffn_dim": 4096,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
    },
    only={
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
        "normalize_before": (False,),
        "normalize_embedding": (True,),
        "add_final_layer_norm": (False,),
        "add_bias_logits": (False,),
        "static_position_embeddings": (False,),
        "extra_pos_embeddings": (2,),
        "do_blenderbot_90_layernorm": (False,),
    },
    ignored=frozenset(
        {"dropout", "activation_dropout", "classifier_dropout", "classif_dropout", "encoder_layerdrop", "init_std"}
    )
    | {"decoder_layerdrop", "num_hidden_layers", "save_step", "force_bos_token_to_be_generated"},
    aliases={"num_attention_heads": "encoder_attention_heads", "hidden_size": "d_model"},
)


def from_hf(config: Config) -> EncoderDecoder:
    """`scale_embedding` multiplies token vectors by sqrt(d_model)."""
    c, dim = common.read_fields(config, FIELDS), config.get("d_model", 1024)
    act = common.activation_from(c["activation_function"], "activation_function")
    scale = dim**0.5 if c["scale_embedding"] else None
    embed = Embedding(Learned(c["max_position_embeddings"], offset=2, by="slot"), scale, norm=LayerNorm())
    bare = "BartModel" in (config.get("architectures") or ())
    head = None if bare else LMHead(c["tie_word_embeddings"], bias=True)
    parts = []
    for side, own in (("encoder", False), ("decoder", True)):
        shape = (c[f"{side}_layers"], c[f"{side}_attention_heads"], c[f"{side}_ffn_dim"])
        parts.append(half(c["vocab_size"], c["d_model"], shape, act, embed, head if own else None, own))
    return EncoderDecoder(*parts, start=seq2seq.start_from(config, 2), name=MODEL_TYPE)


def to_hf(spec: EncoderDecoder) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    position, sides = spec.embed.position, []
    for own in (spec.encoder, spec.decoder):
        block = common.layers_of(own)[0]
        if not (isinstance(block.attn, GQA) and isinstance(block.ffn, MLP) and isinstance(position, Learned)):
            raise ValueError(f"bart: config.json of this family cannot express spec {spec.name!r}")
        sides += [own.layers, block.attn.heads, block.ffn.hidden]
        act = common.activation_to(block.ffn.act)
    assert position is not None, "checked above"
    scaled, tied = spec.embed.scale is not None, spec.head is None or spec.tied
    values = (spec.vocab, spec.dim, position.length, *sides, act, scaled, tied)
    suffix = "Model" if spec.head is None else "ForConditionalGeneration"
    names = {"model_type": MODEL_TYPE, "architectures": [f"Bart{suffix}"], "is_encoder_decoder": True}
    return names | dict(zip(FIELDS.read, values, strict=True)) | {"decoder_start_token_id": spec.start}


def settle(spec: EncoderDecoder, names: Set[str]) -> EncoderDecoder:
    """A checkpoint without the logits' bias has none."""
    if spec.head is None or "final_logits_bias" in names:
        return spec
    return replace(spec, decoder=replace(spec.decoder, head=replace(spec.head, bias=False)))


def names(spec: EncoderDecoder) -> list[Rule]:
    """The published bias is a row [1, V]."""
    prefix = "" if spec.head is None else PREFIX

    def rows(side: str, layer: tuple[Row, ...], extra: tuple[Row, ...] = ()) -> seq2seq.Half:
        table: Row = (f"{prefix}{side}.embed_positions.weight", "embed/positions", None)
        top = [table, *normed(f"{prefix}{side}.layernorm_embedding", "embed/norm"), *extra]
        return top, f"{prefix}{side}.layers.{{}}.", layer

    own, cross = attention_rows("self_attn", "attn"), attention_rows("encoder_attn", "cross")
    halves = rows("encoder", (*own, *FFN)), rows("decoder", (*own, *cross, *FFN), HEAD)
    return seq2seq.names_with(spec, prefix, *halves, sizes=(("A", 1),))
