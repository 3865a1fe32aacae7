"""Every backend of the one op against a naive float64 oracle: values and gradients, masks, widths, lengths."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config
from jaxllm.kernels.attention import attention
from jaxllm.kernels.flash_gpu import flash_gpu
from jaxllm.kernels.flash_tpu import flash_tpu
from jaxllm.kernels.tpu_sizes import Sizes, Tile
from jaxllm.records import Mask
from tests.kernels import oracle

CAUSAL, FULL = config.Causal(), config.Full()


@dataclass(frozen=True)
class Case:
    """One call. mask: how the arrays of the mask are made; see `make_mask`."""

    T: int
    S: int
    N: int = 2
    K: int = 1
    H: int = 64
    pattern: config.Pattern = CAUSAL
    mask: str = "none"
    softcap: float | None = None
    B: int = 1


CASES = [
    Case(1024, 1024, 1, 1, 128),
    Case(640, 640, 2, 1, 64, CAUSAL, "packed", None, 2),
    Case(300, 300, 4, 2, 80, CAUSAL, "left", 5.0, 2),
    Case(513, 513, 2, 2, 96, CAUSAL & config.Local(100), "right", None, 2),
    Case(260, 260, 2, 1, 256, CAUSAL, "prefix", None, 2),
    Case(700, 700, 3, 1, 64, CAUSAL & config.Local(130), "none", 3.0),
    Case(384, 200, 2, 1, 128, FULL, "memory", None, 2),
    Case(130, 770, 2, 2, 64, FULL, "none", 2.0),
    Case(520, 520, 1, 1, 64, config.Local(33) | (CAUSAL & config.Local(300)), "packed", None),
    Case(600, 600, 2, 1, 80, CAUSAL & config.Local(64), "prefix+packed", 4.0, 2),
]


# small blocks, so that rows of a few hundred tokens have several, and tiles that fall into grains; two backward spans
SMALL = Sizes(256, 256, Tile(256, 128, 2), Tile(256, 128, 1), 512, 2**24)
OPS = {
    "reference": partial(attention, backend="reference"),
    "chunked": partial(attention, backend="chunked"),
    "tpu": partial(flash_tpu, cut=SMALL, interpret=True),
    "gpu": partial(flash_gpu, interpret=True),
}


def make_mask(kind: str, B: int, T: int, S: int) -> Mask:
    """Segments and prefixes that differ between rows; "left" and "right" leave fully masked query rows."""
    cuts = np.array([[S // 3 + 7 * b, S // 2 + 40, S - 5 - b] for b in range(B)])
    packed = 1 + (np.arange(S)[None, :, None] >= cuts[:, None]).sum(-1)
    packed = np.where(packed == 4, 0, packed).astype(np.int32)
    pad = np.array([(S // 5) * (b + 1) for b in range(B)])[:, None]
    prefix = jnp.array([17 + 60 * b for b in range(B)], jnp.int32)
    match kind:
        case "none":
            return Mask()
        case "packed":
            return Mask(q_segment_BT=jnp.array(packed), k_segment_BS=jnp.array(packed))
        case "left":
            left = jnp.array(np.arange(S)[None] >= pad, jnp.int32)
            return Mask(q_segment_BT=left, k_segment_BS=left)
        case "right":
            right = jnp.array(np.arange(S)[None] < S - pad, jnp.int32)
            return Mask(q_segment_BT=right, k_segment_BS=right)
        case "prefix":
            return Mask(prefix_B=prefix)
        case "prefix+packed":
            return Mask(q_segment_BT=jnp.array(packed), k_segment_BS=jnp.array(packed), prefix_B=prefix)
        case "memory":  # cross-attention: keys are padded, queries have no say
            return Mask(k_segment_BS=jnp.array(np.arange(S)[None] < S - pad, jnp.int32))
    raise ValueError(kind)


def run(case: Case, backend: str, dtype, mask: Mask):
    """(o, dq, dk, dv) in float32 and the inputs they belong to."""
    rng = np.random.default_rng(case.T)
    shapes = [(case.B, case.T, case.N, case.H)] + [(case.B, case.S, case.K, case.H)] * 2
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    do = jnp.asarray(rng.standard_normal(shapes[0]), dtype)

    @jax.jit
    def both(q, k, v, do):
        f = lambda q, k, v: OPS[backend](q, k, v, case.pattern, mask, scale=case.H**-0.5, softcap=case.softcap)
        o, pull = jax.vjp(f, q, k, v)
        return o, *pull(do)

    got = both(q, k, v, do)
    assert all(g.dtype == dtype for g in got)
    return (q, k, v, do), got


WANTED = {}


def expected(case, dtype, q, k, v, do, mask):
    """The oracle's answer, worked out once for all backends."""
    key = (case, np.dtype(dtype).name, mask.q_slot_BT is None)
    if key not in WANTED:
        WANTED[key] = oracle.attend(q, k, v, do, case.pattern, mask, case.H**-0.5, case.softcap)
    return WANTED[key]


