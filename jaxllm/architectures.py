"""Every kind of spec, and what derives from a spec whatever its kind."""

from __future__ import annotations

from jaxllm.config import Transformer
from jaxllm.params import ParamTree
from jaxllm.transformer import transformer_params

Spec = Transformer


def model_params(spec: Spec) -> ParamTree:
    """The declared parameters of a whole model."""
    return transformer_params(spec)
