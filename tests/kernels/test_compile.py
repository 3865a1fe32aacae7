"""The kernels through the real compilers: every TPU generation, and NVIDIA's where its wheels are installed."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxllm import config
from jaxllm.kernels.attention import attention
from jaxllm.kernels.modifiers import Modifiers
from jaxllm.records import Mask
from tests import gpu_aot
from tests.tpu_aot import Job, compile_all

CAUSAL = config.Causal()
WINDOW = CAUSAL & config.Local(300)
ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)


def gradients(q, k, v, mask, *, backend, pattern, softcap=None, modified=False):
    """Forward and backward in one program. modified: with slopes and sinks."""
    two = jnp.array([0.5, 0.25])
    modifiers = Modifiers(slopes_N=two, sinks_N=two, alibi=config.Alibi()) if modified else Modifiers()

    def total(q, k, v):
        o = attention(q, k, v, pattern, mask, modifiers, scale=q.shape[-1] ** -0.5, softcap=softcap, backend=backend)
        return o.astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


def arguments(T, H, dtype, arrays=""):
    """Abstract q (2 heads), k, v (1 head) and mask of two rows."""
    q, k = (jax.ShapeDtypeStruct((2, T, n, H), dtype) for n in (2, 1))
    segment = ints(2, T) if "segments" in arrays else None
    return q, k, k, Mask(q_segment_BT=segment, k_segment_BS=segment, prefix_B=ints(2) if "prefix" in arrays else None)


def job(topology, T, H, dtype, arrays="", pattern=CAUSAL, softcap=None, modified=False, value=None):
    """value: the width of values where it is not H."""
    fn = partial(gradients, backend="tpu", pattern=pattern, softcap=softcap, modified=modified)
    q, k, v, mask = arguments(T, H, dtype, arrays)
    v = v if value is None else jax.ShapeDtypeStruct((*v.shape[:3], value), dtype)
    return Job(fn, (q, k, v, mask), topology)


USUAL = [
    job("v4:2x2x1", 512, 128, jnp.bfloat16, "segments"),
    job("v5e:2x2", 1024, 64, jnp.bfloat16),
    job("v5p:2x2x1", 500, 80, jnp.bfloat16, "prefix", CAUSAL, 30.0),
    job("v6e:2x2", 512, 256, jnp.bfloat16, "", WINDOW),
    job("v5e:2x2", 512, 192, jnp.bfloat16, "", CAUSAL, None, True, 128),
]
FURTHER = [
    job("v4:2x2x1", 2048, 256, jnp.bfloat16),
    job("v4:2x2x1", 1500, 128, jnp.float32, "segments"),
    job("v5e:2x2", 2048, 96, jnp.bfloat16, "segments prefix", WINDOW),
    job("v5p:2x2x1", 2048, 128, jnp.bfloat16, "", CAUSAL | config.Local(100), 50.0),
    job("v6e:2x2", 1100, 64, jnp.float32, "segments"),
    job("v4:2x2x1", 700, 128, jnp.bfloat16, "segments", CAUSAL, None, True),
    job("v5p:2x2x1", 4096, 192, jnp.bfloat16, "", CAUSAL, None, False, 128),
    job("v6e:2x2", 700, 64, jnp.float32, "prefix", WINDOW, None, True),
]


def check(jobs, kernels):
    for report, wanted in zip(compile_all(jobs), kernels, strict=True):
        assert report.check().text.count('custom_call_target="tpu_custom_call"') == wanted


def test_tpu_compilers_take_the_kernels():
    check(USUAL, [2] * 5)  # one forward, one backward


@pytest.mark.slow
def test_tpu_compilers_take_every_shape():
    check(FURTHER, [3, *[2] * 7])  # v4 has 16 MiB of VMEM: two spans of keys at width 256


@pytest.mark.slow
@pytest.mark.skipif(not gpu_aot.available(), reason="wants jax-cuda12-plugin and jax-cuda12-pjrt")
@pytest.mark.parametrize(("gpu", "matmul"), [("h100", "wgmma.mma_async"), ("a100", "mma.sync")])
@pytest.mark.parametrize(("H", "arrays"), [(64, "segments"), (128, ""), (256, "")])
def test_gpu_compilers_use_tensor_cores_and_spill_nothing(gpu, matmul, H, arrays):
    fn = partial(gradients, backend="gpu", pattern=CAUSAL)
    ptx = gpu_aot.compile_gpu(fn, arguments(1024, H, jnp.bfloat16, arrays), gpu)
    for kernel in ("flash_forward", "flash_dq", "flash_dkv"):
        assert kernel in ptx
    assert matmul in ptx
