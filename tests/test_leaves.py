"""Every kind of weight goes through `project` and `lookup` and agrees with its dense equivalent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.leaves import Adapted, Quantised, chunk_rows, dense, lookup, pad_rows, project, quantise

EQUATIONS = {
    "q": ("BTD,DNH->BTNH", (6, 4, 8), 1),
    "o": ("BTNH,NHD->BTD", (4, 8, 6), 2),
    "head": ("BTD,VD->BTV", (20, 6), 1),
}


def weights(shape, cut, key):
    keys = jax.random.split(key, 4)
    w = jax.random.normal(keys[0], shape)
    contracted = (1,) if len(shape) == 2 else tuple(range(cut))
    adapted = Adapted(
        w,
        jax.random.normal(keys[1], (*shape[:cut], 3)),
        jax.random.normal(keys[2], (3, *shape[cut:])),
        jnp.float32(0.5),
    )
    q8 = quantise(w, contracted)
    blocks = Quantised(q8.values, jnp.repeat(q8.scale, 2, axis=contracted[0]) * 0.7)
    return {"array": w, "int8": q8, "int8 in blocks": blocks, "lora": adapted, "lora on int8": adapted.replace(base=q8)}


@pytest.mark.parametrize("name", EQUATIONS)
def test_project_equals_dense_einsum(name, getkey):
    equation, shape, cut = EQUATIONS[name]
    x = jax.random.normal(getkey(), (2, 3, 4, 8) if name == "o" else (2, 3, 6))
    for kind, w in weights(shape, cut, getkey()).items():
        want = jnp.einsum(equation, x, dense(w, jnp.float32))
        np.testing.assert_allclose(project(x, w, equation), want, rtol=2e-5, atol=2e-5, err_msg=kind)


def test_int8_error_is_half_a_step(getkey):
    w = jax.random.normal(getkey(), (64, 32))
    q = quantise(w, (0,))
    assert q.values.dtype == jnp.int8
    assert jnp.all(jnp.abs(dense(q, jnp.float32) - w) <= 0.5001 * q.scale)


def test_bias_and_dtype(getkey):
    x, w = jax.random.normal(getkey(), (2, 3, 6), jnp.bfloat16), jax.random.normal(getkey(), (6, 4, 8))
    y = project(x, w, "BTD,DNH->BTNH", jnp.ones((4, 8)))
    assert y.dtype == jnp.bfloat16
    assert y.shape == (2, 3, 4, 8)


def test_lookup_and_rows(getkey):
    for kind, w in weights((20, 6), 1, getkey()).items():
        table = dense(w, jnp.float32)
        ids = jnp.array([[0, 19, 7]])
        if kind != "int8 in blocks":
            np.testing.assert_allclose(lookup(w, ids, jnp.float32), table[ids], rtol=1e-5, atol=1e-6, err_msg=kind)
            assert jnp.isnan(lookup(w, jnp.array([[20]]), jnp.float32)).any(), "an id outside the table must not pass"
        for chunks, ways in [(4, 1), (2, 2), (5, 2)]:
            parts = chunk_rows(w, chunks, ways)
            column = chunk_rows(jnp.arange(20), chunks, ways)
            for i in range(chunks):
                part = dense(jax.tree.map(lambda a, i=i: a[i], parts), jnp.float32)
                np.testing.assert_allclose(part, table[column[i]], rtol=1e-5, atol=1e-6, err_msg=kind)
        np.testing.assert_allclose(dense(pad_rows(w, 24), jnp.float32)[:20], table, rtol=1e-5, atol=1e-6)


def test_lora_gradient_leaves_the_base_alone(getkey):
    w = weights((6, 4, 8), 1, getkey())["lora on int8"]
    x = jax.random.normal(getkey(), (2, 3, 6))

    def loss(ab):
        return jnp.sum(project(x, w.replace(a=ab[0], b=ab[1]), "BTD,DNH->BTNH") ** 2)

    a, b = jax.grad(loss)((w.a, w.b))
    assert float(jnp.abs(a).max()) > 0
    assert float(jnp.abs(b).max()) > 0
