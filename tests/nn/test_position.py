"""Every kind of position against its published formula, written out with Python's own arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import (
    NTK,
    Alibi,
    DynamicNTK,
    Linear,
    Llama3,
    LongRope,
    RelativeBias,
    Rope,
    Sinusoidal,
    Yarn,
)
from jaxllm.kernels.modifiers import bucket
from jaxllm.nn.position import alibi_slopes, frequencies, rotate, rotation, sinusoid, temperature

W, THETA = 16, 10_000.0


def plain(i, width=W, theta=THETA):
    """theta_i = 10000^(-2i/d) (Su et al. 2021, §3.2.2)."""
    return theta ** (-2 * i / width)


# ----------------------------------------------------------------------------------------------------- the rotation


def angles(cfg, width, positions):
    """What `rotation` turns each pair by, modulo a turn, and the length it gives it: [T, pairs]."""
    r = rotation(cfg, width, jnp.asarray(positions, jnp.int32)[None])
    cos, sin = np.asarray(r.cos[0], np.float64), np.asarray(r.sin[0], np.float64)
    return np.arctan2(sin, cos), np.hypot(cos, sin)


def check_angles(cfg, width, positions, wanted):
    """wanted: frequency of pair i for a row of these positions."""
    turned, length = angles(cfg, width, positions)
    for p, row in zip(positions, turned, strict=True):
        for i, angle in enumerate(row):
            difference = math.remainder(angle - p * wanted(i), 2 * math.pi)
            assert abs(difference) < 2e-6 * max(1, p), (p, i)
    return length


def naive_rotation(x, position, frequency, pairs):
    """x with each pair (a, b) of dimensions as a complex number, times e^(i position frequency)."""
    out = np.array(x, np.float64)
    for i, (a, b) in enumerate(pairs):
        z = complex(out[a], out[b]) * complex(math.cos(position * frequency(i)), math.sin(position * frequency(i)))
        out[a], out[b] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_pairs_are_turned(interleaved, fraction, getkey):
    """Halves: dimension i with i + w/2. Interleaved: 2i with 2i + 1. The rest of the head stays (partial rotary)."""
    cfg, T = Rope(THETA, fraction, interleaved), 5
    x = jax.random.normal(getkey(), (1, T, 2, W))
    position = jnp.array([[0, 3, 4, 100, 1000]])
    got = rotate(cfg, rotation(cfg, W, position), x)
    w = int(W * fraction)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + w // 2) for i in range(w // 2)]
    for t in range(T):
        for n in range(2):
            want = naive_rotation(x[0, t, n], int(position[0, t]), lambda i: plain(i, w), pairs)
            np.testing.assert_allclose(got[0, t, n], want, atol=2e-4)


@pytest.mark.parametrize(
    "cfg", [Rope(), Rope(interleaved=True), Rope(fraction=0.5), Rope(scaling=Yarn(4.0, 32))], ids=str
)
def test_scores_see_only_distances(cfg, getkey):
    q, k = jax.random.normal(getkey(), (2, 1, 1, 1, W))

    def score(m, n):
        turned = [rotate(cfg, rotation(cfg, W, jnp.array([[p]])), x) for p, x in ((m, q), (n, k))]
        return float((turned[0] * turned[1]).sum())

    assert score(30, 25) == pytest.approx(score(7, 2), abs=1e-4)
    assert abs(score(30, 25) - score(30, 10)) > 1e-2


def test_sections_share_pairs_out_among_axes():
    """M-RoPE (Wang et al. 2024, §2.1): pairs in order belong to time, height, width; text alone has one position."""
    cfg, sections = Rope(sections=(4, 2, 2)), (0, 0, 0, 0, 1, 1, 2, 2)
    position = np.array([[5, 6, 7], [1, 2, 3], [9, 8, 4]])
    r = rotation(cfg, W, jnp.asarray(position, jnp.int32)[:, None])
    for t in range(3):
        for i, axis in enumerate(sections):
            assert float(r.cos[0, t, i]) == pytest.approx(math.cos(position[axis, t] * plain(i)), abs=1e-5)
    text = rotation(cfg, W, jnp.array([[5, 6, 7]]))
    np.testing.assert_array_equal(text.cos, rotation(Rope(), W, jnp.array([[5, 6, 7]])).cos)


# ------------------------------------------------------------------------------------------------- longer contexts


def test_no_scaling():
    np.testing.assert_allclose(frequencies(Rope(), W), [plain(i) for i in range(8)], rtol=1e-12)
    np.testing.assert_allclose(frequencies(Rope(500.0, 0.5), W), [plain(i, 8, 500.0) for i in range(4)], rtol=1e-12)


def test_position_interpolation():
    """f'(x, m) = f(x, m L / L') (Chen et al. 2023, eq. 4)."""
    length = check_angles(Rope(scaling=Linear(4.0)), W, [0, 1, 8, 30], lambda i: plain(i) / 4)
    np.testing.assert_allclose(length, 1, atol=1e-6)


def test_ntk_aware():
    """b' = b s^(d / (d - 2)): the highest frequency stays, the lowest is divided by s (bloc97 2023)."""
    base = THETA * 4 ** (W / (W - 2))
    check_angles(Rope(scaling=NTK(4.0)), W, [0, 1, 8, 30], lambda i: plain(i, theta=base))
    got = frequencies(Rope(scaling=NTK(4.0)), W)
    assert got[0] == 1
    assert got[-1] == pytest.approx(plain(7) / 4)


