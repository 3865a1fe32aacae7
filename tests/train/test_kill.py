"""SIGKILL at any moment costs nothing but time: the same command continues, and ends bitwise where it would have.

The real command in real processes, on a model of one layer. An uninterrupted run is the reference; the others are
killed at seeded moments and at each phase of a save, and compared with it by every step's loss and all final arrays.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxllm.train import manifest
from jaxllm.train.checkpoint import CHECKPOINTS, steps
from jaxllm.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("kill_child.py")
STEPS, EVERY, KILLED = 60, 5, -9

CONFIG = """
from jaxllm.config import GLU, GQA, Block, LMHead, RMSNorm, Rope, Transformer, decoder
from jaxllm.experiment import Checkpointing, Data, Experiment, Optimizer, Source
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

def config():
    block = Block(GQA(2, 2, 16, position=Rope()), GLU(64), RMSNorm())
    model = Transformer(384, 32, decoder(block, layers=1), RMSNorm(), context=32, head=LMHead(tied=True), name="kill")
    data = Data((Source({corpus!r}),), context=32, held_out_chars=1000)
    return Experiment(
        model, data, steps={steps}, batch_size=4, run_dir="unused", optimizer=Optimizer(peak_lr=1e-2, warmup_steps=5),
        log_every=1, eval_every=20, samples=(), checkpoint=Checkpointing(every={every}, keep=1),
        runtime=Runtime(layout={layout}),
    )
