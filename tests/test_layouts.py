"""Every layout gives the losses of one device: 20 steps, float32, 8 virtual devices."""

import dataclasses
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.experiment import Balance, Optimizer
from jaxllm.mesh import make_mesh, slices_of, torus_of
from jaxllm.models.presets import PRESETS, toy
from jaxllm.nn.context import in_ring_order
from jaxllm.nn.pipeline import require_stages
from jaxllm.objectives.lm import inputs_of, lm_loss
from jaxllm.params import Constant, Normal, Param, init, leaves, paths
from jaxllm.plan.hlo import parse
from jaxllm.plan.program import program
from jaxllm.records import Batch, inputs
from jaxllm.runtime import Runtime
from jaxllm.sharding import DATA, MESH_AXES, Layout, at_work, partition, storage
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.step import abstract_batch, abstract_state, batch_sharding, compiled, init_state, make_step
from jaxllm.transformer import block_params, forward, transformer_params

SPEC = toy(PRESETS["gemma2_2b"](), vocab=96, dim=64)
MIXTURE = toy(PRESETS["mixtral_8x7b"](), vocab=96, dim=64)
TREE = transformer_params(SPEC)
CHOICE = Optimizer(peak_lr=1e-2, warmup_steps=2, decay_steps=20)
OPTIMIZER = make_optimizer(CHOICE, TREE)
STEPS = 20


def batch_of(step):
    rng = np.random.default_rng(step)
    ids, shape = rng.integers(0, 96, (16, 17), dtype=np.int32), (16, 16)
    segment = np.where(np.arange(16) < 11, 1, 2) * np.ones(shape, np.int32)
    position = np.where(np.arange(16) < 11, np.arange(16), np.arange(16) - 11) * np.ones(shape, np.int32)
    weight = (rng.random(shape) < 0.8).astype(np.float32)
    channel = np.repeat(np.arange(16) % 2, 16).reshape(shape).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], weight, segment.astype(np.int32), position.astype(np.int32), channel)


def losses(layout, accumulate=1, torus=(), steps=STEPS, spec=SPEC, choice=CHOICE):
    runtime = Runtime(layout=layout, vocab_chunk=40)
    mesh = make_mesh(layout or Layout(), jax.devices()[: 1 if layout is None else 8], torus)
    tree = transformer_params(spec)
    optimizer = make_optimizer(choice, tree)
    step = make_step(
        lambda params, batch, key: lm_loss(params, spec, batch, runtime, key, channels=2, balance=Balance()),
        optimizer, tree, runtime, accumulate=accumulate, layer_norms=True,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda x: x.sharding, abstract_state(tree, optimizer, runtime, mesh))
        state = jax.jit(partial(init_state, tree, optimizer), out_shardings=places)(jax.random.key(0))
        out = []
        for i in range(steps):
            batch = jax.device_put(batch_of(i), batch_sharding(runtime, mesh))
            state, metrics = step(state, batch)
            norms = [metrics[f"grad_norm/{path}"] for path, _ in paths(tree)]
            out.append([*map(float, [metrics["loss"], metrics["grad_norm"], *metrics["channel_nll"], *norms])])
        assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, places))), (
            "a step must not change where the state lives"
        )
    return np.array(out)


@cache
def one_device(spec=SPEC, steps=STEPS, choice=CHOICE):
    return losses(None, steps=steps, spec=spec, choice=choice)