@pytest.mark.parametrize(("length", "stretch"), [(10, 1), (32, 1), (33, 3 * 33 / 32 - 2), (100, 3 * 100 / 32 - 2)])
def test_dynamic_ntk(length, stretch):
    """b' = b (s l / L - (s - 1))^(d / (d - 2)) for rows of l > L tokens (emozilla 2023)."""
    base = THETA * stretch ** (W / (W - 2))
    check_angles(Rope(scaling=DynamicNTK(3.0, 32)), W, [0, 5, length - 1], lambda i: plain(i, theta=base))


def yarn(i, width, theta, cfg):
    """Pair i of YaRN by parts: kept, divided by the factor, or between.

    Peng et al. 2023, eq. 17-18, with the ramp over the pair's index, as in the authors' code: pair d(r) turns r times
    in L tokens, d(r) = w ln(L / (2 pi r)) / (2 ln theta).
    """
    bounds = [width * math.log(cfg.original / (2 * math.pi * r)) / (2 * math.log(theta)) for r in (cfg.fast, cfg.slow)]
    if cfg.truncate:
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], width - 1)
    if i <= low:
        divided = 0.0
    elif i >= high:
        divided = 1.0
    else:
        divided = (i - low) / (high - low)
    return plain(i, width, theta) * ((1 - divided) + divided / cfg.factor)


