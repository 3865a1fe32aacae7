"""The decode kernel through the real TPU compiler, for every generation and kind of cache."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxllm import config
from jaxllm.cache import KV, Paged
from jaxllm.kernels.decode import New
from jaxllm.kernels.decode_tpu import decode_tpu
from tests.tpu_aot import Job, compile_all

pytest.importorskip("libtpu")

CAUSAL = config.Causal()
array = jax.ShapeDtypeStruct
bf16, f32, i32, i8 = jnp.bfloat16, jnp.float32, jnp.int32, jnp.int8


def call(q, new, cache, pattern, softcap):
    return decode_tpu(q, new, (cache, 0), pattern, scale=0.1, softcap=softcap)


def job(topology, shape, heads, S, page=None, *, kept=bf16, dtype=bf16, value=None, pattern=CAUSAL, softcap=None):
    """shape: B, T.  heads: N, K, H.  kept: dtype of the cache.  value: width of a value of latents."""
    (B, T), (N, K, H), parts = shape, heads, 2 if value is None else 1
    value, names, scale = value or H, (array((B, S), i32), array((B, S), i32)), None
    if page is None:
        scale = array((2, B, K, parts, S), f32) if kept == i8 else None
        k, v = array((2, B, K, S, H), kept), array((2, B, K, S, H if parts == 2 else 0), kept)
        cache = KV(k, v, *names, scale)
    else:
        pool = (2, B * S // page, K, parts, page)
        scale = array(pool, f32) if kept == i8 else None
        cache = Paged(array((*pool, H), kept), array((B, S // page), i32), *names, scale)
    new = New(array((B, T, K, H), dtype), array((B, T, K, value), dtype), array((B, T), i32), array((B, T), i32))
    return Job(partial(call, pattern=pattern, softcap=softcap), (array((B, T, N, H), dtype), new, cache), topology)


USUAL = [
    job("v4:2x2x1", (4, 1), (32, 8, 128), 2048, 16),
    job("v5e:2x2", (4, 4), (32, 8, 128), 2048),
    job("v5p:2x2x1", (4, 1), (128, 1, 576), 2048, 16, value=512),
    job("v6e:2x2", (4, 1), (32, 8, 128), 2048, 128, kept=i8),
]
FURTHER = [
    job("v4:2x2x1", (3, 4), (32, 8, 128), 2048),
    job("v4:2x2x1", (1, 1), (96, 8, 128), 8192, kept=i8),
    job("v5e:2x2", (4, 1), (32, 32, 64), 512, pattern=CAUSAL & config.Local(300)),
    job("v5e:2x2", (4, 4), (8, 1, 256), 1024, 32, softcap=50.0),
    job("v5e:2x2", (4, 2), (16, 1, 576), 2048, kept=i8, value=512),
    job("v5e:2x2", (2, 1), (4, 2, 64), 2048, 8, kept=f32, dtype=f32),
    job("v5e:2x2", (2, 16), (71, 71, 64), 48),
    job("v6e:2x2", (4, 4), (16, 2, 96), 384),
    job("v6e:2x2", (2, 16), (128, 1, 576), 4096, 64, value=512),
]


def check(jobs):
    for report in compile_all(jobs):
        assert report.check().text.count('custom_call_target="tpu_custom_call"') == 1


def test_tpu_compilers_take_the_kernel():
    check(USUAL)


@pytest.mark.slow
def test_tpu_compilers_take_every_shape():
    check(FURTHER)