LAYOUTS = {
    "data": (Layout(zero=0), 1, ()),
    "zero1": (Layout(zero=1), 1, ()),
    "zero2 accumulated on a torus": (Layout(zero=2), 2, (2, 2, 2)),
    "zero3": (Layout(zero=3), 1, ()),
    "zero3 accumulated on a torus": (Layout(zero=3), 2, (2, 2, 2)),
    "tensor": (Layout(tensor=2, zero=0), 1, ()),
    "zero3 x tensor on a torus": (Layout(tensor=2, zero=3), 1, (2, 4)),
    "replica x zero1 x tensor accumulated": (Layout(replica=2, tensor=2, zero=1), 2, ()),
    "ring x zero3": (Layout(sequence=4, zero=3), 1, ()),
    "ring x zero1 x tensor, stream split, accumulated": (
        Layout(sequence=2, tensor=2, zero=1, split_stream=True),
        2,
        (),
    ),
    "all to all x zero3 x tensor, stream split": (
        Layout(sequence=2, tensor=2, zero=3, context="all_to_all", split_stream=True),
        1,
        (),
    ),
    "zero2 accumulated, moments offloaded": (Layout(zero=2, offload=True), 2, ()),
    "ring of 8": (Layout(sequence=8, zero=0), 1, ()),
    "all to all x zero1": (Layout(sequence=4, zero=1, context="all_to_all"), 1, ()),
    "zero3 x tensor, stream split": (Layout(tensor=2, zero=3, split_stream=True), 1, ()),
}
SLOW = (  # parts of the others
    "data",
    "zero1",
    "tensor",
    "zero3 accumulated on a torus",
    "zero2 accumulated, moments offloaded",
    "ring of 8",
    "all to all x zero1",
    "ring x zero1 x tensor, stream split, accumulated",
    "zero3 x tensor, stream split",
)


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in LAYOUTS])
def test_layout_gives_the_losses_of_one_device(name):
    layout, accumulate, torus = LAYOUTS[name]
    got = losses(dataclasses.replace(layout, replicate_below=0), accumulate, torus)
    assert_same(got, one_device())


EXPERTS = {
    "expert x zero3 x tensor": Layout(expert=2, tensor=2, zero=3),
    "expert x zero3, rounds": Layout(expert=4, zero=3, spare=0.3),
    "expert x ring x zero1 x stream split": Layout(expert=2, sequence=2, tensor=2, zero=1, split_stream=True),
}


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (i > 0)) for i, x in enumerate(EXPERTS)])
def test_experts_on_other_devices_give_the_losses_of_one(name):
    got = losses(dataclasses.replace(EXPERTS[name], replicate_below=0), steps=10, spec=MIXTURE)
    assert_same(got, one_device(MIXTURE, 10))


def deep(*repeats):
    """As many dense layers as the first number says, then layers of experts."""
    moe = MIXTURE.stacks[0]
    dense = dataclasses.replace(moe.pattern[0], ffn=moe.pattern[0].ffn.expert)
    stacks = [dataclasses.replace(moe, pattern=(dense,)), moe]
    return dataclasses.replace(
        MIXTURE, stacks=tuple(dataclasses.replace(s, repeats=n) for s, n in zip(stacks, repeats, strict=False))
    )


STAGES = {
    # 3 dense and 2 of 6 layers of experts come before the pipeline
    "uneven, dense before experts, zero1": (deep(3, 6), Layout(stage=4, zero=1)),
    "groups x zero3 x tensor": (deep(5), Layout(stage=2, groups=2, tensor=2, zero=3, microbatches=4)),
    "stage alone": (deep(8), Layout(stage=8, zero=0)),
    "uneven x groups x expert x zero1": (deep(3, 6), Layout(stage=2, groups=2, expert=2, zero=1, microbatches=4)),
    "ring x zero1": (deep(4), Layout(stage=2, sequence=2, zero=1)),
    "all to all x zero3 x tensor, stream split": (
        deep(4),
        Layout(stage=2, sequence=2, tensor=2, zero=3, context="all_to_all", split_stream=True),
    ),
    "uneven x zero0": (deep(2, 5), Layout(stage=4, zero=0, microbatches=8)),
}


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (i > 0)) for i, x in enumerate(STAGES)])
def test_stages_give_the_losses_of_one_device(name):
    """At a lower rate than the others: with 9 layers a router's choice flips by step 7, and moves the loss by 3e-5."""
    spec, layout = STAGES[name]
    slow = dataclasses.replace(CHOICE, peak_lr=1e-3)
    got = losses(dataclasses.replace(layout, replicate_below=0), steps=10, spec=spec, choice=slow)
    assert_same(got, one_device(spec, 10, slow))


