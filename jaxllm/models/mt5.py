"""mT5 (Xue et al. 2021): T5 v1.1 for many languages. Its logits are never scaled."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GLU, EncoderDecoder, LMHead
from jaxllm.models import common, seq2seq
from jaxllm.models import t5_like as like
from jaxllm.models.common import Config, Fields


def mt5_small() -> EncoderDecoder:
    """300,176,768 parameters."""
    sizes, heads, ffn = (512, 8, 8), (6, 64), GLU(1024, "gelu_tanh")
    return like.build("mt5_small", 250_112, sizes, heads, ffn, LMHead(), (32, 128), 1e-6, 0)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "mt5"
SPEC = EncoderDecoder
ARCHITECTURES = ("MT5ForConditionalGeneration", "MT5Model")
PREFIX = ""
PRESETS = (mt5_small,)
OWN = {"vocab_size": 250_112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
FIELDS = Fields(
    read=like.READ | OWN | {"tie_word_embeddings": True},
    only={"is_encoder_decoder": (True,), "is_decoder": (False,)},
    ignored=like.IGNORED | {"tokenizer_class"},
)


def from_hf(config: Config) -> EncoderDecoder:
    """Published files say tie_word_embeddings=false and have a head of their own."""
    c = common.read_fields(config, FIELDS)
    head = LMHead(c["tie_word_embeddings"]) if like.has_head(config) else None
    return like.spec_from(c, head, seq2seq.start_from(config, 0))


def to_hf(spec: EncoderDecoder) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    if spec.head is not None and spec.head.scale != 1.0:
        raise ValueError(f"mt5: config.json of this family cannot express spec {spec.name!r}: its logits are scaled")
    return like.config_of(spec, MODEL_TYPE, "MT5") | {"tie_word_embeddings": spec.tied}


settle, names = like.settle, like.names