"""


@dataclass(frozen=True)
class Lab:
    """Where the runs are made: one corpus, two configs that differ in layout, one compilation cache, the reference."""

    home: Path

    def config(self, layout: str = "None") -> Path:
        path = self.home / ("one.py" if layout == "None" else "many.py")
        path.write_text(CONFIG.format(corpus=str(self.home / "corpus.txt"), steps=STEPS, every=EVERY, layout=layout))
        return path

    def start(self, run: Path, phase: str | None = None, layout: str = "None", devices: int = 1) -> subprocess.Popen:
        program = [ROOT / "train.py"] if phase is None else [CHILD, phase]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.home / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, *program, self.config(layout), f"run_dir={run}"]
        with (self.home / f"{run.name}.log").open("a") as log:
            return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def run(self, run: Path, phase: str | None = None, layout: str = "None", devices: int = 1) -> int:
        process = self.start(run, phase, layout, devices)
        try:
            return process.wait(timeout=240)
        finally:
            process.kill()

    def log(self, run: Path) -> str:
        return (self.home / f"{run.name}.log").read_text()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    home = tmp_path_factory.mktemp("kill")
    with gzip.open(ROOT / "data" / "shakespeare.jsonl.gz", "rt") as file:
        (home / "corpus.txt").write_text(json.loads(file.readline())["text"][:30_000])
    lab = Lab(home)
    assert lab.run(home / "reference", "watch") == 0, lab.log(home / "reference")
    assert steps(home / "reference" / CHECKPOINTS)[-1] == STEPS
    return lab


def losses(run: Path) -> dict[int, str]:
    """Step -> training loss, exactly."""
    return {r["step"]: r["train/loss"].hex() for r in read_metrics(run) if "train/loss" in r}


def final_state(run: Path) -> dict[str, bytes]:
    """Path -> bytes of every array of the last checkpoint: parameters, optimiser, counters."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        place = run / CHECKPOINTS / str(STEPS)
        tree = reader.metadata(place).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(place, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {
        jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in jax.tree_util.tree_flatten_with_path(arrays)[0]
    }


def assert_same_run(lab: Lab, run: Path) -> None:
    """Every step's loss and every array at the end are bitwise those of the reference."""
    reference = lab.home / "reference"
    got, want = losses(run), losses(reference)
    assert list(want) == list(range(1, STEPS + 1)) and len(set(want.values())) > STEPS // 2
    assert got == want
    final, expected = final_state(run), final_state(reference)
    assert len(expected) > 20 and final == expected
    assert [r for r in read_metrics(run) if "val/loss" in r] == [r for r in read_metrics(reference) if "val/loss" in r]


# ----------------------------------------------------------------------------------------------------------- set-up


def test_killed_while_setting_up(lab: Lab) -> None:
    """Config, tokenizer, shards and row plans: start k dies instead of naming its k-th file."""
    run = lab.home / "set_up"
    assert lab.run(run, "set_up") == 0, lab.log(run)
    kills = int(lab.log(run).split("kills: ")[1].split()[0])
    assert kills >= 5
    assert lab.run(run) == 0, lab.log(run)
    assert_same_run(lab, run)


# --------------------------------------------------------------------------------------------- each phase of a save


def contents(run: Path) -> dict[str, int]:
    """Entry of the checkpoint directory -> number of files in it; a sealed one has its manifest's name in front."""
    return {
        ("sealed " if (entry / manifest.NAME).exists() else "") + entry.name: sum(p.is_file() for p in entry.rglob("*"))
        for entry in (run / CHECKPOINTS).iterdir()
        if entry.is_dir()
    }


def test_killed_at_each_phase_of_a_save(lab: Lab) -> None:
    """One run, killed nine times; what lies on the disk afterwards proves that the phase was hit."""
    run = lab.home / "phases"

    def left_by(phase: str) -> dict[str, int]:
        assert lab.run(run, phase) == KILLED, (phase, lab.log(run))
        return contents(run)

    assert left_by("before") == {}
    assert list(left_by("begun")) == ["5.orbax-checkpoint-tmp"]
    left = left_by("written")
    assert list(left) == ["5.orbax-checkpoint-tmp"] and left["5.orbax-checkpoint-tmp"] >= 2
    assert list(left_by("finalised")) == ["5"]
    assert list(left_by("unnamed")) == ["5"] and list((run / CHECKPOINTS / "5").glob(f".{manifest.NAME}.*"))
    assert list(left_by("sealed")) == ["sealed 5"]
    whole = contents(run)["sealed 5"]
    left = left_by("half_deleted")
    assert set(left) == {"5", "sealed 10"} and 0 < left["5"] < whole - 1
    again = left_by("half_deleted")  # now while the next start cleans up
    assert set(again) == {"5", "sealed 10"} and again["5"] < left["5"]
    assert left_by("sealed").keys() == {"sealed 10", "sealed 15"}
    assert lab.run(run) == 0, lab.log(run)
    assert_same_run(lab, run)


# --------------------------------------------------------------------------------------------------- seeded moments


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl has."""
    return max(losses(run), default=0)


def kill_at(lab: Lab, run: Path, step: int | None, delay: float) -> bool:
    """Kill the command `delay` seconds after it began, or after it logged `step`; False if it had ended."""
    process = lab.start(run)
    while step is not None and last_step(run) < step and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    code = process.wait()
    assert code in (0, KILLED), lab.log(run)
    return code == KILLED


def kill_and_resume(lab: Lab, run: Path, seed: int, early: int, late: int) -> int:
    """A run killed `early` times while it starts and `late` times while it trains. Returns how often it was killed."""
    rng = random.Random(seed)
    moments: list[int | None] = [*sorted(rng.sample(range(1, STEPS - 5), late))]
    for _ in range(early):
        moments.insert(rng.randrange(len(moments) + 1), None)
    delays = [rng.uniform(0, 4.0 if step is None else 0.15) for step in moments]
    kills = sum(kill_at(lab, run, step, delay) for step, delay in zip(moments, delays, strict=True))
    assert lab.run(run) == 0, lab.log(run)
    assert_same_run(lab, run)
    return kills


def test_killed_at_three_seeded_moments(lab: Lab) -> None:
    assert kill_and_resume(lab, lab.home / "three", seed=0, early=1, late=2) >= 2


@pytest.mark.slow
def test_killed_at_twenty_seeded_moments(lab: Lab) -> None:
    kills, seed = 0, 1
    while kills < 20:
        kills += kill_and_resume(lab, lab.home / f"seed{seed}", seed, early=3, late=8)
        seed += 1
        assert seed < 6, f"only {kills} of the runs' kills came before their end"


# --------------------------------------------------------------------------------------------------- another layout


def batches(run: Path) -> dict[str, set[str]]:
    """Step -> digests of the batches that were made for it."""
    seen: dict[str, set[str]] = {}
    for line in (run / "batches.txt").read_text().splitlines():
        step, digest = line.split()
        seen.setdefault(step, set()).add(digest)
    return seen


def test_resumed_on_eight_devices_in_another_layout(lab: Lab) -> None:
    """One device until step 22 and a kill, then 8 devices, sharded by four and by two: same batches, same losses."""
    run, reference = lab.home / "layout", lab.home / "reference"
    assert kill_at(lab, run, 22, 0.0)
    resumed_at = steps(run / CHECKPOINTS)[-1]
    assert 10 <= resumed_at < STEPS
    layout = "Layout(data=4, tensor=2, zero=3, replicate_below=1)"
    assert lab.run(run, "watch", layout, devices=8) == 0, lab.log(run)
    assert f"continuing from step {resumed_at}" in lab.log(run)
    want = batches(reference)
    assert {step: want[step] for step in batches(run)} == batches(run)
    assert set(map(str, range(resumed_at, STEPS))) <= batches(run).keys()
    got, exact = losses(run), losses(reference)
    assert got.keys() == exact.keys()
    assert all(got[step] == exact[step] for step in range(1, resumed_at + 1))
    for step in range(resumed_at + 1, STEPS + 1):
        assert abs(float.fromhex(got[step]) / float.fromhex(exact[step]) - 1) < 1e-5, step
    assert any(got[step] != exact[step] for step in got), "another layout sums in another order"
