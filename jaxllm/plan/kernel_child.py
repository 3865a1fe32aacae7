"""Compile the Pallas kernels of a training step one by one, for their bundles: python -m jaxllm.plan.kernel_child DIR

A process of its own, since libtpu reads only once whether it is to write bundles (`plan.compile` sets that). It reads
DIR/job.json as `plan.child` does, and leaves

    calls.json    [{"name", "shapes", "scalars", "bundles"}], or {"error": why kernels cannot be timed}
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.experiment import Experiment
from jaxllm.plan.child import read_job, trace, write
from jaxllm.plan.kernels import compile_alone
from jaxllm.plan.scalar_unit import Undecided
from jaxllm.plan.steering import Steering, steering
from jaxllm.records import Batch


def steer(exp: Experiment, traced: Any) -> list[Steering]:
    """What steers the step's Pallas calls when every row is one document, so that no packing lets blocks be skipped."""
    shape = exp.batch_size, exp.data.context
    known = {
        "segment_BT": np.ones(shape, np.int32),
        "position_BT": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }
    fields = [field.name for field in dataclasses.fields(Batch)]
    state = len(jax.tree.leaves(traced.in_avals)) - len(fields)
    return steering(traced.jaxpr, [None] * state + [known.get(name) for name in fields])


def main(job: Path) -> int:
    """Exit code 0, also when kernels cannot be timed."""
    exp, mesh = read_job(job)
    found = steer(exp, trace(exp, mesh))
    try:
        calls = compile_alone(found, mesh.devices.flat[0], job / "bundles", lambda line: write(job / "phase", line))
        write(job / "calls.json", json.dumps([dataclasses.asdict(call) for call in calls]))
    except Undecided as error:
        write(job / "calls.json", json.dumps({"error": str(error)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
