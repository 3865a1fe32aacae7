"""The toy models that contract tests run over: every preset, those with equal specs once."""

from functools import cache

import jax

from jaxllm.models.presets import PRESETS, toy
from jaxllm.params import init
from jaxllm.transformer import transformer_params

TOYS = {spec: spec.name for spec in (toy(f()) for f in reversed(PRESETS.values()))}
SPECS = {name: spec for spec, name in TOYS.items()}


@cache
def params_of(name):
    """Parameters with noise on biases and norms, so that a dropped one shows."""
    params = init(transformer_params(SPECS[name]), jax.random.key(7))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def tokens(key, *shape):
    return jax.random.randint(key, shape, 0, 97)
