"""Grouped matmuls against every row's matrix written out: values, gradients, uneven and empty groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.grouped import block_rows, by_blocks, grouped_matmul, reference

CASES = {
    "uneven": [3, 0, 7, 1, 0, 13],
    "one group": [24, 0, 0, 0],
    "last group": [0, 0, 0, 24],
    "all of one": [1] * 9,
    "fewer rows than groups": [0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0],
    "single": [5],
    "whole blocks": [8, 8, 8],
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("op", [by_blocks, grouped_matmul, jax.lax.ragged_dot], ids=lambda f: f.__name__)
def test_values_and_gradients(op, sizes, getkey):
    x = jax.random.normal(getkey(), (sum(sizes), 6))
    w, g = jax.random.normal(getkey(), (len(sizes), 6, 5)), jax.random.normal(getkey(), (sum(sizes), 5))
    size_E = jnp.array(sizes, jnp.int32)

    @jax.jit
    def both():
        def value_and_pulled(op):
            y, pull = jax.vjp(lambda x, w: op(x, w, size_E), x, w)
            return y, pull(g)

        return value_and_pulled(op), value_and_pulled(reference)

    (got, got_grad), (want, want_grad) = both()
    np.testing.assert_allclose(got, want, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got_grad, want_grad)


def test_bfloat16(getkey):
    x, w = (jax.random.normal(getkey(), shape, jnp.bfloat16) for shape in ((8, 4), (2, 4, 4)))
    got = by_blocks(x, w, jnp.array([3, 5], jnp.int32))
    assert got.dtype == jnp.bfloat16
    want = reference(x, w, jnp.array([3, 5])).astype(jnp.float32)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.05, atol=0.05)


def test_blocks_are_as_large_as_groups():
    assert [block_rows(rows, 8) for rows in (1, 8, 16, 17, 24, 64, 100_000)] == [1, 1, 2, 2, 4, 8, 128]