def test_groups_of_a_stage_may_offload_what_they_save():
    spec, layout, ids = deep(4), Layout(stage=2, groups=2, zero=0), batch_of(0).tokens_BT
    params = init(transformer_params(spec), jax.random.key(0))

    def gradients(runtime):
        def loss(params):
            return jnp.mean(jnp.square(forward(params, spec, inputs(ids), runtime).hidden_BTD))

        return jax.device_get(jax.jit(jax.grad(loss))(params))

    want = gradients(Runtime())
    with jax.set_mesh(make_mesh(layout, jax.devices()[:2])):
        got = gradients(Runtime(remat="full", offload=("stream",), layout=layout))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-9), got, want)


def compiled_step(layout, spec):
    """Figures of the compiled step, and its mesh."""
    runtime, tree = Runtime(layout=layout, vocab_chunk=96), transformer_params(spec)
    mesh, optimizer = make_mesh(layout), make_optimizer(CHOICE, tree)
    step = make_step(lambda p, batch, key: lm_loss(p, spec, batch, runtime, key, channels=2), optimizer, tree, runtime)
    with jax.set_mesh(mesh):
        shapes = abstract_state(tree, optimizer, runtime, mesh), abstract_batch(16, 16, runtime, mesh)
        return program(parse(step.lower(*shapes).compile().as_text()), dict(mesh.shape)), mesh


