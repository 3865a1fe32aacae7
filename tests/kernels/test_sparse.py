"""Sparse patterns: blocks against brute force, kernels against the plain softmax, pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from jaxllm.cli import main
from jaxllm.config import (
    BigBird,
    Blocks,
    Causal,
    Columns,
    Dilated,
    Fixed,
    Full,
    GlobalTokens,
    Local,
    RandomBlocks,
    Rows,
    Strided,
)
from jaxllm.kernels.attention import attention
from jaxllm.kernels.bigbird import at_length
from jaxllm.kernels.flash_tpu import flash_tpu
from jaxllm.kernels.pattern import Kind, allowed, kinds
from jaxllm.kernels.tpu_sizes import Sizes, Tile
from jaxllm.models.presets import PRESETS
from jaxllm.records import Mask
from jaxllm.show_mask import pattern_of, patterns_in, visible

N = 48
EXACT = [
    Dilated(3, 4), Dilated(5, 1), Strided(5), Strided(3, 4), Blocks(4), Blocks(4, 1), Blocks(5, 2), Rows(3, 9),
    Columns(7, 8), GlobalTokens(3), RandomBlocks(4, 2, N, seed=1), RandomBlocks(5, 1, 43),
]  # fmt: skip
CAREFUL = [
    Fixed(6, 2), Causal() & Strided(5), Local(3) | GlobalTokens(2), Causal() & Fixed(8, 1), Blocks(4, 1) & Rows(0, 30),
    at_length(BigBird(4, 1), N), at_length(BigBird(4, 1, seed=5), N), at_length(BigBird(4, 1, seed=5), 45),
]  # fmt: skip


def full(pattern, rows=N, columns=N):
    q, k = np.arange(rows)[:, None], np.arange(columns)[None]
    return np.broadcast_to(allowed(pattern, q, k), (rows, columns))


@pytest.mark.parametrize("pattern", EXACT + CAREFUL, ids=str)
@pytest.mark.parametrize("cut", [(1, 1), (4, 4), (5, 7), (16, 8), (48, 3)], ids=str)
def test_block_kinds_against_brute_force(pattern, cut):
    """EMPTY and FULL are always true; for a pattern that stands alone MIXED is, too."""
    pairs, found = full(pattern), kinds(pattern, N, N, *cut)
    for i, j in np.ndindex(found.shape):
        block = pairs[i * cut[0] : (i + 1) * cut[0], j * cut[1] : (j + 1) * cut[1]]
        truth = Kind.FULL if block.all() else Kind.MIXED if block.any() else Kind.EMPTY
        ragged = (j + 1) * cut[1] > N  # a last block of keys that sticks out is never FULL
        want = min(truth, Kind.MIXED) if ragged else truth
        assert found[i, j] == want or (found[i, j] == Kind.MIXED and pattern in CAREFUL), (i, j, truth)


@pytest.mark.parametrize("pattern", EXACT + CAREFUL, ids=str)
def test_numpy_and_jax_agree(pattern):
    slots = jnp.arange(N, dtype=jnp.int32)
    np.testing.assert_array_equal(jax.jit(lambda s: allowed(pattern, s[:, None], s[None]))(slots), full(pattern))


def test_what_patterns_mean():
    """Each transcribed from its publication."""
    i, j = np.arange(N)[:, None], np.arange(N)[None]
    np.testing.assert_array_equal(full(Causal() & Strided(5)), (j <= i) & ((i - j < 5) | ((i - j) % 5 == 0)))
    fixed = (i // 6 == j // 6) | np.isin(j % 6, [4, 5])
    np.testing.assert_array_equal(full(Causal() & Fixed(6, 2)), (j <= i) & fixed)
    np.testing.assert_array_equal(full(Dilated(3, 4)), np.isin(np.abs(i - j), [0, 4, 8]))
    np.testing.assert_array_equal(full(GlobalTokens(2)), (i < 2) | (j < 2))
    drawn = full(RandomBlocks(4, 2, N, seed=1)).reshape(12, 4, 12, 4)
    assert (drawn == drawn[:, :1, :, :1]).all(), "whole blocks"
    assert set(drawn[:, 0, :, 0].sum(1).tolist()) <= {1, 2}
    assert (full(RandomBlocks(4, 2, N, seed=2)) != full(RandomBlocks(4, 2, N, seed=1))).any()


def test_bigbird():
    """Neighbours, first and last block; copies of the first for queries between; short rows are seen whole."""
    block, last = np.arange(N) // 4, N // 4 - 1
    near = np.abs(block[:, None] - block[None]) <= 1
    edge = np.isin(block, [0, last])
    np.testing.assert_array_equal(full(at_length(BigBird(4, 0), N)), near | edge[:, None] | edge[None])
    pattern = BigBird(4, 2)
    assert at_length(pattern, 36) == Full()
    assert pattern.copies(36) == 0
    assert pattern.copies(N) == 8
    seen = full(at_length(pattern, N), columns=N + 8)
    np.testing.assert_array_equal(seen[:, :N], near | edge[:, None] | edge[None])
    np.testing.assert_array_equal(seen[:, N:], np.repeat(~edge[:, None], 8, 1))
    seeded = full(at_length(BigBird(4, 2, seed=3), N))
    assert (seeded >= (near | edge[:, None] | edge[None])).all()
    assert seeded.sum() > seen[:, :N].sum()
    with pytest.raises(ValueError, match="counts keys twice"):
        at_length(Causal() & pattern, N)
    with pytest.raises(ValueError, match="depends on the row's length"):
        allowed(pattern, 1, 1)


@pytest.mark.parametrize("pattern", [CAREFUL[1], CAREFUL[2], CAREFUL[6], EXACT[10] | Local(2)], ids=str)
def test_kernels_agree_with_the_softmax(pattern):
    """Plain JAX by blocks and the TPU kernel, step by step, against scores and a softmax in float64; gradients too."""
    T = 256
    pattern = at_length(BigBird(16, 1, seed=5), T) if pattern is CAREFUL[6] else pattern
    q, k, v = (jax.random.normal(jax.random.key(i), (1, T, 2, 128)) for i in range(3))
    x = np.asarray(q, np.float64), np.asarray(k, np.float64), np.asarray(v, np.float64)
    scores = np.einsum("btnh,bsnh->bnts", x[0], x[1]) / 11.3137085
    weights = np.where(full(pattern, T, T), np.exp(scores), 0.0)
    want = np.einsum("bnts,bsnh->btnh", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), x[2])
    cut = Sizes(128, 128, Tile(128, 128, 1), Tile(128, 128, 1), 256, 56 * 2**20)

    def by_kernel(q):
        return flash_tpu(q, k, v, pattern, Mask(), scale=1 / 11.3137085, cut=cut, interpret=True)

    def by_blocks(q):
        return attention(q, k, v, pattern, Mask(), scale=1 / 11.3137085, backend="chunked")

    np.testing.assert_allclose(by_blocks(q), want, rtol=0, atol=2e-5)
    np.testing.assert_allclose(by_kernel(q), want, rtol=0, atol=2e-5)
    grads = [jax.grad(lambda q, f=f: jnp.sum(jnp.square(f(q))))(q) for f in (by_kernel, by_blocks)]
    np.testing.assert_allclose(*grads, rtol=0, atol=1e-4)


def test_pictures(tmp_path, capsys):
    out = tmp_path / "mask.png"
    assert main(["show-mask", "Causal() & (Local(8) | GlobalTokens(2))", "--length", "40", "--out", str(out)]) == 0
    height, width = imread(out).shape[:2]
    assert min(height, width) >= 400, "a picture for people, whatever the length"
    black = (imread(out)[..., 0] == 0).mean() / 0.8  # of the whole picture, whose margins take about a fifth
    want = visible(Causal() & (Local(8) | GlobalTokens(2)), 40)
    assert abs(black - want.mean()) < 0.06
    assert f"{100 * want.mean():.2f} % of pairs" in capsys.readouterr().out


def test_patterns_of_models_and_texts():
    assert patterns_in(PRESETS["gemma2_2b"]()) == {"layer 0": Causal() & Local(4096), "layer 1": Causal() & Full()}
    assert pattern_of("Local(window=3) | BigBird(4, 1, seed=2)") == Local(3) | BigBird(4, 1, seed=2)
    for bad in ("__import__('os')", "Local(3) + Local(4)", "Local(", "Local(0)", "7"):
        with pytest.raises(ValueError, match=r"pattern|at least 1"):
            pattern_of(bad)
