"""The real TPU compiler through `plan`, and what is refused before it is asked."""

import dataclasses
import json
import sys

import pytest
from rich.console import Console

from jaxllm.experiment import Data, Experiment, Source, resolve
from jaxllm.models.presets import PRESETS, toy
from jaxllm.plan import compile as compiling
from jaxllm.plan import topology
from jaxllm.plan.choose import search_command
from jaxllm.plan.compile import Compiled, compile_step, prepare
from jaxllm.plan.estimate import NO_TIME, Plan, advice, to_json
from jaxllm.plan.memory import PARTS, Memory
from jaxllm.plan.program import Kernel, Program
from jaxllm.plan.report import plan, plan_command, print_plan
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

V5E = topology.parse("v5e:2x2")
CONFIG = """
from jaxllm.experiment import Data, Experiment, Source, resolve
from jaxllm.models.presets import PRESETS, toy
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

def config():
    model = toy(PRESETS["llama3_8b"](), dim=256, vocab=1024)
    runtime = Runtime("bfloat16", attention="chunked", remat="full", layout=Layout(replicate_below=1024))
    return Experiment(model, Data((Source("x"),), 64), 100, 8, "run", runtime=runtime)
"""


def experiment(batch_size=8, attention="chunked", preset="llama3_8b", **layout):
    model = toy(PRESETS[preset](), dim=256, vocab=1024)
    runtime = Runtime("bfloat16", attention=attention, remat="full", layout=Layout(**layout))
    return resolve(Experiment(model, Data((Source("x"),), 64), 100, batch_size, "run", runtime=runtime))


def test_a_toy_step_is_compiled(tmp_path, capsys):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    (tmp_path / "toy.py").write_text(CONFIG)
    assert plan_command(str(tmp_path / "toy.py"), ["seed=3"], "v5e:2x2", str(tmp_path / "plan.json"), 300.0) == 0
    made = json.loads((tmp_path / "plan.json").read_text())
    assert sum(made["hbm_by_part"].values()) == pytest.approx(made["hbm_gib"])
    assert set(made["hbm_by_part"]) == set(PARTS)
    assert 0.001 < made["hbm_gib"] < 0.05
    assert made["model_tflop"] == pytest.approx(128 * 6 * (1024 * 256 + 2 * 98_304) / 1e12, rel=0.2)
    assert made["xla_seconds"] == made["step_seconds"] > 0
    assert made["pallas_seconds"] == 0
    assert made["mfu"] == pytest.approx(made["model_tflop"] / made["step_seconds"] / 197)
    assert made["unknown_loops"] == []
    assert made["collectives"]["all-gather"]["count"] > 0
    assert made["compile_seconds"] > 0
    printed = capsys.readouterr().out
    assert "peak" in printed and "data" in printed and "MFU" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kind", "axis"),
    [
        ({"sequence": 2, "attention": "tpu"}, "collective-permute", "sequence"),
        ({"sequence": 2, "context": "all_to_all"}, "all-to-all", "sequence"),
        ({"tensor": 2, "split_stream": True}, "reduce-scatter", "tensor"),
        ({"expert": 4, "preset": "mixtral_8x7b"}, "all-to-all", "expert"),
    ],
)
def test_layouts_compile_to_their_collectives(layout, kind, axis):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    made = plan(experiment(**layout), "v5e:2x2", time_out=300)
    found = [c for c in made.program.collectives if c.kind == kind and c.axes == axis]
    assert sum(c.wire for c in found) > 0
    if axis == "expert":  # a device has 128 tokens of width 256 in bf16, two choices each; buffers 1.25 times as long
        once = 1.25 * 128 * 2 * 256 * 2
        assert 4 * once <= sum(c.wire for c in found) / 2 <= 8 * once


