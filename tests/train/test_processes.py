"""The same run in 2 real processes x 4 devices (jax.distributed, gloo) and in one process x 8 devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.train.checkpoint import load_params, steps
from jaxllm.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = """
from pathlib import Path
from tiny import experiment
from jaxllm.experiment import Checkpointing
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

def config():
    layout = Layout({layout}, replicate_below=0)
    return experiment(
        Path({folder!r}), runtime=Runtime(layout=layout), run_dir={run!r}, checkpoint=Checkpointing(every=4), samples=()
    )
"""


def start(config, devices, steps, *extra):
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        str(config),
        f"steps={steps}",
        "optimizer.decay_steps=12",
        *extra,
    ]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(config, processes, steps):
    if processes == 1:
        children = [start(config, 8, steps)]
    else:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        where = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
        children = [start(config, 4, steps, *where, str(i)) for i in range(2)]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [c.returncode for c in children] == [0] * len(children), "\n".join(outputs)
    return outputs


def losses(folder):
    return {r["step"]: r["train/loss"] for r in read_metrics(folder) if "train/loss" in r}


def test_two_processes_train_save_and_restore_as_one(tmp_path):
    curves = {}
    for processes in (1, 2):
        home = tmp_path / str(processes)
        home.mkdir()
        config = home / "config.py"
        config.write_text(CONFIG.format(folder=str(home), run=str(home / "run"), layout="zero=3, tensor=2"))
        run(config, processes, 6)
        outputs = run(config, processes, 12)
        assert "continuing from step 6" in outputs[0]
        if processes == 2:
            assert "step" not in outputs[1].replace("jaxllm", ""), "only the first process reports"
        assert steps(home / "run" / "checkpoints")[-1] == 12
        curves[processes] = losses(home / "run")
    assert curves[1].keys() == curves[2].keys()
    np.testing.assert_allclose(list(curves[2].values()), list(curves[1].values()), rtol=1e-5)
    one, two = (load_params(tmp_path / str(n) / "run")[1] for n in (1, 2))
    np.testing.assert_allclose(one["embed"]["tokens"], two["embed"]["tokens"], atol=1e-5)
    assert jaxllm.load(tmp_path / "2" / "run").spec.name == "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero=3, sequence=8", "zero=1, stage=2"])
def test_a_ring_spans_processes(tmp_path, layout):
    """Every row lies on all 8 devices, so keys and values, and their gradients, cross from process to process.

    Or every layer lies in one process, so that micro-batches do.
    """
    curves = {}
    for processes in (1, 2):
        home = tmp_path / str(processes)
        home.mkdir()
        config = home / "config.py"
        config.write_text(CONFIG.format(folder=str(home), run=str(home / "run"), layout=layout))
        run(config, processes, 10)
        curves[processes] = losses(home / "run")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.py").write_text(CONFIG.format(folder=str(alone), run=str(alone / "run"), layout="zero=0"))
    run(alone / "config.py", 1, 10)
    assert len(curves[1]) >= 5
    for got in curves.values():
        np.testing.assert_allclose(list(got.values()), list(losses(alone / "run").values()), rtol=1e-5)
