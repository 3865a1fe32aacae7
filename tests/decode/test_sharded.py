"""Decoding on 8 virtual devices says what one device says, and no device holds more of a cache than its share."""

import re

import jax
import numpy as np
import pytest
from test_sample import PROMPTS, model

from jaxllm import model as face
from jaxllm.decode import sample
from jaxllm.decode.layout import spread
from jaxllm.decode.rules import GREEDY, Sampling
from jaxllm.decode.sample import generate
from jaxllm.decode.stream import Decoder
from jaxllm.mesh import make_mesh
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout, storage_shardings
from jaxllm.transformer import transformer_params

LAYOUTS = {
    "data": Layout(zero=0),
    "tensor": Layout(tensor=2, data=1, zero=0),
    "data x tensor": Layout(tensor=2, zero=0),
    "zero3 x tensor": Layout(tensor=2, zero=3, replicate_below=0),
    "stages": Layout(stage=2, tensor=2, zero=1, replicate_below=0),
}
ROWS = PROMPTS * 2


def on(layout):
    """The runtime of a layout, and its mesh."""
    devices = jax.devices()[: layout.tensor] if layout.data == 1 else jax.devices()
    return Runtime(layout=layout), make_mesh(layout, devices)


def masters(params, spec, layout, mesh):
    return jax.device_put(params, storage_shardings(transformer_params(spec), layout, mesh))


@pytest.mark.parametrize(
    ("name", "layout", "prepared"),
    [
        ("gemma2_2b", "data", True),
        ("gemma2_2b", "data x tensor", True),
        ("gemma2_2b", "zero3 x tensor", False),
        ("gemma2_2b", "stages", True),
        pytest.param("gemma2_2b", "stages", False, marks=pytest.mark.slow),
        ("gpt2_small", "tensor", False),
        ("gpt2_small", "zero3 x tensor", True),
    ],
)
def test_generate_equals_one_device(name, layout, prepared):
    spec, params = model(name)
    want = generate(spec, params, ROWS, max_new_tokens=10)
    runtime, mesh = on(LAYOUTS[layout])
    with jax.set_mesh(mesh):
        weights = masters(params, spec, LAYOUTS[layout], mesh)
        weights = sample.prepare(weights, spec, runtime) if prepared else weights
        got = generate(spec, weights, ROWS, max_new_tokens=10, runtime=runtime)
    assert got.ids() == want.ids()
    np.testing.assert_allclose(got.logprob_BT, want.logprob_BT, atol=1e-5)


def test_logits_equal_one_device():
    spec, params = model("gemma2_2b")
    ids = np.asarray([row[:1] * 6 + [3, 1, 4, 1, 5, 9] for row in ROWS], np.int32)
    want = face.logits(spec, params, ids)
    runtime, mesh = on(LAYOUTS["zero3 x tensor"])
    with jax.set_mesh(mesh):
        got = face.logits(spec, masters(params, spec, runtime.layout, mesh), ids, runtime=runtime)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_draws_equal_one_device():
    spec, params = model("gpt2_small")
    how = {"max_new_tokens": 10, "sampling": Sampling(temperature=1.3, top_k=20, top_p=0.9), "seeds": 3}
    want = generate(spec, params, ROWS, **how)
    runtime, mesh = on(LAYOUTS["data x tensor"])
    with jax.set_mesh(mesh):
        got = generate(spec, sample.prepare(params, spec, runtime), ROWS, runtime=runtime, **how)
    assert got.ids() == want.ids()


@pytest.mark.parametrize("layout", ["data x tensor", "zero3 x tensor"])
def test_streaming_one_row_equals_one_device(layout):
    """One row does not divide over "data": it stays whole. The second prompt goes on in the cache of the first."""
    spec, params = model("gpt2_small")
    runtime, mesh = on(LAYOUTS[layout])
    plain, prompt = Decoder(spec, params), PROMPTS[0]
    with jax.set_mesh(mesh):
        decoder = Decoder(spec, sample.prepare(params, spec, runtime), runtime)
        for _ in range(2):
            want = list(plain.tokens(prompt, max_new_tokens=7))
            assert list(decoder.tokens(prompt, max_new_tokens=7)) == want
            prompt = [*prompt, *want, 5]
            assert decoder.reusable(prompt) == plain.reusable(prompt) > 0
        k = decoder._state.caches[0][0].k
        assert k.sharding.shard_shape(k.shape)[1:3] == (1, k.shape[2] // 2)


@pytest.mark.parametrize("layout", ["data", "data x tensor", "zero3 x tensor"])
def test_a_device_holds_its_share_of_the_caches(layout):
    """In the compiled loop no array is as large as a whole cache: nothing is gathered to be read or written."""
    spec, params = model("gpt2_small")
    runtime, mesh = on(LAYOUTS[layout])
    with jax.set_mesh(mesh):
        program = sample.Program(spec, spread(runtime, len(ROWS)), GREEDY, (), 32)
        args = sample._start(program, ROWS, 16, 0, 10)
        text = sample._generate.lower(program, sample.prepare(params, spec, runtime), *args).compile().as_text()
    heads = spec.stacks[0].pattern[0].attn.kv_heads

    def held(rows, heads):
        return re.search(rf"f32\[(\d+,)?{rows},{heads},32,16\]", text)

    assert held(len(ROWS) // mesh.shape["data"], heads // mesh.shape["tensor"])
    assert not held(len(ROWS), heads) and not held(len(ROWS), heads // 2) and not held(len(ROWS) // 4, heads)


def test_rows_that_do_not_divide_stay_whole():
    runtime, mesh = on(LAYOUTS["data x tensor"])
    spec, params = model("gpt2_small")
    want = generate(spec, params, PROMPTS[:3], max_new_tokens=5)
    with jax.set_mesh(mesh):
        rules = [dict(spread(runtime, rows).layout.rules) for rows in (8, 3)]
        assert "batch" in rules[0] and "batch" not in rules[1]
        got = generate(spec, params, PROMPTS[:3], max_new_tokens=5, runtime=runtime)
    assert got.ids() == want.ids()


def test_prepared_weights_lie_as_they_are_multiplied():
    spec, params = model("gemma2_2b")
    runtime, mesh = on(LAYOUTS["zero3 x tensor"])
    runtime = Runtime("bfloat16", layout=runtime.layout)
    with jax.set_mesh(mesh):
        ready = sample.prepare(masters(params, spec, runtime.layout, mesh), spec, runtime)
        again = sample.prepare(ready, spec, runtime)
    q = ready["stacks"]["0"]["0"]["attn"]["q"]["kernel"]
    assert q.dtype == "bfloat16"
    assert q.sharding.shard_shape(q.shape) == (*q.shape[:2], q.shape[2] // 2, q.shape[3])
    for a, b in zip(jax.tree.leaves(ready), jax.tree.leaves(again), strict=True):
        assert a.sharding == b.sharding and (a == b).all()
