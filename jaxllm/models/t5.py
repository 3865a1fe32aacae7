"""T5 (Raffel et al. 2020) and T5 v1.1, Flan-T5: encoder-decoders with relative biases, unscaled scores and RMSNorm.

v1.0: ReLU, a tied head whose logits are scaled by dim^-0.5. v1.1: gated GELU and a head of its own. Whether the head is
tied is told by the tensors: transformers 5 writes tie_word_embeddings=true for both.
"""

from __future__ import annotations

from typing import Any

from jaxllm.config import FFN, GLU, MLP, EncoderDecoder, LMHead
from jaxllm.models import common, seq2seq
from jaxllm.models import t5_like as like
from jaxllm.models.common import Config, Fields


def t5(name: str, sizes: tuple[int, int, int], heads: tuple[int, int], ffn: FFN, head: LMHead) -> EncoderDecoder:
    """sizes: width, layers of the encoder, of the decoder.  heads: how many, and their width."""
    return like.build(name, 32_128, sizes, heads, ffn, head, (32, 128), 1e-6, 0)


def t5_small() -> EncoderDecoder:
    """60,506,624 parameters."""
    return t5("t5_small", (512, 6, 6), (8, 64), MLP(2048, "relu"), LMHead(True, scale=512**-0.5))


def t5_base() -> EncoderDecoder:
    """222,903,552 parameters."""
    return t5("t5_base", (768, 12, 12), (12, 64), MLP(3072, "relu"), LMHead(True, scale=768**-0.5))


def t5_v1_1_small() -> EncoderDecoder:
    """76,961,152 parameters (Flan-T5 small as well)."""
    return t5("t5_v1_1_small", (512, 8, 8), (6, 64), GLU(1024, "gelu_tanh"), LMHead())


def t5_v1_1_base() -> EncoderDecoder:
    """247,577,856 parameters (Flan-T5 base as well)."""
    return t5("t5_v1_1_base", (768, 12, 12), (12, 64), GLU(2048, "gelu_tanh"), LMHead())


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "t5"
SPEC = EncoderDecoder
ARCHITECTURES = ("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")
PREFIX = ""
PRESETS = (t5_small, t5_base, t5_v1_1_small, t5_v1_1_base)
PREFERRED = True
FIELDS = Fields(
    read=like.READ | {"scale_decoder_outputs": None, "tie_word_embeddings": True},
    only={"is_encoder_decoder": (True,), "is_decoder": (False,)},
    ignored=like.IGNORED,
)


def from_hf(config: Config) -> EncoderDecoder:
    """Logits are scaled unless `scale_decoder_outputs` (5), or else `tie_word_embeddings` (4), is false."""
    c = common.read_fields(config, FIELDS)
    scaled = c["tie_word_embeddings"] if c["scale_decoder_outputs"] is None else c["scale_decoder_outputs"]
    head = LMHead(scaled, scale=c["d_model"] ** -0.5 if scaled else 1.0) if like.has_head(config) else None
    return like.spec_from(c, head, seq2seq.start_from(config, 0))


def to_hf(spec: EncoderDecoder) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    scaled = spec.head is not None and spec.head.scale != 1.0
    return like.config_of(spec, MODEL_TYPE, "T5") | {"scale_decoder_outputs": scaled, "tie_word_embeddings": scaled}


settle, names = like.settle, like.names