@pytest.mark.slow
def test_kernels_of_a_step_are_timed(monkeypatch, tmp_path):
    """Two layers, remat: two forward kernels and one backward each. Nothing is left on disk."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(tmp_path))
    made = plan(experiment(attention="tpu", data=4), "v5e:2x2", time_out=300)
    assert made.untimed is None
    assert made.program.kernel_counts() == {"flash_forward": 4, "flash_backward": 2}
    assert made.pallas_seconds == pytest.approx(
        sum(k.count * made.kernel_seconds[k.name] for k in made.program.kernels)
    )
    assert made.step_seconds == made.xla_seconds + made.pallas_seconds
    assert 1e-6 < min(made.kernel_seconds.values()) < max(made.kernel_seconds.values()) < 1e-4
    assert made.pallas_seconds > made.kernel_flops / made.target.chip.peak
    assert to_json(made)["pallas_note"] is None
    assert not list(tmp_path.glob("jaxllm-plan-*"))


def test_why_kernels_are_not_timed(tmp_path):
    """What the second child left decides; a plan without kernel seconds says so and takes them at peak."""
    (tmp_path / "log").write_text("Traceback ...\nKilled")
    assert compiling._calls(tmp_path) == "compiling kernels alone failed: Killed"
    (tmp_path / "calls.json").write_text('{"error": "this libtpu wrote no bundles"}')
    assert compiling._calls(tmp_path) == "this libtpu wrote no bundles"
    kernels = (Kernel("flash.1", 3, ((2,),), 1e12),)
    program = Program(1_500_000_000, 0.0, (), kernels, (), {}, ())
    nothing = Compiled("", "", "", "", "no bundles", 0, None, 0.0, 0.0, {})
    made = Plan(experiment(), V5E, Memory({}, ()), 2**34, program, 1e12, 1e12, nothing, {}, "no bundles")
    assert made.pallas_seconds is None
    assert made.step_seconds == pytest.approx(1 + 3e12 / 197e12)
    assert "no bundles" in to_json(made)["pallas_note"]


@pytest.mark.slow
def test_a_step_that_does_not_fit_says_by_how_much(capsys):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    wide = dataclasses.replace(experiment(batch_size=2**17), runtime=Runtime("float32", attention="chunked"))
    made = plan(wide, "v5e:2x2", time_out=300)
    assert not made.fits
    assert made.memory.total > made.limit == int(15.75 * 2**30)
    assert any("remat=full" in line for line in advice(made))


@pytest.mark.slow
def test_an_unknown_slice_is_named_by_the_compiler():
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    with pytest.raises(ValueError, match="does not know topology 'v5e:5x7'"):
        plan(experiment(batch_size=35, data=35), "v5e:5x7", time_out=120)


def test_time_out_ends_the_child(monkeypatch):
    monkeypatch.setattr(compiling, "require_compiler", lambda target: None)
    with pytest.raises(TimeoutError, match=r"longer than 0 s; allow more with --timeout"):
        compile_step(prepare(experiment(), V5E), V5E, time_out=0.3)


def test_a_killed_compiler_is_explained(monkeypatch, tmp_path):
    error = compiling._failure(tmp_path, -9, None, V5E)
    assert "SIGKILL" in str(error) and "memory ran out" in str(error)


@pytest.mark.parametrize(
    ("name", "near"), [("v5e:16", "v5e:4x4"), ("v5:4x4x4", "v5p:4x4x4"), ("v6e-256", "v6e:16x16"), ("tpu", "")]
)
def test_unknown_topology_names_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"topology '{name}' is not known; did you mean '{near}"):
        topology.parse(name)


def test_topology():
    pod = topology.parse("V5E:16x16")
    assert (pod.name, pod.devices, pod.chip.peak) == ("v5e:16x16", 256, 197e12)
    assert all(topology.parse(name).name == name for name in topology.names())


def test_no_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jaxllm\[tpu\]"'):
        plan(experiment(), "v5e:2x2")


def test_no_compiler_for_gpus(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs no GPU.*pip install jax-cuda12-plugin==\S+ jax-cuda12-pjrt=="):
        plan(experiment(), "h100:8")


def test_gpus_have_no_seconds(tmp_path):
    """What wants them is refused before anything is compiled; a plan has null, and says why."""
    (tmp_path / "toy.py").write_text(CONFIG)
    with pytest.raises(ValueError, match="--report draws seconds, and XLA estimates no time for GPU"):
        plan_command(str(tmp_path / "toy.py"), [], "a100:8", picture=str(tmp_path / "plan.png"))
    with pytest.raises(ValueError, match="--search ranks by seconds"):
        search_command(str(tmp_path / "toy.py"), [], "a100:8", minutes=1.0)
    program, nothing = Program(0, 1.0, (), (), (), {}, ()), Compiled("", "", "", "", (), 0, None, 0.0, 0.0, {})
    made = Plan(experiment(), topology.parse("h100:8"), Memory({}, ()), 2**34, program, 1.0, 1.0, nothing, {}, NO_TIME)
    shown = to_json(made)
    assert made.fits
    assert {shown[name] for name in ("xla_seconds", "pallas_seconds", "step_seconds", "wire_seconds", "mfu")} == {None}
    assert shown["time_note"] == NO_TIME
    assert shown["pallas_note"] is None


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["h100:8", "a100:8"])
def test_a_step_for_gpus(gpus, capsys):
    """FSDP 4 x tensor 2 with the flash kernel, compiled with neither GPU nor driver."""
    pytest.importorskip("jax_cuda12_plugin", reason="needs XLA's compiler for GPUs")
    ready = experiment(attention="gpu", tensor=2, replicate_below=1024)
    made = plan(dataclasses.replace(ready, data=dataclasses.replace(ready.data, context=256)), gpus, time_out=300)
    assert made.fits and set(made.memory.by_part) == set(PARTS)
    assert made.memory.by_part["optimiser"] == pytest.approx(2 * made.memory.by_part["parameters"], rel=0.01)
    assert {("all-gather", "data"), ("reduce-scatter", "data")} <= {(c.kind, c.axes) for c in made.program.collectives}
    assert made.program.kernel_counts() == {"flash_forward": 4, "flash_dq": 2, "flash_dkv": 2}
    print_plan(made, Console())
    assert "No time: XLA estimates" in capsys.readouterr().out


def test_layouts_and_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="must be the number of devices"):
        prepare(experiment(data=3), V5E)
    with pytest.raises(ValueError, match="kv_heads=2"):
        prepare(experiment(tensor=4), V5E)
    with pytest.raises(ValueError, match=r"batch_size=9 must be a multiple of .* = 4 on v5e:2x2; the nearest is 8"):
        prepare(experiment(batch_size=9), V5E)
    long = experiment(sequence=4)
    with pytest.raises(ValueError, match=r"8 chunks, which must divide their length, 60; the next that they do is 64"):
        prepare(dataclasses.replace(long, data=dataclasses.replace(long.data, context=60)), V5E)


def test_preparing_takes_the_kernel_and_shards():
    auto = dataclasses.replace(experiment(), runtime=Runtime())
    ready = prepare(auto, V5E)
    assert ready.runtime.attention == "tpu"
    assert ready.runtime.layout == Layout()


def test_memory_errors_are_told_from_others():
    text = "RESOURCE_EXHAUSTED: the total memory required (104.69G) exceeds available HBM (15.75G)."
    assert compiling._memory_limit(text) == int(15.75 * 2**30)
    assert compiling._memory_limit("RESOURCE_EXHAUSTED: Used 20.5G of 95.74G hbm.") == int(95.74 * 2**30)
    assert compiling._memory_limit("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem") is None
    assert compiling._memory_limit("INVALID_ARGUMENT") is None


def test_advice_follows_the_parts():
    """A step full of saved activations is told to save fewer; one full of state to shard it."""

    def ranked(zero, remat, **gib):
        parts = {part: int(gib.get(part, 0) * 2**30) for part in PARTS}
        exp = experiment(batch_size=64, zero=zero)
        exp = dataclasses.replace(exp, runtime=dataclasses.replace(exp.runtime, remat=remat))
        nothing = Compiled(None, "", "", "", (), 0, 2**34, 0.0, 0.0, {})
        return advice(Plan(exp, V5E, Memory(parts, ()), 2**34, None, 0.0, 0.0, nothing))

    assert "remat=full" in ranked(3, "none", saved=20)[0]
    assert "zero=3" in ranked(0, "full", parameters=8, optimiser=16)[0]
    assert "accumulate=2" in "".join(ranked(3, "full", saved=20)[:2])
