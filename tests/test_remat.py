"""Policies: what a list saves, how it is written, and what it may not be. (That none changes a value: contracts.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import SPECS, params_of, tokens

from jaxllm import serial
from jaxllm.experiment import Data, Experiment, Source, saved
from jaxllm.models.presets import PRESETS
from jaxllm.records import inputs
from jaxllm.remat import NAMES, saved_names
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward


def test_aliases_are_lists():
    assert saved_names("none") is None and saved_names("full") == ()
    assert set(saved_names("dots")) == set(NAMES) - {"stream", "attention"}
    assert saved_names("attention") == ("attention",)


def test_a_list_is_an_override_and_survives_json():
    exp = Experiment(PRESETS["smollm2_135m"](), Data((Source("x"),), 128), 1, 1, "run")
    for text in ("runtime.remat=query,gate", "runtime.remat=[query, gate]"):
        assert serial.override(exp, [text]).runtime.remat == ("query", "gate")
    exp = serial.override(exp, ["runtime.remat=up,down", "runtime.offload=stream,up"])
    assert saved(serial.dumps(exp)) == exp and exp.runtime.offload == ("stream", "up")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat": ("quary",)}, "called 'quary'; did you mean 'query'.*names: stream, query"),
        ({"remat": "most"}, "'most' must be one of none, full, attention, dots, or a list"),
        ({"remat": "full", "offload": ("steam",)}, "runtime.offload: .* did you mean 'stream'"),
        ({"remat": "full", "offload": "stream"}, r"must be a tuple of names; write \('stream',\)"),
        ({"matmul": "int4"}, "must be one of default, int8, fp8"),
        ({"offload": ("stream",)}, 'remat="none" the compiler chooses.*set runtime.remat'),
    ],
)
def test_bad_lists(changes, message):
    with pytest.raises(ValueError, match=message):
        Runtime(**changes)


def test_a_list_will_do():
    listed = Runtime(remat=["query"], offload=["query"])
    assert hash(listed) == hash(Runtime(remat=("query",), offload=("query",)))


def test_a_bad_name_in_an_override_is_told_the_choices():
    exp = Experiment(PRESETS["smollm2_135m"](), Data((Source("x"),), 128), 1, 1, "run")
    with pytest.raises(ValueError, match=r"must be one of none, full.*or .*must be one of stream, query"):
        serial.override(exp, ["runtime.remat=quary,gate"])


def test_offloaded_values_come_back():
    """On this backend too: what lies in the host's memory gives the same gradients."""
    spec, params, ids = SPECS["toy_llama31_8b"], params_of("toy_llama31_8b"), tokens(jax.random.key(0), 2, 24)

    def grads(runtime):
        def loss(params):
            return jnp.mean(jnp.square(forward(params, spec, inputs(ids), runtime).hidden_BTD))

        return jax.jit(jax.grad(loss))(params)

    plain = grads(Runtime())
    got = grads(Runtime(remat=("up",), offload=("stream", "query", "attention")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, plain)
