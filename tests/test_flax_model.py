"""The Flax face: same parameters, same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from architectures import params_of

from jaxllm.config import GLU, GQA, Block, RMSNorm, Rope, Transformer, decoder
from jaxllm.flax_model import FlaxModel
from jaxllm.model import logits
from jaxllm.models.presets import PRESETS, toy
from jaxllm.params import abstract
from jaxllm.transformer import transformer_params

SPEC = toy(PRESETS["gemma2_2b"]())


def test_init_declares_the_same_tree():
    variables = FlaxModel(SPEC).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    want = abstract(transformer_params(SPEC))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables["params"]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )


def test_apply_gives_the_same_logits():
    params, ids = params_of("toy_gemma2_2b"), np.arange(12).reshape(2, 6)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    got = FlaxModel(SPEC).apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
    want = logits(SPEC, params, ids, mask)
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], rtol=0, atol=1e-5)


def test_a_flax_loop_trains_and_drops_out():
    block = Block(GQA(2, 2, 8, Rope()), GLU(32), RMSNorm(), dropout=0.1)
    model = FlaxModel(Transformer(17, 16, decoder(block, layers=2), RMSNorm(), context=16))
    ids = jnp.arange(16)[None] % 17
    params, optimizer = model.init(jax.random.key(0), ids), optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            out = model.apply(params, ids, train=True, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], ids[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for i in range(60):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    dropped = [model.apply(params, ids, train=True, rngs={"dropout": jax.random.key(i)}) for i in (1, 1, 2)]
    assert jnp.array_equal(dropped[0], dropped[1])
    assert not jnp.array_equal(dropped[0], dropped[2])