@pytest.mark.parametrize(
    ("cfg", "width", "theta"),
    [
        (Yarn(4.0, 2048), 128, 10_000.0),
        (Yarn(16.0, 4096, 64.0, 2.0), 64, 500_000.0),
        (Yarn(32.0, 4096, truncate=False), 64, 150_000.0),
        (Yarn(4.0, 16), 16, 10_000.0),
    ],
    ids=str,
)
def test_yarn(cfg, width, theta):
    rope = Rope(theta, scaling=cfg)
    wanted = [yarn(i, width, theta, cfg) for i in range(width // 2)]
    np.testing.assert_allclose(frequencies(rope, width), wanted, rtol=1e-12)
    kept = np.isclose(wanted, [plain(i, width, theta) for i in range(width // 2)])
    assert kept.any() and not kept.all()


@pytest.mark.parametrize(
    ("cfg", "warm"),
    [
        (Yarn(4.0, 32), 0.1 * math.log(4) + 1),  # eq. 22: sqrt(1/t) = 0.1 ln(s) + 1
        (Yarn(4.0, 32, temperature=1.5), 1.5),
        (Yarn(1.0, 32), 1.0),
        (LongRope((1.0,) * 8, (2.0,) * 8, 32, 1.2), 1.2),
        (Linear(4.0), 1.0),
    ],
    ids=str,
)
def test_temperature_lengthens_cos_and_sin(cfg, warm):
    rope = Rope(scaling=cfg)
    assert temperature(rope) == pytest.approx(warm)
    np.testing.assert_allclose(angles(rope, W, [0, 3, 7])[1], warm, rtol=1e-6)


def test_llama3():
    """Wavelengths beyond L / low are divided by the factor, below L / high kept, blended between (`apply_scaling`)."""
    cfg, kinds = Llama3(8.0, 1.0, 4.0, 32), set()
    for i, got in enumerate(frequencies(Rope(scaling=cfg), 32)):
        f = plain(i, 32)
        wavelength = 2 * math.pi / f
        if wavelength < cfg.original / cfg.high:
            kind, want = "kept", f
        elif wavelength > cfg.original / cfg.low:
            kind, want = "divided", f / cfg.factor
        else:
            smooth = (cfg.original / wavelength - cfg.low) / (cfg.high - cfg.low)
            kind, want = "blended", (1 - smooth) * f / cfg.factor + smooth * f
        assert got == pytest.approx(want, rel=1e-12)
        kinds.add(kind)
    assert kinds == {"kept", "divided", "blended"}


def test_longrope_switches_after_the_original_length():
    """theta_i / lambda_i (Ding et al. 2024, eq. 2), lambda from the list for long rows once one is longer than L."""
    short, long = (1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5), (1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0)
    cfg = Rope(scaling=LongRope(short, long, 32))
    check_angles(cfg, W, [0, 5, 31], lambda i: plain(i) / short[i])
    check_angles(cfg, W, [0, 5, 32], lambda i: plain(i) / long[i])
    with pytest.raises(ValueError, match="needs 8 divisors, one per rotated pair, found 2"):
        frequencies(Rope(scaling=LongRope((1.0,) * 2, (1.0,) * 2, 32)), W)


def test_the_longest_row_decides_for_the_batch():
    cfg = Rope(scaling=DynamicNTK(2.0, 8))
    alone = rotation(cfg, W, jnp.arange(6)[None])
    beside = rotation(cfg, W, jnp.stack([jnp.arange(6), jnp.arange(6) + 20]))
    assert float(jnp.abs(alone.cos[0] - beside.cos[0]).max()) > 0.01


# -------------------------------------------------------------------------------------------------- added to scores


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 32])
def test_alibi_slopes_of_a_power_of_two(heads):
    """The geometric sequence that starts at 2^(-8/n) with that same ratio (Press et al. 2022, §3)."""
    wanted = [2 ** (-8 / heads * (i + 1)) for i in range(heads)]
    for order in ("appended", "alternated"):
        np.testing.assert_allclose(alibi_slopes(Alibi(order=order), heads), wanted, rtol=1e-6)


@pytest.mark.parametrize("heads", [3, 6, 12, 40])
def test_alibi_slopes_of_other_numbers(heads):
    """Appended (BLOOM): those of the power below, then every other one of the next. Alternated (MPT): of the next."""
    below = 2 ** int(math.log2(heads))
    base, extra = 2 ** (-(2 ** -(math.log2(below) - 3))), 2 ** (-(2 ** -(math.log2(2 * below) - 3)))
    bloom = [base**p for p in range(1, below + 1)] + [extra**p for p in range(1, 2 * (heads - below), 2)]
    np.testing.assert_allclose(alibi_slopes(Alibi(), heads), bloom, rtol=1e-6)
    next_ones = [1 / 2 ** (m * 6.0 / (2 * below)) for m in range(1, 2 * below + 1)]
    mpt = (next_ones[1::2] + next_ones[::2])[:heads]
    np.testing.assert_allclose(alibi_slopes(Alibi(6.0, "alternated"), heads), mpt, rtol=1e-6)


@pytest.mark.parametrize(
    ("cfg", "first"),  # the smallest distance in each bucket, as the reference implementation of T5 rounds
    [
        (RelativeBias(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]),
        (RelativeBias(24, 40), [0, 1, 2, 3, 4, 5, 6, 9, 12, 16, 22, 30]),
        (RelativeBias(20, 50, causal=True), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 23, 27, 31, 37, 43]),
        (
            RelativeBias(causal=True),
            [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
        ),
    ],
    ids=str,
)
def test_t5_buckets(cfg, first):
    """Half of the buckets exact, the rest logarithmic up to `furthest`; keys after the query in the upper half."""
    distance = np.arange(300)
    wanted = np.searchsorted(first, distance, side="right") - 1
    np.testing.assert_array_equal(bucket(cfg, jnp.asarray(-distance)), wanted)
    later = np.zeros(300) if cfg.causal else np.where(distance > 0, wanted + cfg.buckets // 2, 0)
    np.testing.assert_array_equal(bucket(cfg, jnp.asarray(distance)), later)


# ---------------------------------------------------------------------------------------------- added to embeddings


@pytest.mark.parametrize("interleaved", [False, True])
def test_sinusoids(interleaved):
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i + 1) = cos of the same (Vaswani et al. 2017, §3.5); or in halves."""
    table, D = sinusoid(Sinusoidal(50, interleaved), 12), 12
    assert table.shape == (50, D) and table.dtype == np.float32
    for p in range(50):
        for i in range(D // 2):
            angle = p / 10_000 ** (2 * i / D)
            at = (2 * i, 2 * i + 1) if interleaved else (i, i + D // 2)
            assert table[p, at[0]] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, at[1]] == pytest.approx(math.cos(angle), abs=1e-6)