@pytest.mark.parametrize(
    "layout", [Layout(replica=2, zero=1), pytest.param(Layout(replica=2, stage=2, zero=1), marks=pytest.mark.slow)]
)
def test_only_shards_of_gradients_leave_a_slice(layout):
    """What is summed over replica is, all in all, what a device stores, in fp32, and once (an all-reduce counts twice).

    Norms go whole; 5 % are for them, and for scalars.
    """
    layout, spec = dataclasses.replace(layout, replicate_below=0), deep(4)
    made, mesh = compiled_step(layout, spec)
    crossing = [c for c in made.collectives if "replica" in c.axes.split("+")]
    matrices = [p for p in leaves(transformer_params(spec)) if len(p.shape) > 1 and p.shape[-1] > 1]
    held = sum(int(np.prod(p.shape)) // _ways(storage(p, layout, mesh.shape), mesh) for p in matrices)
    assert {c.kind for c in crossing} == {"all-reduce"}
    assert sum(c.wire for c in crossing) == pytest.approx(2 * 4 * held, rel=0.05)
    assert not [c.axes for c in made.collectives if c.axes == "?"], "groups that cannot be read may cross slices"


def _ways(spec, mesh):
    names = [name for axes in spec for name in ((axes,) if isinstance(axes, str) else axes or ())]
    return int(np.prod([mesh.shape[name] for name in names]))


def test_weights_stay_on_their_stages():
    """Between stages go activations alone: one [b, T, D] each turn and way, and rows that are dealt out and back."""
    made, _ = compiled_step(Layout(stage=4, zero=1, microbatches=4, replicate_below=0), deep(4))
    over = [c for c in made.collectives if "stage" in c.axes.split("+")]
    turns = [c for c in over if c.kind == "collective-permute" and "pipeline" in c.source]
    assert sum(c.count for c in turns) == 2 * (4 + 4 - 1)
    assert {c.shape for c in turns} == {"f32[2,16,64]"}  # 16 rows, of 2 shares and 4 micro-batches
    layers = {x for p in leaves(block_params(deep(4).stacks[0].pattern[0], 64, 1.0)) for x in (p.shape, p.shape[::-1])}
    found = {tuple(map(int, s.split("[")[1][:-1].split(","))) for c in over for s in c.shape.split() if "[]" not in s}
    assert not [shape for shape in found if len(shape) > 1 and any(shape[-len(x) :] == x for x in layers if len(x) > 1)]


def test_accumulation_equals_the_big_batch():
    """Micro-batches have different token counts: only weighting by tokens makes them add up."""
    assert_same(losses(None, accumulate=4), one_device())


def assert_same(got, want):
    """Losses (column 0, by channel in 2 and 3) to 1e-5 at all steps; the gradient's norm while nothing has drifted.

    Every parameter's own gradient norm (from column 4 on) at the first step.
    """
    loss = [0, 2, 3]
    np.testing.assert_allclose(got[:, loss], want[:, loss], rtol=1e-5)
    np.testing.assert_allclose(got[:3, 1], want[:3, 1], rtol=1e-5)
    np.testing.assert_allclose(got[0, 4:], want[0, 4:], rtol=1e-5)


def test_a_step_is_compiled_once():
    """Another shape later is an error that names it."""
    runtime = Runtime(vocab_chunk=40)
    step = make_step(
        lambda params, batch, key: lm_loss(params, SPEC, batch, runtime, key, channels=2), OPTIMIZER, TREE, runtime
    )
    state = jax.jit(partial(init_state, TREE, OPTIMIZER))(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, batch_of(0))
    run = compiled(step, state, batch)
    state, _ = run(state, batch)
    with pytest.raises(TypeError, match=r"tokens_BT.*compiled with int32\[16,16\] and called with int32\[8,16\]"):
        run(state, jax.tree.map(lambda x: x[:8], batch))


# ------------------------------------------------------------------------------------------------------ rule tables

SIZES = dict.fromkeys(MESH_AXES, 1) | {"data": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "zero", "want"),
    [
        (("layers", "embed", "heads", "head_dim"), (2, 64, 4, 16), 3, (None, "data", "tensor", None)),
        (("layers", "embed", "heads", "head_dim"), (2, 64, 4, 16), 0, (None, None, "tensor", None)),
        (("layers", "ffn", "embed"), (2, 128, 64), 1, (None, "tensor", "data")),
        (("vocab", "embed"), (96, 64), 3, ("tensor", "data")),
        (("vocab", "embed"), (97, 64), 3, (None, "data")),  # a vocabulary that does not divide stays whole
        (("layers", "embed", "kv_heads", "head_dim"), (2, 64, 1, 16), 2, (None, "data", None, None)),
        (("layers", "embed", "ffn"), (2, 66, 128), 3, (None, None, ("tensor", "data"))),  # 66 does not divide
        (("layers", "embed"), (2, 63), 3, (None, None)),
    ],
)
def test_storage_table(axes, shape, zero, want):
    layout = Layout(data=4, tensor=2, zero=zero, replicate_below=0)
    got = storage(Param(shape, axes, Normal(1.0)), layout, SIZES)
    assert tuple(got) == want


def test_zero_spreads_over_all_that_share_the_batch():
    """Over sequence and expert too; over data alone where all do not divide; an expert's weights not over experts."""
    layout, sizes = Layout(sequence=2, expert=2, replicate_below=0), SIZES | {"sequence": 2, "expert": 2, "data": 2}

    def stored(shape, *axes):
        return tuple(storage(Param(shape, axes, Normal(1.0)), layout, sizes))

    assert stored((64, 128), "embed", "ffn") == (("sequence", "expert", "data"), "tensor")
    assert stored((6, 8), "embed", "head_dim") == (None, ("sequence", "expert", "data"))
    assert stored((6, 10), "embed", "head_dim") == ("data", None)
    assert stored((4, 64, 128), "experts", "embed", "ffn") == ("expert", ("sequence", "data"), "tensor")


def test_small_parameters_stay_whole():
    assert tuple(storage(Param((8, 64), ("layers", "embed"), Constant(1.0)), Layout(), SIZES)) == (None, None)


@pytest.mark.parametrize(("axis", "n"), [("heads", 3), ("ffn", 129), ("kv_heads", 3)])
def test_a_mesh_that_does_not_divide_the_model_is_refused(axis, n):
    with pytest.raises(ValueError, match=f"must divide {axis}={n}"):
        partition((axis,), (n,), Layout(tensor=2), SIZES)


