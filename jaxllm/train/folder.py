"""A directory of checkpoints: which count, which is taken, which go, and whether there is room for one more.

    <directory>/jaxllm_checkpoints.txt   says that the directory is ours, so that leftovers in it may be deleted
    <directory>/<step>/                  one checkpoint, sealed by its manifest.json

Only process 0 calls what writes here.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil

from etils import epath

from jaxllm.train import manifest

_MARK = "jaxllm_checkpoints.txt"
_HEADROOM = 1.1
_log = logging.getLogger(__name__)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, as Orbax wants it; gs:// and the like as they are."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def steps(directory: epath.PathLike) -> list[int]:
    """Steps that have a sealed checkpoint, ascending. Their bytes are not checked."""
    directory = absolute(directory)
    if not directory.is_dir():
        return []
    return sorted(int(d.name) for d in directory.iterdir() if d.name.isdecimal() and manifest.is_sealed(d))


def newest_intact(directory: epath.Path) -> int | None:
    """The newest step whose every byte is as written, None when there are no checkpoints; damaged ones are logged.

    Raises ValueError when all are damaged: starting over is the user's decision.
    """
    check_ours(directory)
    sealed = steps(directory)
    for step in reversed(sealed):
        problem = manifest.damage(directory / str(step))
        if problem is None:
            return step
        _log.warning("the checkpoint of step %d is passed over: %s", step, problem)
    if sealed:
        raise ValueError(
            f"{directory}: all checkpoints are damaged (steps {sealed}); bring a copy back, or delete the directory to "
            "start from step 0"
        )
    return None


def check_ours(directory: epath.Path) -> None:
    """Raise ValueError when the directory holds something else than our checkpoints: it is never touched then."""
    if not directory.exists() or (directory / _MARK).exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file, where checkpoints need a directory; choose another run_dir")
    if names := sorted(entry.name for entry in directory.iterdir()):
        raise ValueError(
            f"{directory} is not a checkpoint directory of jaxllm: it has no {_MARK} but holds {names[0]!r} "
            f"({len(names)} entries in all); choose another run_dir"
        )


def claim(directory: epath.Path) -> None:
    """Make a directory ours, or check that it is, and clean it. Raises ValueError when it is not."""
    check_ours(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _MARK).write_text("Checkpoints of jaxllm: one directory per step, whole once it has a manifest.json\n")
    clean(directory)


def clean(directory: epath.Path) -> None:
    """Delete what killed or failed saves and deletions left: Orbax's temporary directories, unsealed checkpoints."""
    for entry in directory.iterdir():
        unsealed = entry.name.isdecimal() and not manifest.is_sealed(entry)
        if unsealed or re.fullmatch(r"\d+\.orbax-checkpoint-tmp.*", entry.name):
            _log.info("removing %s, left by an interrupted save", entry)
            entry.rmtree()


def prune(directory: epath.Path, step: int, keep: int, best: bool) -> None:
    """Delete all but the newest `keep` up to `step`, and the best. Later ones are of another future: left alone."""
    past = [s for s in steps(directory) if s <= step]
    kept = {*past[-keep:], best_step(directory, past) if best else None}
    for old in past:
        if old not in kept:
            manifest.unseal(directory / str(old))


def best_step(directory: epath.Path, candidates: list[int]) -> int | None:
    """The step of the lowest metric, the later of equals; a manifest that cannot be read does not count."""
    measured = []
    for step in candidates:
        try:
            metric = manifest.read(directory / str(step)).metric
        except ValueError:
            continue
        if metric is not None:
            measured.append((metric, -step))
    return -min(measured)[1] if measured else None


def make_room(directory: epath.Path, step: int, size: int) -> bool:
    """False when the step has an intact checkpoint already; else its place, and what failed saves left, is cleared.

    Raises OSError when a local disk has less than 1.1 x `size` bytes free.
    """
    clean(directory)
    place = directory / str(step)
    if place.exists():
        if manifest.damage(place) is None:
            return False
        manifest.unseal(place)
    free, needed = _free(directory), math.ceil(_HEADROOM * size)
    if free is not None and free < needed:
        raise OSError(failure(directory, step, size, "there is too little room; 1.1 x the state is asked for"))
    return True


def failure(directory: epath.Path, step: int, size: int, reason: str) -> str:
    """The error of a checkpoint that could not be written: where, why, how many bytes, the cure."""
    free = _free(directory)
    room = "free space there is not known" if free is None else f"{_mib(free)} are free there"
    return (
        f"the checkpoint of step {step} could not be written to {directory}: {reason}. The state takes {_mib(size)}, "
        f"{room}. Earlier checkpoints (steps {steps(directory)}) are untouched: make room, lower checkpoint.keep or "
        "choose another disk, and run the same command again"
    )


def _free(directory: epath.Path) -> int | None:
    """Bytes free on a local disk; None for gs:// and the like."""
    return None if "://" in os.fspath(directory) else shutil.disk_usage(directory).free


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
