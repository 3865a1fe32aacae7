"""Products in 8 bits: errors against float32, what is left out, and a toy that trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import SPECS, params_of, tokens

from jaxllm import serial
from jaxllm.experiment import Data, Experiment, Source
from jaxllm.leaves import Lowered, is_weight, lower
from jaxllm.lowered import matmul
from jaxllm.models.presets import PRESETS
from jaxllm.records import inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward, logits, place_params

KINDS = {"int8": 0.03, "fp8": 0.1}
"""Relative error (norms) of a product: half a step of 127, in rows of unlike size; 3 bits of mantissa (gradients 2)."""
LOSSES = {"int8": 0.03, "fp8": 0.08}
"""How far a toy's mean loss over 40 steps may be from that in float32."""


def relative(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF"])
def test_products_and_gradients_are_near(kind, equation):
    sizes = {"B": 2, "T": 32, "D": 48, "N": 4, "H": 16, "F": 80}
    operands, out = equation.split("->")
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (
        jax.random.normal(k, [sizes[c] for c in axes])
        for k, axes in zip(keys, (*operands.split(","), out), strict=True)
    )
    x = x * jnp.linspace(0.1, 10, x.shape[1]).reshape(1, -1, *[1] * (x.ndim - 2))  # rows of different sizes
    y, pull = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    got, pull_low = jax.vjp(lambda x, w: matmul(equation, kind, x, w), x, w)
    assert 1e-4 < relative(got, y) < KINDS[kind]
    for a, b in zip(pull_low(g), pull(g), strict=True):
        assert 1e-4 < relative(a, b) < KINDS[kind]


def test_zeros_and_huge_values_stay_finite():
    for kind in KINDS:
        for x in (jnp.zeros((4, 8)), jnp.full((4, 8), 1e30)):
            y = matmul("TD,DF->TF", kind, x, jnp.ones((8, 16)))
            np.testing.assert_allclose(y, x.sum(1, keepdims=True) * jnp.ones((1, 16)), rtol=0.02)


def test_operands_are_8_bit_in_the_program():
    """In all three products, and the sums of int8 are int32."""

    def grads(x, w):
        return jax.grad(lambda x, w: matmul("TD,DF->TF", "int8", x, w).sum(), (0, 1))(x, w)

    text = jax.jit(grads).lower(jnp.ones((16, 32)), jnp.ones((32, 64))).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 2, "the gradients' (the value is not asked for)"
    assert all(line.count("xi8>") == 2 and "xi32>" in line for line in dots)


def test_what_is_left_out():
    spec = SPECS["toy_deepseek_v3"]
    for stack in spec.stacks:
        declared = place_params(stack, 0, spec.dim)
        arrays = jax.tree.map(lambda p: jnp.zeros(p.shape), declared, is_leaf=lambda p: hasattr(p, "init"))
        flat = jax.tree_util.tree_flatten_with_path(lower(declared, arrays, "int8"), is_leaf=is_weight)[0]
        low = {jax.tree_util.keystr(path) for path, w in flat if isinstance(w, Lowered)}
        assert all("kernel" in path and "router" not in path and "experts" not in path for path in low)
        assert any("'o'" in path for path in low) and any("down" in path for path in low)


@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_trains_to_nearly_the_same_loss(kind):
    spec, start = SPECS["toy_smollm2_135m"], params_of("toy_smollm2_135m")
    ids = tokens(jax.random.key(0), 4, 24)

    def final(runtime):
        optimizer = optax.adam(3e-3)

        @jax.jit
        def step(params, state):
            def loss(params):
                out = logits(params, spec, forward(params, spec, inputs(ids), runtime).hidden_BTD, runtime)
                return optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], ids[:, 1:]).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        params, state = start, optimizer.init(start)
        values = []
        for _ in range(40):
            params, state, value = step(params, state)
            values.append(float(value))
        return values

    plain, low = final(Runtime()), final(Runtime(matmul=kind, remat=("query", "gate")))
    assert plain[-1] < plain[0] - 1
    assert np.mean(low) == pytest.approx(np.mean(plain), rel=LOSSES[kind])
    assert low[0] != plain[0], "products are rounded"


def test_a_bad_kind_is_told_the_choices():
    exp = Experiment(PRESETS["smollm2_135m"](), Data((Source("x"),), 128), 1, 1, "run")
    assert serial.override(exp, ["runtime.matmul=fp8"]).runtime.matmul == "fp8"
    with pytest.raises(ValueError, match=r"must be one of default; or .*must be one of int8, fp8"):
        serial.override(exp, ["runtime.matmul=int4"])