@pytest.mark.parametrize(
    ("torus", "tensor", "want"),
    [
        ((16, 16), 1, (16, 16, 1)),
        ((4, 4, 4), 1, (4, 4, 4)),
        ((4, 4, 4), 2, (4, 4, 2)),
        ((2, 4), 4, (2, 1, 1)),
        ((2, 4), 8, (1, 1, 1)),
        ((1, 4), 1, (4, 1, 1)),
        ((6, 4), 4, (6, 1, 1)),
        ((), 1, (8, 1, 1)),
    ],
)
def test_the_data_axis_follows_the_torus(torus, tensor, want):
    sizes = Layout(tensor=tensor).sizes(int(np.prod(torus)) if torus else 8, torus)
    assert (tuple(sizes[a] for a in DATA), sizes["tensor"]) == (want, tensor)


def test_an_axis_may_be_half_a_side_of_the_torus():
    """Four by four by four chips of v5p, named without the compiler: tensor takes half of the last side."""
    places = [V5P(coords=p) for p in np.ndindex(4, 4, 4)]
    mesh = make_mesh(Layout(tensor=2), places)
    assert {axis: n for axis, n in mesh.shape.items() if n > 1} == {"data": 4, "data_y": 4, "data_z": 2, "tensor": 2}
    one, two = mesh.devices.reshape(-1, 2)[0]
    assert sum(abs(a - b) for a, b in zip(one.coords, two.coords, strict=True)) == 1  # neighbours


