"""Ring attention over virtual devices equals attention on one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm.config import Causal, Full, GlobalTokens, Local
from jaxllm.kernels.attention import attention
from jaxllm.kernels.ring import Ring, _cases, ring_attention, zigzag
from jaxllm.records import Mask

P = PartitionSpec(None, "sequence")


def mesh_of(size):
    return jax.make_mesh((size,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:size])


def rows(T, N=4, K=2, H=8, B=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H + 4), (B, T, N, H + 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def segments(T, B=2):
    at = np.arange(T)
    cut = np.where(at < T // 3, 1, np.where(at < T - 3, 2, 0))
    return jnp.asarray(np.stack([cut, np.ones(T)]), jnp.int32)[:B]


def compare(ring, mesh, T, segment, *, values=None, tolerance=2e-6):
    q, k, v, g = rows(T) if values is None else values
    order = np.arange(T).reshape(2 * ring.size, -1)
    if ring.zigzag:
        order = np.stack([order[: ring.size], order[: ring.size - 1 : -1]], 1)
    order = order.ravel()

    def around(q, k, v):
        share = (None if segment is None else segment[:, order],) * 2
        specs = (P, P, P, *(None if s is None else P for s in share))
        run = jax.shard_map(
            lambda *x: ring_attention(ring, *x), mesh=mesh, in_specs=specs, out_specs=P, check_vma=False
        )
        return run(q[:, order], k[:, order], v[:, order], *share)[:, np.argsort(order)]

    def alone(q, k, v):
        mask = Mask(q_segment_BT=segment, k_segment_BS=segment)
        return attention(q, k, v, ring.pattern, mask, scale=ring.scale, softcap=ring.softcap)

    (got, pull), (want, pull_want) = (jax.vjp(jax.jit(f), q, k, v) for f in (around, alone))
    np.testing.assert_allclose(got, want, atol=tolerance)
    for a, b in zip(pull(g), pull_want(g), strict=True):
        np.testing.assert_allclose(a, b, atol=5 * tolerance)


@pytest.mark.parametrize(
    ("pattern", "size", "order", "softcap", "packed"),
    [
        (Causal(), 3, True, 2.0, True),
        (Causal() & Local(13), 4, True, None, True),
        pytest.param(Causal(), 4, True, None, False, marks=pytest.mark.slow),
        pytest.param(Full(), 2, False, None, True, marks=pytest.mark.slow),
        pytest.param(Local(7), 3, False, None, False, marks=pytest.mark.slow),
    ],
)
def test_a_ring_is_attention(pattern, size, order, softcap, packed):
    T = 16 * size
    ring = Ring("sequence", size, order, pattern, 0.3, softcap, "chunked")
    compare(ring, mesh_of(size), T, segments(T) if packed else None)


@pytest.mark.parametrize("backend", ["tpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_a_ring_of_kernels(backend):
    """The Pallas kernels, step by step, with their own log-sum-exp."""
    q, k, *_ = rows(64, H=16)
    ring = Ring("sequence", 2, True, Causal(), 0.3, None, backend, interpret=True)
    compare(ring, mesh_of(2), 64, segments(64), values=(q, k, k + 1, q - 1), tolerance=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_every_device_has_the_same_work(size):
    """Under a causal mask: at the first step three pairs of chunks, two of them halves, then two whole ones."""
    ring = Ring("sequence", size, True, Causal(), 1.0, None, "chunked")
    patterns, number = _cases(ring, 8)
    chunks = [(d, 2 * size - 1 - d) for d in range(size)]
    for step in range(size):
        for device in range(size):
            pairs = [number[a - b + 2 * size - 1] for a in chunks[device] for b in chunks[(device - step) % size]]
            met = sorted(type(patterns[n - 1]).__name__ for n in pairs if n)
            assert met == (["Full", "Full"] if step else ["Full", "Later", "Later"])


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_zigzag_pairs_early_with_late(size):
    mesh, x = mesh_of(size), jnp.arange(4 * size)[None]

    def turn(x, back):
        run = lambda x: zigzag(x, 1, "sequence", size, back=back)
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P, out_specs=P, check_vma=False))(x)

    there = turn(x, False)
    chunks = np.asarray(there).reshape(size, 2, 2)[:, :, 0] // 2
    assert chunks.tolist() == [[d, 2 * size - 1 - d] for d in range(size)]
    np.testing.assert_array_equal(turn(there, True), x)


def test_what_a_ring_does_not_do():
    x = jnp.zeros((1, 6, 2, 4))
    with pytest.raises(ValueError, match=r"distances alone, got GlobalTokens.*all_to_all"):
        ring_attention(Ring("sequence", 2, True, GlobalTokens(2), 1.0, None, "chunked"), x, x, x, None, None)
    with pytest.raises(ValueError, match=r"length, 10, must be a multiple of 2 x 2 devices; the next is 12"):
        ring_attention(Ring("sequence", 2, True, Causal(), 1.0, None, "chunked"), *[x[:, :5]] * 3, None, None)
