"""The chunked loss against the textbook's, values and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LMHead
from jaxllm.leaves import Adapted, dense, quantise
from jaxllm.models.presets import PRESETS, toy
from jaxllm.objectives.lm import lm_loss, nll
from jaxllm.objectives.logprobs import _split, token_logprobs
from jaxllm.params import init
from jaxllm.records import Batch
from jaxllm.runtime import Runtime
from jaxllm.transformer import head_kernel, logits, transformer_params

SPECS = {
    "tied": toy(PRESETS["smollm2_135m"]()),
    "untied, soft-capped": replace(toy(PRESETS["gemma2_2b"]()), head=LMHead(softcap=30.0)),
    "bias": replace(toy(PRESETS["llama2_7b"]()), head=LMHead(bias=True)),
}


def setup(spec, getkey):
    params = init(transformer_params(spec), getkey())
    if spec.head.bias:
        params["head"]["bias"] = jax.random.normal(getkey(), (spec.vocab,))
    return (
        params,
        jax.random.normal(getkey(), (2, 7, spec.dim)) * 3,
        jax.random.randint(getkey(), (2, 7), 0, spec.vocab),
    )


def textbook(params, spec, hidden, target):
    logp = jax.nn.log_softmax(logits(params, spec, hidden, Runtime()), -1)
    return jnp.take_along_axis(logp, target[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [97, 40, 7, 1000])
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients(name, chunk, getkey):
    spec, runtime = SPECS[name], Runtime(vocab_chunk=chunk)
    params, hidden, target = setup(spec, getkey)
    weight = jax.random.normal(getkey(), target.shape)

    def loss(f):
        return jax.value_and_grad(lambda p, h: jnp.sum(f(p, h) * weight), (0, 1))(params, hidden)

    got = loss(lambda p, h: token_logprobs(p, spec, h, target, runtime))
    want = loss(lambda p, h: textbook(p, spec, h, target))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * (1 + float(jnp.abs(b).max())))


@pytest.mark.parametrize("kind", ["int8", "lora"])
def test_any_weight_may_be_the_head(kind, getkey):
    spec = SPECS["untied, soft-capped"]
    params, hidden, target = setup(spec, getkey)
    w = head_kernel(params, spec)
    a, b = jax.random.normal(getkey(), (97, 3)), jax.random.normal(getkey(), (3, spec.dim))
    changed = quantise(w, (1,)) if kind == "int8" else Adapted(w, a, b, jnp.float32(0.1))
    got = token_logprobs(params | {"head": {"kernel": changed}}, spec, hidden, target, Runtime(vocab_chunk=40))
    want = textbook(params | {"head": {"kernel": dense(changed, jnp.float32)}}, spec, hidden, target)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab", [97, 50_257, 128_256, 49_152, 256_000])
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_chunks_cover_the_vocabulary(vocab, shards):
    if vocab % shards:
        return
    chunks, rows = _split(vocab, 16_384, shards)
    assert rows >= vocab
    assert rows % (chunks * shards) == 0
    assert rows - vocab < chunks * shards
    assert rows // chunks <= 16_384 + shards


def test_no_array_of_b_t_v_exists():
    """Neither the forward nor the backward pass has a float32 (or any) array of [B, T, V] elements."""
    spec = replace(toy(PRESETS["llama2_7b"]()), vocab=4096)
    params = init(transformer_params(spec), jax.random.key(0))
    ids = jnp.zeros((2, 64), jnp.int32)
    batch = Batch(ids, ids, jnp.ones(ids.shape), ids + 1, ids, ids)
    step = jax.jit(jax.grad(lambda p: lm_loss(p, spec, batch, Runtime(vocab_chunk=256))[0]))
    largest = max(_sizes(step.lower(params).compile().as_text()))
    assert largest < 2 * 64 * 4096, "the largest array of the compiled step must be smaller than the logits"


def _sizes(hlo):
    import re

    for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", hlo):
        yield int(np.prod([int(d) for d in dims.split(",")]))


def test_masked_tokens_do_not_count(getkey):
    spec = SPECS["tied"]
    params, _, target = setup(spec, getkey)
    ones = jnp.ones(target.shape, jnp.int32)
    position = jnp.broadcast_to(jnp.arange(7), (2, 7))
    weight = jnp.ones(target.shape).at[0, 3:].set(0.0)
    batch = Batch(target, target.at[0, 3:].set(10**6), weight, ones, position, ones * jnp.array([[0], [2]]))
    value, aux = lm_loss(params, spec, batch, Runtime(), channels=3)
    each = nll(params, spec, batch, Runtime())
    np.testing.assert_allclose(value, each.sum() / 10, rtol=1e-6)
    np.testing.assert_allclose(aux["channel_weight"], [3, 0, 7])
    np.testing.assert_allclose(aux["channel_nll"], [each[0].sum(), 0, each[1].sum()], rtol=1e-6)
    assert jnp.isnan(token_logprobs(params, spec, jnp.ones((1, 1, spec.dim)), jnp.array([[10**6]]), Runtime())).all()


def test_dropout_needs_its_key(getkey):
    spec = SPECS["tied"]
    dropping = replace(
        spec,
        stacks=tuple(replace(s, pattern=tuple(replace(b, dropout=0.5) for b in s.pattern)) for s in spec.stacks),
    )
    params = init(transformer_params(spec), getkey())
    ids = jax.random.randint(getkey(), (2, 9), 0, spec.vocab)
    position = jnp.broadcast_to(jnp.arange(9), (2, 9))
    ones = jnp.ones((2, 9), jnp.int32)
    batch = Batch(ids, ids, jnp.ones((2, 9)), segment_BT=ones, position_BT=position, channel_BT=ones - 1)
    same, other = getkey(), getkey()

    def loss(spec, key=None):
        return float(lm_loss(params, spec, batch, Runtime(), key)[0])

    assert loss(dropping) == loss(spec) == loss(spec, same)
    assert loss(dropping, same) == loss(dropping, same)
    assert len({loss(dropping), loss(dropping, same), loss(dropping, other)}) == 3