class V5P(SimpleNamespace):
    """A chip as jax describes it."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU v5p", 0, 0
    __hash__ = object.__hash__


def test_slices_lie_along_replica():
    chips = [SimpleNamespace(platform="tpu", slice_index=i // 4, coords=(i % 2, i // 2 % 2, 0)) for i in range(8)]
    assert slices_of(chips[::-1]) == [chips[:4][::-1], chips[4:][::-1]]
    assert len(slices_of(jax.devices())) == 1
    with pytest.raises(ValueError, match=r"replica=1 must be a multiple of the slices .*, 2, .*set layout.replica=2"):
        make_mesh(Layout(), chips)


def test_the_torus_is_read_off_the_chips():
    def chips(places):
        return [SimpleNamespace(coords=p) for p in places]

    assert torus_of(chips(np.ndindex(2, 4, 1))) == (2, 4, 1)
    assert torus_of(chips([(0, 0, 0), (1, 1, 0)])) == ()
    assert torus_of(jax.devices()) == ()


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(ValueError, match="must be the number of devices, 8"):
        Layout(tensor=3).sizes(8)
    with pytest.raises(ValueError, match="must be the number of devices, 8"):
        Layout(data=4).sizes(8)
    assert Layout(tensor=2).sizes(8)["data"] == 4


def test_moments_lie_on_the_host_and_nothing_else():
    layout = Layout(offload=True)
    state = abstract_state(TREE, OPTIMIZER, Runtime(layout=layout), make_mesh(layout))
    kinds = {path: x.sharding.memory_kind for path, x in paths(state)}
    moments = {path for path in kinds if "/mu/" in path or "/nu/" in path}
    assert len(moments) == 2 * len(leaves(TREE))
    assert {path for path, kind in kinds.items() if kind == "pinned_host"} == moments


def test_masters_are_spread():
    """ZeRO-3 on 8 devices: each holds an eighth of masters and moments (norms aside)."""
    layout = Layout(zero=3, replicate_below=0)
    mesh = make_mesh(layout)
    state = abstract_state(TREE, OPTIMIZER, Runtime(layout=layout), mesh)
    whole = sum(x.size for x in jax.tree.leaves(state))
    local = sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(state))
    assert local == pytest.approx(whole / 8, rel=0.01)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


def test_a_row_that_does_not_divide_is_refused():
    """Before any work: while the step is traced."""
    with jax.set_mesh(make_mesh(Layout(sequence=8))):
        runtime = Runtime(layout=Layout(sequence=8))
        with pytest.raises(
            ValueError,
            match="cuts rows into 16 chunks, which must divide their length, 24; the next that they do is 32",
        ):
            in_ring_order(SPEC, inputs(jnp.zeros((1, 24), jnp.int32)), runtime)
        with pytest.raises(ValueError, match=r"size 8 must divide length=20"):
            partition(("length",), (20,), Layout(sequence=8), dict(make_mesh(Layout(sequence=8)).shape))
    with pytest.raises(ValueError, match=r"sequence=3 x tensor=1 must be the number of devices, 8"):
        Layout(sequence=3).sizes(8)


def test_layers_lie_on_stages_or_along_another_axis():
    """By their number where it divides and a stage holds one group; else as ZeRO has them, whatever its stage."""
    sizes, axes = SIZES | {"stage": 4}, ("layers", "embed", "ffn")

    def stored(repeats, layout, name=storage):
        layout = dataclasses.replace(layout, replicate_below=0)
        return tuple(name(Param((repeats, 64, 128), axes, Normal(1.0)), layout, sizes))

    assert stored(8, Layout(stage=4, zero=1)) == ("stage", "data", "tensor")
    assert stored(8, Layout(stage=4, zero=0)) == ("stage", None, "tensor")
    assert stored(6, Layout(stage=4, zero=1)) == (None, ("stage", "data"), "tensor")
    assert stored(6, Layout(stage=4, zero=0)) == (None, "stage", "tensor")
    assert stored(8, Layout(stage=4, groups=2, zero=3)) == (None, ("stage", "data"), "tensor")
    assert stored(6, Layout(stage=4, zero=1), at_work) == (None, "stage", "tensor")
    assert stored(8, Layout(stage=4, zero=3), at_work) == ("stage", None, "tensor")


@pytest.mark.slow
def test_taps_are_of_whole_rows_under_stages():
    spec, found = deep(1, 5), []
    params = init(transformer_params(spec), jax.random.key(0))
    for layout in (None, Layout(stage=2, groups=2, zero=1, replicate_below=0)):
        runtime = Runtime(layout=layout, taps=("residual",))
        with jax.set_mesh(make_mesh(layout or Layout(), jax.devices()[: 1 if layout is None else 8])):
            run = jax.jit(lambda p, batch, runtime=runtime: forward(p, spec, inputs_of(batch), runtime))
            found.append(np.asarray(run(params, batch_of(0)).aux.taps["residual"]))
    assert found[0].shape == (6, 16, 16, 64)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"microbatches=2 must be at least stage=4.*set microbatches=4 or more"):
        Layout(stage=4, microbatches=2)
    with pytest.raises(ValueError, match=r"stage=3.* must be the number of devices, 8"):
        Layout(stage=3).sizes(8)
    with pytest.raises(ValueError, match=r"stage=4 x groups=2 must be at most the repeats of .* has 6; set stage=6"):
        require_stages(deep(3, 6).stacks, Layout(stage=4, groups=2))
    runtime = Runtime(layout=Layout(stage=2, microbatches=4))
    tree = transformer_params(SPEC)
    with (
        jax.set_mesh(make_mesh(runtime.layout)),
        pytest.raises(ValueError, match=r"rows of a forward, 8, must be a multiple of 16.*; the next that is: 16"),
    ):
        params = jax.eval_shape(lambda: init(tree, jax.random.key(0)))
        jax.eval_shape(lambda p: forward(p, SPEC, inputs(jnp.zeros((8, 16), jnp.int32)), runtime), params)


def test_heads_that_do_not_divide_are_refused():
    layout = Layout(sequence=8, context="all_to_all")  # 4 heads
    runtime, params = Runtime(layout=layout), jax.eval_shape(lambda: init(TREE, jax.random.key(0)))
    with (
        jax.set_mesh(make_mesh(layout)),
        pytest.raises(ValueError, match=r'sequence=8 must divide the heads of a device, 4.*layout.context="ring"'),
    ):
        jax.eval_shape(lambda p: forward(p, SPEC, inputs(jnp.zeros((1, 16), jnp.int32)), runtime), params)
