"""Compile one training step for chips that are not there, in a process of its own: python -m jaxllm.plan.child DIR

The compiler reads its environment once, when it is loaded, and can take gigabytes or die; the parent
(`jaxllm.plan.compile`) sets that environment, watches this process, and reads from DIR what it leaves:

    job.json      in: {"experiment": tagged JSON, "topology": name}
    phase         out: what is being done now
    hlo.txt.gz    out: the scheduled program of one device
    result.json   out: memory figures and seconds, or {"error": text}
    dump/         out: the compiler's buffer assignment, written even for a program that does not fit
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxllm.experiment import Experiment, saved
from jaxllm.mesh import make_mesh
from jaxllm.objectives.lm import lm_loss
from jaxllm.plan.topology import Slice, parse
from jaxllm.sharding import Layout
from jaxllm.train.optimizer import make_optimizer, master_params
from jaxllm.train.scaling import scaling_of
from jaxllm.train.step import abstract_batch, abstract_state, make_step
from jaxllm.transformer import transformer_params

_FIGURES = ("argument_size", "output_size", "alias_size", "temp_size", "generated_code_size")


def trace(exp: Experiment, mesh: Mesh) -> Any:
    """The real train step of `exp`, traced for the mesh, under which it must be lowered."""
    tree, scaling = master_params(exp.optimizer, transformer_params(exp.model)), scaling_of(exp)
    optimizer = make_optimizer(exp.optimizer, tree)
    channels = max(len(exp.data.sources), 1)

    def loss(params: Any, batch: Any, key: Any) -> Any:
        return lm_loss(params, exp.model, batch, exp.runtime, key, channels=channels, balance=exp.balance)

    state = abstract_state(tree, optimizer, exp.runtime, mesh, scaling)
    batch = abstract_batch(exp.batch_size, exp.data.context, exp.runtime, mesh)
    step = make_step(loss, optimizer, tree, exp.runtime, accumulate=exp.accumulate, seed=exp.seed, scaling=scaling)
    with jax.set_mesh(mesh):
        return step.trace(state, batch)  # type: ignore[attr-defined]


def read_job(job: Path) -> tuple[Experiment, Mesh]:
    """What is to be compiled, and for which chips."""
    wanted = json.loads((job / "job.json").read_text())
    exp = saved(wanted["experiment"])
    write(job / "phase", "naming the chips")
    return exp, make_mesh(exp.runtime.layout or Layout(), chips(parse(wanted["topology"])))


def chips(target: Slice) -> list[Any]:
    """The devices of a slice that is not there."""
    if target.gpu:
        told: dict[str, Any] = {"target_config": target.chip.description, "topology": f"1x1x{target.devices}"}
        return topologies.get_topology_desc(platform="cuda", **told).devices
    return topologies.get_topology_desc(platform="tpu", topology_name=target.name).devices


def compile_job(job: Path) -> dict[str, Any]:
    """What result.json holds for the job in this directory."""
    exp, mesh = read_job(job)
    write(job / "phase", "tracing the step")
    traced = trace(exp, mesh)
    with jax.set_mesh(mesh):
        lowered = traced.lower()
    write(job / "phase", "compiling")
    start, cpu = time.monotonic(), time.process_time()
    compiled = lowered.compile()
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
    write(job / "phase", "reading the program")
    with gzip.open(job / "hlo.txt.gz", "wt", compresslevel=3) as file:
        file.write(compiled.as_text())
    memory = compiled.memory_analysis()
    figures = {name: int(getattr(memory, f"{name}_in_bytes", 0)) for name in _FIGURES}
    return {"memory": figures, "compile_seconds": seconds, "cpu_seconds": cpu_seconds}


def write(path: Path, text: str) -> None:
    """Write to a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def main(job: Path) -> int:
    """Exit code 0, or 1 with the error in result.json."""
    try:
        result = compile_job(job)
    except Exception as error:
        write(job / "result.json", json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    write(job / "result.json", json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
