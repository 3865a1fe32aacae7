"""What tests of families share: golden checkpoints, their configs with fields changed, closeness, noisy parameters."""

import json
from functools import cache
from pathlib import Path

import jax
import numpy as np

import jaxllm
from jaxllm.models.common import layers_of
from jaxllm.models.families import FAMILIES, family_of_spec, spec_of_config
from jaxllm.models.rope import classic
from jaxllm.params import init

GOLDENS = Path(__file__).parents[1] / "goldens"


@cache
def load(name):
    return jaxllm.load(GOLDENS / name), np.load(GOLDENS / name / "golden.npz")


def config_of(name, file="config.json"):
    return json.loads((GOLDENS / name / file).read_text())


def changed(name, change):
    """The config with these fields; the value "absent" takes one away."""
    return {k: v for k, v in (config_of(name) | change).items() if v != "absent"}


def comes_back(config, look, value):
    """A field shows in the spec; the family that was read writes it again, in either style."""
    spec = spec_of_config(config)
    assert look(spec) == value
    family, written = family_of_spec(spec)
    assert family is FAMILIES[config["model_type"]]
    assert spec_of_config(written) == spec_of_config(classic(written)) == spec


def first(look):
    """What `look` finds in the first layer of a spec."""
    return lambda spec: look(layers_of(spec)[0])


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance)


def noisy(tree, noise=0.1):
    """Parameters with noise on biases and norms, so that a dropped one shows."""
    leaves, structure = jax.tree.flatten(init(tree, jax.random.key(7)))
    keys = jax.random.split(jax.random.key(8), len(leaves))
    return structure.unflatten(x + noise * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True))
