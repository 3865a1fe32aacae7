"""Every kind of spec, and what derives from a spec whatever its kind."""

from __future__ import annotations

from typing import assert_never

from jaxllm.config import EncoderDecoder, Transformer, TwoTower, VisionLanguage
from jaxllm.encoder_decoder import encoder_decoder_params
from jaxllm.params import ParamTree
from jaxllm.transformer import transformer_params
from jaxllm.two_tower import two_tower_params
from jaxllm.vision_language import vision_language_params

Spec = Transformer | EncoderDecoder | TwoTower | VisionLanguage


def model_params(spec: Spec) -> ParamTree:
    """The declared parameters of a whole model."""
    match spec:
        case Transformer():
            return transformer_params(spec)
        case EncoderDecoder():
            return encoder_decoder_params(spec)
        case TwoTower():
            return two_tower_params(spec)
        case VisionLanguage():
            return vision_language_params(spec)
        case other:
            assert_never(other)


def halves(spec: Spec) -> dict[str, Transformer]:
    """The transformers over tokens that a model is made of, by the name of their parameters; "" is the whole model."""
    match spec:
        case Transformer():
            return {"": spec}
        case EncoderDecoder():
            return {"encoder": spec.encoder, "decoder": spec.decoder}
        case TwoTower() | VisionLanguage():
            return {"text": spec.text}
        case other:
            assert_never(other)