def compare(case: Case, backend: str, dtype, bar: float, mask: Mask):
    (q, k, v, do), got = run(case, backend, dtype, mask)
    want = expected(case, dtype, q, k, v, do, mask)
    ok = oracle.dense(case.pattern, mask, case.B, case.T, case.S)
    blind, unseen = ~ok.any(2), ~ok.any(1)
    for name, g, w, dead in zip(("o", "dq", "dk", "dv"), got, want, (blind, blind, unseen, unseen), strict=True):
        error = np.abs(np.asarray(g, np.float64) - w).max() / np.abs(w).max()
        assert error <= bar, f"{name}: {error:.2e} > {bar:.0e}"
        assert (np.asarray(g)[dead] == 0).all(), f"{name}: rows that meet nothing must be exactly 0"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", OPS)
def test_float32_matches_the_oracle(case, backend):
    compare(case, backend, jnp.float32, 2e-6, make_mask(case.mask, case.B, case.T, case.S))


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
@pytest.mark.parametrize("backend", OPS)
def test_bfloat16_matches_the_oracle(case, backend):
    compare(case, backend, jnp.bfloat16, 1e-2, make_mask(case.mask, case.B, case.T, case.S))


@pytest.mark.parametrize("T", [1, 16, 40])
def test_slots_as_arrays(T):
    """Cached decoding: queries start at a slot of their own in each row, keys past the live length are segment 0."""
    case = Case(T, 600, 4, 2, 64, CAUSAL & config.Local(200), B=2)
    start = np.array([300, 550])[:, None]
    live = np.arange(case.S)[None] < start + T
    mask = Mask(
        q_slot_BT=jnp.asarray(start + np.arange(T), jnp.int32),
        k_slot_BS=jnp.asarray(np.broadcast_to(np.arange(case.S), (2, case.S)), jnp.int32),
        k_segment_BS=jnp.asarray(live, jnp.int32),
    )
    for backend in ("reference", "chunked"):
        compare(case, backend, jnp.float32, 2e-6, mask)


def test_scores_are_never_held_above_1024():
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
    f = lambda q: attention(q, q, q, CAUSAL, Mask(), scale=1.0).sum()
    text = jax.jit(jax.value_and_grad(f)).lower(shape).as_text()
    assert "4096x4096" not in text and "512x512" in text


def test_errors_name_the_cure():
    q = jnp.zeros((1, 2048, 3, 64))
    with pytest.raises(ValueError, match="chunked"):
        attention(q, q, q, FULL, Mask(), scale=1.0, backend="reference")
    with pytest.raises(ValueError, match="N=3 must be a multiple of kv heads K=2"):
        attention(q, q[:, :, :2], q[:, :, :2], FULL, Mask(), scale=1.0)
    with pytest.raises(ValueError, match=r"wants q \[B, T, N, H\]"):
        attention(q, q, q[:, 1:], FULL, Mask(), scale=1.0)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_the_op_reaches_the_kernels(backend):
    """By its public name, with the chip's own block sizes; slots as arrays fall back to plain JAX."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 100, n, 64)), jnp.float32) for n in (2, 1))
    op = partial(attention, q, k, k, CAUSAL, scale=0.125, interpret=True)
    want = op(Mask(), backend="chunked")
    np.testing.assert_allclose(op(Mask(), backend=backend), want, atol=5e-6)
    slots = jnp.arange(100, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(op(Mask(q_slot_BT=slots, k_slot_BS=slots), backend=backend), want)
    assert "pallas_call" in str(jax.make_jaxpr(lambda: op(Mask(), backend=backend))())
