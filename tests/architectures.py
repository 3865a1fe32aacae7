"""The toy models that contract tests run over: every decoder among the presets, those with equal specs once."""

from functools import cache

import jax
import pytest

from jaxllm.models.presets import PRESETS, toy
from jaxllm.transformer import transformer_params
from tests.models.support import noisy

TOYS = {spec: spec.name for spec in (toy(f()) for f in reversed(PRESETS.values())) if spec.causal}
SPECS = {name: spec for spec, name in TOYS.items()}

COVERING = [
    "toy_smollm2_135m",  # grouped queries, tied
    "toy_gemma2_2b",  # windows, sandwich, soft-caps
    "toy_deepseek_v3",  # latents, experts in groups, a first dense stack
    "toy_bloom_560m",  # ALiBi, embedding norm, biases
    "toy_yoco_3b",  # layers that share keys and values
]
"""Toys over which all contracts run. `test_in_brief` runs over every one; all contracts over all with `-m slow`."""

every_architecture = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COVERING else pytest.mark.slow) for name in SPECS]
)


@cache
def params_of(name):
    return noisy(transformer_params(SPECS[name]))


def tokens(key, *shape):
    return jax.random.randint(key, shape, 0, 97)
