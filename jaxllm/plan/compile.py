"""Compile a training step for a TPU slice in a child process, watched, timed and with errors that say what to do."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxllm import serial
from jaxllm.experiment import Experiment
from jaxllm.nn.pipeline import require_stages
from jaxllm.plan.bundles import flags
from jaxllm.plan.info import declared
from jaxllm.plan.kernels import Call, call_of
from jaxllm.plan.topology import Slice, nearest
from jaxllm.sharding import Layout, require_length, row_unit, storage

TIME_OUT = 1800.0  # seconds; an 8B model on 256 chips takes about 120 on two cores

Progress = Callable[[str, float], None]  # (what is being done, seconds so far)


@dataclass(frozen=True)
class Compiled:
    """What the compiler left. Texts are of one device's program.

    scheduled: the final program with cycle estimates; None when it does not fit.
    optimised: the program that the buffer assignment and the live ranges speak of.
    calls: the Pallas calls with their bundles; or, as text, why they cannot be timed.
    code: bytes of machine code.  limit: bytes of HBM the compiler had, known when the program does not fit.
    seconds: of wall clock; cpu_seconds: of all threads, of the compilation alone.
    """

    scheduled: str | None
    optimised: str
    assignment: str
    ranges: str
    calls: tuple[Call, ...] | str
    code: int
    limit: int | None
    seconds: float
    cpu_seconds: float
    versions: dict[str, str]


# ----------------------------------------------------------------------------------------------------- before work


def prepare(exp: Experiment, target: Slice) -> Experiment:
    """The experiment as it would run on the slice: "auto" attention is the chip's kernel, no layout is FSDP over all.

    Raises ValueError when the layout does not fit the slice or the model, or the batch does not divide.
    """
    layout = Layout() if exp.runtime.layout is None else exp.runtime.layout
    sizes = layout.sizes(target.devices)
    for param in declared(exp.model).values():
        storage(param, layout, sizes)
    require_length(exp.data.context, layout, sizes)
    require_stages(exp.model.stacks, layout)
    unit = row_unit(layout, sizes) * exp.accumulate
    if exp.batch_size % unit:
        raise ValueError(
            f"plan: batch_size={exp.batch_size} must be a multiple of accumulate * replica * data * expert * stage and "
            f"of accumulate * replica * data * expert * microbatches, = {unit} on {target.name}; the nearest is "
            f"{max(round(exp.batch_size / unit), 1) * unit}"
        )
    kernel = "gpu" if target.gpu else "tpu"
    attention = kernel if exp.runtime.attention == "auto" else exp.runtime.attention
    return replace(exp, runtime=replace(exp.runtime, attention=attention, layout=layout))


def require_compiler(target: Slice) -> None:
    """Raise ValueError with the cure when the compiler for these chips is not installed."""
    linux = sys.platform == "linux"
    if target.gpu and not (linux and all(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_plugins")))):
        cure = " ".join(f"{name}=={importlib.metadata.version('jax')}" for name in _GPU_COMPILER)
        raise ValueError(
            "plan: XLA's compiler for NVIDIA GPUs is not installed; it needs no GPU, no driver and no other part of "
            f"CUDA, only Linux: pip install {cure}"
        )
    if not target.gpu and not (linux and importlib.util.find_spec("libtpu")):
        raise ValueError(
            'plan: the TPU compiler (libtpu) is not installed; it needs no TPU, only Linux: pip install "jaxllm[tpu]"'
        )


_GPU_COMPILER = "jax-cuda12-plugin", "jax-cuda12-pjrt"


def versions(target: Slice) -> dict[str, str]:
    """Of what compiles."""
    return {name: importlib.metadata.version(name) for name in ("jax", _GPU_COMPILER[0] if target.gpu else "libtpu")}


# ------------------------------------------------------------------------------------------------------ compiling


def compile_step(
    exp: Experiment, target: Slice, *, time_out: float = TIME_OUT, progress: Progress | None = None
) -> Compiled:
    """Compile the real train step of a prepared experiment for the slice.

    Raises ValueError for a slice the compiler does not know, TimeoutError after `time_out` seconds, RuntimeError when
    the compiler fails in another way. A program that does not fit is no error: `scheduled` is None.
    """
    require_compiler(target)
    with tempfile.TemporaryDirectory(prefix="jaxllm-plan-") as name:
        job = Path(name)
        (job / "job.json").write_text(json.dumps({"experiment": serial.dumps(exp), "topology": target.name}))
        watch = partial(_watch, job, time.monotonic(), time_out, progress)
        dump = f"--xla_dump_to={job / 'dump'} --xla_dump_hlo_as_text"
        compiled = _collect(job, watch("jaxllm.plan.child", environment(xla_flags=dump)), target)
        if compiled.scheduled is None or "tpu_custom_call" not in compiled.scheduled:
            return compiled
        watch("jaxllm.plan.kernel_child", environment(libtpu_flags=flags(job / "bundles")))
        return replace(compiled, calls=_calls(job))


def environment(xla_flags: str = "", libtpu_flags: str = "") -> dict[str, str]:
    """A child's environment: a compiler that looks for no TPU, GPU or driver, and these flags beside the user's own."""
    root = str(Path(__file__).resolve().parents[2])
    ours = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip(),
        "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {libtpu_flags}".strip(),
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))),
    }
    return os.environ | ours


def _watch(
    job: Path, start: float, time_out: float, progress: Progress | None, module: str, env: Mapping[str, str]
) -> int:
    """Run a child to its end, telling how it goes; its exit code."""
    with _child(job, module, env) as process:
        while process.poll() is None:
            elapsed = time.monotonic() - start
            if elapsed > time_out:
                raise TimeoutError(
                    f"plan: {_phase(job)} took longer than {time_out:.0f} s; allow more with --timeout SECONDS, "
                    "or plan with fewer layers first (model.stacks.0.repeats=2)"
                )
            if progress is not None:
                progress(_phase(job), elapsed)
            time.sleep(0.2)
    return process.returncode


@contextmanager
def _child(job: Path, module: str, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The compiling process; ended with the block, whatever ends it."""
    with (job / "log").open("wb") as log:
        command = [sys.executable, "-m", module, str(job)]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _calls(job: Path) -> tuple[Call, ...] | str:
    """What the second child left: the Pallas calls, or why they cannot be timed."""
    path = job / "calls.json"
    if not path.exists():
        last = (job / "log").read_text(errors="replace").strip().splitlines()[-1:]
        return f"compiling kernels alone failed: {''.join(last)[:300]}"
    found = json.loads(path.read_text())
    return found["error"] if isinstance(found, dict) else tuple(map(call_of, found))


