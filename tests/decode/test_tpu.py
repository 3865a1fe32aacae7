"""The decoding program through the real TPU compiler."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxllm import cache
from jaxllm import params as trees
from jaxllm.decode import sample
from jaxllm.decode.rules import Sampling
from jaxllm.models.presets import PRESETS, toy
from jaxllm.runtime import Runtime
from jaxllm.transformer import transformer_params
from tests.tpu_aot import compile_for

pytest.importorskip("libtpu")

SPEC = toy(PRESETS["gemma2_2b"](), dim=256, vocab=512, window=256)
RUNTIME = Runtime(compute_dtype="bfloat16", attention="tpu")
PROGRAM = sample.Program(SPEC, RUNTIME, Sampling(temperature=0.7, top_k=50, top_p=0.9), (1, 2), 2048)


def program(*args):
    """The whole program; a plain function, since jitted ones do not travel by pickle."""
    return sample._generate(PROGRAM, *args)


def test_prefill_and_loop_compile_for_a_tpu() -> None:
    batch = 4
    params = trees.abstract(transformer_params(SPEC), jnp.bfloat16)
    args = jax.eval_shape(
        lambda: jax.tree.map(jnp.asarray, sample._start(PROGRAM, [[1] * 1000] * batch, 1024, 0, 1024))
    )
    report = compile_for(program, (params, *args), "v5e:2x2")
    held = cache.nbytes(jax.eval_shape(lambda: sample.empty(PROGRAM, batch)))
    assert "while" in report.text
    assert "decode_attention" in report.text
    assert (
        held <= report.temp_bytes < 4 * held + 64 * 2**20
    )  # one cache, updated in place, and the prompt's activations
