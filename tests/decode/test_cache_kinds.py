"""Cached decoding equals the full forward for every kind of cache, on the plain path and on the kernel."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxllm import cache
from jaxllm.config import GLU, GQA, MLA, Block, Local, RMSNorm, Rope, Stack, Transformer
from jaxllm.kernels.decode_tpu import decode_tpu
from jaxllm.nn import attend
from jaxllm.params import init
from jaxllm.records import Inputs, inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward, logits, transformer_params

SIZE, PLAIN, NORM, KEY = 24, Runtime(), RMSNorm(), jax.random.key(1)


def model(*attentions):
    pattern = tuple(Block(attn, GLU(32), NORM) for attn in attentions)
    return Transformer(50, 32, (Stack(pattern, 2),), NORM, context=64)


SPECS = {
    "windows": model(GQA(4, 2, 16, position=Rope(), pattern=Local(8)), GQA(4, 2, 16, position=Rope())),
    "latents": model(MLA(4, None, 24, 12, 8, 12, Rope(), NORM)),
}
KINDS = {
    "dense": ({"dtype": jnp.float32}, 2e-5),
    "paged": ({"dtype": jnp.float32, "page": 8}, 2e-5),
    "int8": ({"dtype": jnp.int8}, 0.03),
    "paged int8": ({"dtype": jnp.int8, "page": 8}, 0.03),
}
"""Options of `cache.init`, and how far logits may be off, of the largest."""


@lru_cache
def whole(spec):
    """Parameters, ids [2, SIZE], their logits and their rows by one forward."""
    params, ids = init(transformer_params(spec), jax.random.key(0)), jax.random.randint(KEY, (2, SIZE), 0, spec.vocab)

    @jax.jit
    def run(params):
        out = forward(params, spec, inputs(ids), PLAIN, cache.init(spec, 2, 0, jnp.float32))
        return logits(params, spec, out.hidden_BTD, PLAIN), out.rows

    full, rows = run(params)
    return params, ids, np.asarray(full), rows


def worst(spec, runtime, **options):
    """The largest error of cached logits: ragged prompts, then three tokens at once, of which two are taken."""
    params, ids, full, rows = whole(spec)
    B, start = 2, jnp.array([5, 3])
    caches = cache.commit(cache.init(spec, B, SIZE, **options), rows, jnp.zeros(B, jnp.int32), start)

    @jax.jit
    def step(caches, start):
        slot = start[:, None] + jnp.arange(3)[None]
        out = forward(params, spec, Inputs(jnp.take_along_axis(ids, slot, 1), slot, slot_BT=slot), runtime, caches)
        return logits(params, spec, out.hidden_BTD, PLAIN), cache.commit(caches, out.rows, start, jnp.full(B, 2))

    errors = []
    for _ in range(8):
        got, caches = step(caches, start)
        want = np.stack([full[b, s : s + 3] for b, s in enumerate(start)])
        errors.append(np.abs(got - want).max())
        start = start + 2
    return max(errors) / np.abs(full).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_full_forward(name, kind):
    options, tolerance = KINDS[kind]
    assert worst(SPECS[name], PLAIN, **options) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_does_too(name, kind, monkeypatch):
    calls = []

    def interpreted(*args, **options):
        calls.append(args)
        return decode_tpu(*args, **options, interpret=pltpu.InterpretParams())

    monkeypatch.setattr(attend, "decode_tpu", interpreted)
    options, tolerance = KINDS[kind]
    assert worst(SPECS[name], Runtime(attention="tpu"), **options) < tolerance
    assert calls


def test_beams_and_errors():
    """Survivors of a beam step go on in pages of their own; a page must divide what a layer keeps."""
    spec, one = SPECS["windows"], jnp.ones(2, jnp.int32)
    rows = whole(spec)[3]
    seen = []
    for page in (None, 8):
        caches = cache.commit(cache.init(spec, 2, SIZE, jnp.int8, page=page), rows, 0 * one, 20 * one)
        caches = cache.commit(cache.reorder(caches, jnp.array([1, 1])), rows, 20 * one, 3 * one)
        seen.append([cache.read(caches[0][1], 0, 16, jnp.float32)])
    jax.tree.map(np.testing.assert_array_equal, *seen)
    k = np.asarray(seen[0][0][0])
    assert np.array_equal(k[0, :, :20], k[1, :, :20])
    assert not np.array_equal(k[0, :, 20:23], k[1, :, 20:23])
    with pytest.raises(ValueError, match="pages of 7 rows do not divide the 8 rows"):
        cache.init(spec, 2, SIZE, jnp.float32, page=7)
