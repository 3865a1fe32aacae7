"""The real TPU compiler on a machine without a TPU, in a child process.

    reports = compile_all([Job(step, (params, batch), "v5e:2x2")])
    reports[0].check()

Functions and arguments travel by pickle: a function must be importable (or a `functools.partial` of one), arguments are
pytrees of `jax.ShapeDtypeStruct`. The child runs under a mesh of the topology set as context, as entry points do.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Job(NamedTuple):
    """One compilation. mesh: axis name -> size, over the topology's first devices.  specs: PartitionSpecs of `args`.

    specs: a pytree prefix of `args`; None replicates. specs and mesh default to one device.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    topology: str
    mesh: dict[str, int] = {"device": 1}  # noqa: RUF012  # never written
    specs: Any = None


class Report(NamedTuple):
    """What came of a job. Bytes are per device; text is the optimised HLO. error: None when it compiled."""

    seconds: float
    text: str
    argument_bytes: int
    temp_bytes: int
    error: str | None

    def check(self) -> Report:
        """Itself; raises AssertionError with the compiler's message when the job did not compile."""
        assert self.error is None, self.error
        return self


def compile_for(fn: Callable[..., Any], args: tuple[Any, ...], topology: str, **job: Any) -> Report:
    """One job in a child of its own; raises AssertionError when it does not compile."""
    return compile_all([Job(fn, args, topology, **job)])[0].check()


def compile_all(jobs: Sequence[Job], timeout: float = 900) -> list[Report]:
    """Compiles `jobs` one after the other in one child process. Raises RuntimeError when the child itself dies."""
    with tempfile.TemporaryDirectory() as folder:
        inbox, outbox = Path(folder, "jobs"), Path(folder, "reports")
        inbox.write_bytes(pickle.dumps(list(jobs)))
        env = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        env.pop("XLA_FLAGS", None)
        child = subprocess.run(
            [sys.executable, __file__, str(inbox), str(outbox)],
            env=env,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if not outbox.exists():
            raise RuntimeError(f"the compiling child ended with {child.returncode}: {child.stderr[-3000:]}")
        return [Report(*fields) for fields in pickle.loads(outbox.read_bytes())]


def _compile(job: Job) -> Report:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    start = time.time()
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=job.topology).devices
        shape = tuple(job.mesh.values())
        mesh = Mesh(np.array(devices[: int(np.prod(shape))]).reshape(shape), tuple(job.mesh))
        specs = PartitionSpec() if job.specs is None else job.specs
        is_spec = lambda x: isinstance(x, PartitionSpec)
        place = lambda spec, part: jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), part
        )
        args = jax.tree.map(place, specs, job.args, is_leaf=is_spec)
        with jax.set_mesh(mesh):
            compiled = jax.jit(job.fn).lower(*args).compile()
        memory = compiled.memory_analysis()
        sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        return Report(time.time() - start, compiled.as_text(), *sizes, None)
    except Exception as error:
        return Report(time.time() - start, "", 0, 0, f"{job.topology}: {type(error).__name__}: {str(error)[:3000]}")


if __name__ == "__main__":
    jobs = pickle.loads(Path(sys.argv[1]).read_bytes())
    reports = [tuple(_compile(Job(*job))) for job in jobs]
    Path(sys.argv[2]).write_bytes(pickle.dumps(reports))
