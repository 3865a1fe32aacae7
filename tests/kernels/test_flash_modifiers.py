"""The TPU kernel with slopes, sinks and values of another width, against the textbook path: values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import Alibi, Causal, Full, Local
from jaxllm.kernels.attention import attention
from jaxllm.kernels.flash_tpu import flash_tpu
from jaxllm.kernels.modifiers import Modifiers
from jaxllm.kernels.tpu_sizes import Sizes, Tile
from jaxllm.records import Mask

SMALL = Sizes(256, 256, Tile(128, 128, 1), Tile(128, 128, 1), 512, 2**24)
OPS = {
    "tpu": partial(flash_tpu, cut=SMALL, interpret=True),
    "chunked": partial(attention, backend="chunked"),
    "reference": partial(attention, backend="reference"),
}
SLOPES = jnp.array([0.5, 0.25, 0.02, 0.9])
CASES = {
    "slopes": (Causal(), 64, 64, Modifiers(slopes_N=SLOPES, alibi=Alibi(scale=0.7))),
    "slopes, both sides": (Full(), 64, 64, Modifiers(slopes_N=SLOPES, alibi=Alibi(scale=0.02))),
    "sinks": (Causal() & Local(90), 64, 64, Modifiers(sinks_N=jnp.array([0.3, -2.0, 1.5, 4.0]))),
    "wide keys": (Causal(), 96, 64, Modifiers()),
    "all": (Causal(), 48, 80, Modifiers(slopes_N=SLOPES, alibi=Alibi(), sinks_N=jnp.array([0.3, -2.0, 1.5, 4.0]))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["tpu", "chunked"])
def test_values_and_gradients(name, backend):
    pattern, H, h, modifiers = CASES[name]
    B, T, N, K = 2, 600, 4, 2
    rng = np.random.default_rng(0)
    q, k, v, do = (
        jnp.asarray(rng.standard_normal((B, T, heads, width)), jnp.float32)
        for heads, width in ((N, H), (K, H), (K, h), (N, h))
    )
    segment = jnp.asarray(np.arange(T)[None] < np.array([[T], [T - 70]]), jnp.int32)
    mask = Mask(q_segment_BT=segment, k_segment_BS=segment)

    @partial(jax.jit, static_argnums=0)
    def both(backend, q, k, v, sinks, do):
        def run(q, k, v, sinks):
            return OPS[backend](q, k, v, pattern, mask, modifiers.replace(sinks_N=sinks), scale=H**-0.5)

        o, pull = jax.vjp(run, q, k, v, sinks)
        return o, *pull(do)

    got, want = (both(b, q, k, v, modifiers.sinks_N, do) for b in (backend, "reference"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) < 3e-6
