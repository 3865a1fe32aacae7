"""Few bits: bfloat16 masters, 8-bit moments, float16 with a scaled loss. Rounding by statistics, toys that train."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny import experiment

from jaxllm import serial
from jaxllm.config import GLU, GQA, Block, LMHead, RMSNorm, Rope, Transformer, decoder
from jaxllm.experiment import Checkpointing, LossScale, Optimizer, check_resume
from jaxllm.mesh import make_mesh
from jaxllm.params import Normal, Param
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout
from jaxllm.train.loop import train
from jaxllm.train.metrics import read_metrics
from jaxllm.train.moments import Coded, block_axis, coded_bytes, decode, encode, is_coded, is_matrix, to_bfloat16
from jaxllm.train.optimizer import make_optimizer, master_params
from jaxllm.train.scaling import counters, fresh_scale
from jaxllm.train.step import abstract_state, init_state, make_step
from jaxllm.transformer import transformer_params

QUIET = Console(quiet=True)

# -------------------------------------------------------------------------------------------------------- rounding


def test_bfloat16_rounding_is_unbiased_and_between_neighbours():
    """Means over 20,000 draws: within five standard errors of x. Neighbours are 2**-7 of a power of two apart."""
    x = jnp.array([1.0 + 2**-10, -3.1415927, 1e-30, 65504.123, 0.0])
    draws = jax.vmap(partial(to_bfloat16, x))(jax.random.split(jax.random.key(0), 20_000)).astype(jnp.float32)
    gap = 2.0 ** (jnp.floor(jnp.log2(jnp.maximum(jnp.abs(x), 1e-37))) - 7)
    assert (jnp.abs(draws - x[None])[:, :4] < gap[None, :4]).all()
    assert (draws[:, 4] == 0).all()
    scaled = (np.float64(draws) - np.float64(x))[:, :4] / np.float64(gap)[:4]
    assert (np.abs(scaled.mean(0)) < 5 * 0.5 / 20_000**0.5).all()
    odd = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(to_bfloat16(odd, jax.random.key(0)).astype(jnp.float32), odd)


def test_codes_are_unbiased_and_fine_at_the_top():
    """Within one step of the square code, and no bias in the mean."""
    x = jax.random.normal(jax.random.key(0), (8, 512)) ** 3
    draws = jax.vmap(lambda key: decode(encode(x, 1, key)))(jax.random.split(jax.random.key(1), 2000))
    top = jnp.repeat(jnp.abs(x.reshape(8, 2, 256)).max(-1), 256, 1)
    step = (2 * jnp.sqrt(jnp.abs(x) / top) * 127 + 1) / 127**2 * top
    assert (jnp.abs(draws - x[None]) <= step[None] * 1.001).all()
    assert (jnp.abs(draws.mean(0) - x) <= 6 * 0.5 * step / 2000**0.5).all()
    assert (decode(encode(jnp.zeros((4, 64)), 1, jax.random.key(0))) == 0).all()


def test_which_parameters_have_few_bits():
    kernel = Param((4, 64, 8, 32), ("layers", "embed", "heads", "head_dim"), Normal(1.0))
    assert is_matrix(kernel)
    assert (block_axis(kernel), coded_bytes(kernel)) == (3, 1 + 4 / 32)
    table, router = Param((4096, 64), ("vocab", "embed"), Normal(1.0)), replace(kernel, exact=True)
    assert not is_matrix(table) and not is_matrix(router)
    assert coded_bytes(table) == 4
    assert block_axis(replace(kernel, shape=(4, 64, 8, 24))) is None, "blocks of 8 would cost half a byte"


# -------------------------------------------------------------------------------------------------------- training


def spec():
    block = Block(GQA(4, 2, 16, position=Rope()), GLU(128), RMSNorm())
    return Transformer(300, 64, decoder(block, layers=2), RMSNorm(), context=32, head=LMHead(tied=True), name="toy")


def short(folder, **changes):
    folder.mkdir(exist_ok=True)
    few = Checkpointing(every=20, best=False)
    return experiment(folder, **({"model": spec(), "steps": 40, "eval_every": 40, "checkpoint": few} | changes))


def last_loss(exp):
    train(exp, QUIET)
    return np.mean([r["train/loss"] for r in read_metrics(exp.run_dir) if "train/loss" in r][-5:])


SLOW = Optimizer(peak_lr=2e-3, warmup_steps=2)
CHOICES = {
    "masters": {"optimizer": replace(SLOW, masters="bfloat16")},
    "moments": {"optimizer": replace(SLOW, moments="int8")},
    "both": {"optimizer": replace(SLOW, masters="bfloat16", moments="int8")},
    "float16": {"optimizer": SLOW, "runtime": Runtime("float16")},
}


@pytest.fixture(scope="module")
def plain_loss(tmp_path_factory):
    return last_loss(short(tmp_path_factory.mktemp("plain"), optimizer=SLOW))


@pytest.mark.parametrize(
    "choice", [pytest.param(name, marks=() if name in ("both", "float16") else pytest.mark.slow) for name in CHOICES]
)
def test_a_toy_trains_to_nearly_the_same_loss_and_resumes_bitwise(choice, plain_loss, tmp_path):
    whole = short(tmp_path / "a", **CHOICES[choice])
    assert last_loss(whole) == pytest.approx(plain_loss, rel=0.03)
    parts = replace(short(tmp_path / "b", **CHOICES[choice]), optimizer=whole.optimizer)
    train(replace(parts, steps=20), QUIET)
    again, straight = train(parts, QUIET), train(whole, QUIET)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(straight), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_small_steps_move_bfloat16_masters_only_when_rounded_stochastically():
    """A weight of 1 and updates of 2**-12: to nearest it stands still, stochastically it goes where float32 goes."""
    tree = {"w": Param((64, 64), ("embed", "ffn"), Normal(0.02), stored="bfloat16")}
    cfg = Optimizer(peak_lr=2.0**-12, warmup_steps=0, decay_steps=10**6, weight_decay=0.0, clip_norm=None)
    step = make_step(lambda p, b, key: (jnp.sum(p["w"].astype(jnp.float32)), {"weight": jnp.ones(())}),
                     optimizer := make_optimizer(cfg, tree), tree, Runtime())  # fmt: skip
    state = init_state(tree, optimizer, jax.random.key(0))
    state = replace(state, params={"w": jnp.ones((64, 64), jnp.bfloat16)})
    for _ in range(64):
        state, _ = step(state, jnp.zeros(()))
    assert jnp.bfloat16(1.0 - 2.0**-12) == 1.0
    assert state.params["w"].dtype == jnp.bfloat16
    assert float(state.params["w"].astype(jnp.float32).mean()) == pytest.approx(1 - 64 * 2.0**-12, abs=5e-4)


# ------------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(zero=1)])
def test_codes_and_scales_lie_as_their_parameter(layout):
    cfg = replace(SLOW, decay_steps=10, moments="int8", masters="bfloat16")
    tree = master_params(cfg, transformer_params(spec()))
    mesh, optimizer = make_mesh(layout), make_optimizer(cfg, tree)
    state = abstract_state(tree, optimizer, Runtime(layout=replace(layout, replicate_below=1)), mesh)
    mu = state.opt_state[1].mu["stacks"]["0"]["0"]["ffn"]["up"]["kernel"]
    master = state.params["stacks"]["0"]["0"]["ffn"]["up"]["kernel"]
    assert isinstance(mu, Coded)
    assert (mu.code.dtype, master.dtype) == (jnp.int8, jnp.bfloat16)
    assert mu.code.sharding == master.sharding
    assert mu.scale.shape == (2, 64, 1)
    assert mu.scale.sharding.spec[1] == master.sharding.spec[1] and mu.scale.sharding.spec[2] is None
    codes = [m for m in jax.tree.leaves(state.opt_state, is_leaf=is_coded) if is_coded(m)]
    assert len(codes) == 2 * 7, "q, k, v, o, gate, up, down"


def test_eight_devices_train_as_one(tmp_path):
    """Both options under ZeRO 3: the same losses. Which way a number is rounded does not depend on where it lies."""
    few = replace(SLOW, masters="bfloat16", moments="int8")
    losses = []
    for name, runtime in (("one", Runtime()), ("eight", Runtime(layout=Layout(replicate_below=1)))):
        exp = short(tmp_path / name, optimizer=few, runtime=runtime, steps=6, log_every=1)
        train(exp, QUIET)
        losses.append([r["train/loss"] for r in read_metrics(exp.run_dir) if "train/loss" in r])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=2e-3)


# --------------------------------------------------------------------------------------------------------- float16


def test_the_scale_halves_grows_and_has_a_floor():
    scaling = LossScale(start=8.0, growth_every=3, floor=2.0)
    extra = {"skipped": jnp.int32(0), "bad_streak": jnp.int32(0)} | fresh_scale(scaling)
    seen = []
    for good in (True, True, True, False, False, False, False, True):
        extra = extra | counters(extra, jnp.array(good), scaling)
        seen.append([float(extra[k]) for k in ("loss_scale", "overflows", "skipped", "bad_streak")])
    assert seen[2:] == [[16, 0, 0, 0], [8, 1, 0, 0], [4, 2, 0, 0], [2, 3, 0, 0], [2, 3, 1, 1], [2, 3, 1, 0]]


def test_an_overflow_is_skipped_and_found_again_at_a_smaller_scale():
    """d(loss)/dw = 4 in float16: 4 * 2**15 overflows, 4 * 2**13 does not. The update is that of float32."""
    tree = {"w": Param((4,), ("embed",), Normal(0.02))}
    scaling, cfg = LossScale(), Optimizer(peak_lr=0.1, warmup_steps=0, decay_steps=100, clip_norm=None)

    def loss(params, batch, key):
        return jnp.sum(params["w"].astype(jnp.float16) * jnp.float16(4)).astype(jnp.float32), {"weight": jnp.ones(())}

    optimizer = make_optimizer(cfg, tree)
    step = make_step(loss, optimizer, tree, Runtime("float16"), scaling=scaling)
    state = init_state(tree, optimizer, jax.random.key(0), scaling)
    before, norms = np.array(state.params["w"]), []
    for _ in range(4):
        state, m = step(state, jnp.zeros(()))
        norms.append(float(m["grad_norm"]))
        if len(norms) == 2:
            np.testing.assert_array_equal(state.params["w"], before)
    assert (float(m["loss_scale"]), int(m["overflows"]), int(m["skipped"])) == (2.0**13, 2, 0)
    assert norms[2:] == [8.0, 8.0]
    assert (np.array(state.params["w"]) < before).all()


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"floor=4.0, start=2.0"):
        LossScale(start=2.0, floor=4.0)
    with pytest.raises(ValueError, match="growth_every=0"):
        LossScale(growth_every=0)
    exp = short(tmp_path)
    assert serial.override(exp, ["optimizer.loss_scale.start=1024"]).optimizer.loss_scale.start == 1024
    with pytest.raises(ValueError, match=r"must be one of float32, int8"):
        serial.override(exp, ["optimizer.moments=int4"])
    with pytest.raises(ValueError, match=r"compute_dtype was 'float32' and is 'float16' now.*another run_dir"):
        check_resume(exp, replace(exp, runtime=Runtime("float16")))