def _phase(job: Path) -> str:
    path = job / "phase"
    return path.read_text() if path.exists() else "starting the compiler"


def _collect(job: Path, code: int, target: Slice) -> Compiled:
    path = job / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "error" in result or not result:
        limit = _memory_limit(result.get("error", ""))
        if limit is None:
            raise _failure(job, code, result.get("error"), target)
        result = {"memory": {}, "compile_seconds": 0.0, "cpu_seconds": 0.0, "limit": limit}
    scheduled = gzip.decompress((job / "hlo.txt.gz").read_bytes()).decode() if "limit" not in result else None
    return Compiled(
        scheduled=scheduled,
        optimised=_dumped(job, "after_optimizations"),
        assignment=_dumped(job, "after_optimizations-buffer-assignment"),
        ranges=_dumped(job, "after_optimizations-live-range"),
        calls=(),
        code=result["memory"].get("generated_code_size", 0),
        limit=result.get("limit"),
        seconds=result["compile_seconds"],
        cpu_seconds=result["cpu_seconds"],
        versions=versions(target),
    )


def _dumped(job: Path, what: str) -> str:
    """A text the compiler dumped for the step. (Small programs compiled for the CPU on the way lie beside it.)"""
    found = [p for p in (job / "dump").glob(f"*jit_step*{what}.txt") if ".cpu_" not in p.name]
    if not found:
        raise RuntimeError(
            f"plan: the compiler wrote no {what!r} text; known to work: jax 0.10.2 to 0.12 with its own libtpu or "
            "CUDA plugin"
        )
    return max(found, key=lambda p: p.stat().st_size).read_text()


def _memory_limit(error: str) -> int | None:
    """Bytes of HBM available, from the compiler's "Ran out of memory"; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in error:
        return None
    found = re.search(r"available HBM \(([\d.]+)([GM])\)", error) or re.search(r"of ([\d.]+)([GM]) hbm", error)
    return int(float(found[1]) * 2 ** {"G": 30, "M": 20}[found[2]]) if found else None


def _failure(job: Path, code: int, error: str | None, target: Slice) -> Exception:
    if error is None and code < 0:
        cause = "the machine's own memory ran out" if -code == signal.SIGKILL else "the compiler crashed"
        return RuntimeError(
            f"plan: the compiler was ended by {signal.Signals(-code).name} while {_phase(job)}; most likely {cause}. "
            "Close other programs, or plan with fewer layers (model.stacks.0.repeats=2)"
        )
    log = (job / "log").read_text(errors="replace").strip()
    text = error or "\n".join(log.splitlines()[-5:])
    if "topology" in text.lower() and _phase(job) == "naming the chips":
        return ValueError(
            f"plan: the compiler does not know topology {target.name!r}; did you mean {nearest(target.name)!r}? "
            f"({text[:200]})"
        )
    return RuntimeError(f"plan: the compiler failed while {_phase(job)}: {text[:2000]}")
