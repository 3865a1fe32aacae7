"""The training command, killed by itself at one phase of a save. Arguments: phase, then those of train.py.

The command runs unchanged but for one function, which is replaced by one that sends SIGKILL to its own process.
"watch" kills nothing: it writes the digest of each step's batch to <run_dir>/batches.txt. "set_up" runs only what comes
before the first step, killed at each rename.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.experiment import load_config
from jaxllm.train import folder, loop, manifest
from jaxllm.train.dataset import prepare

TRAIN = Path(__file__).parents[2] / "train.py"
PATH = type(epath.Path("/"))
PHASES = ("before", "begun", "written", "finalised", "unnamed", "sealed", "half_deleted")


def die(*_: object, **__: object) -> NoReturn:
    """SIGKILL: no handler, no `finally`, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def save_and_die(self: Any, *args: object, **kwargs: object) -> None:
    """Dies as soon as the background write has begun."""
    save(self, *args, **kwargs)
    die()


def replace_or_die(self: Any, target: Any) -> Any:
    """Dies when the manifest is about to get its name."""
    mine = Path(target).name == manifest.NAME and Path(target).parent.name.isdecimal()
    return die() if mine else replace(self, target)


def delete_half_and_die(self: Any, *args: object, **kwargs: object) -> None:
    """Dies in the middle of the deletion of a checkpoint."""
    if not self.name.isdecimal():
        return rmtree(self, *args, **kwargs)
    files = sorted(path for path in Path(self).rglob("*") if path.is_file())
    for path in files[: len(files) // 2]:
        path.unlink()
    die()


def watched_batch(mixture: Any, step: int, sharding: Any) -> Any:
    """A batch, its digest written down."""
    batch = train_batch(mixture, step, sharding)
    digest = hashlib.sha256(b"".join(np.asarray(jax.device_get(x)).tobytes() for x in jax.tree.leaves(batch)))
    run_dir = next(a.removeprefix("run_dir=") for a in sys.argv if a.startswith("run_dir="))
    with open(f"{run_dir}/batches.txt", "a") as file:
        file.write(f"{step} {digest.hexdigest()}\n")
    return batch


save, replace, rmtree, train_batch = ocp.AsyncCheckpointer.save, PATH.replace, PATH.rmtree, loop.train_batch


def patch(phase: str) -> None:
    """Arm one phase; their order is that of a save."""
    match phase:
        case "before":
            ocp.AsyncCheckpointer.save = die
        case "begun":
            ocp.AsyncCheckpointer.save = save_and_die
        case "written":  # arrays are on disk, Orbax has not yet finished its directory
            ocp.PyTreeCheckpointHandler.finalize = die
        case "finalised":
            manifest.seal = die
        case "unnamed":  # the manifest is written under its temporary name
            PATH.replace = replace_or_die
        case "sealed":  # before old checkpoints are deleted
            folder.prune = die
        case "half_deleted":
            PATH.rmtree = delete_half_and_die
        case "watch":
            loop.train_batch = watched_batch
        case other:
            raise ValueError(f"phase {other!r} must be one of {PHASES}")


def set_up_until(rename: int, arguments: list[str]) -> NoReturn:
    """What the command does before its first step; dies instead of its rename of that number, from 1."""
    done = itertools.count(1)

    def rename_or_die(self: Any, target: Any) -> Any:
        return die() if next(done) == rename else replace(self, target)

    PATH.replace = PATH.rename = rename_or_die
    exp = load_config(arguments[0], arguments[1:])
    loop.claim_run_dir(exp)
    prepare(exp)
    os._exit(0)


def kill_set_up(arguments: list[str]) -> int:
    """Kill the first start at its first rename, the second at its second ..., until one ends. Returns the kills."""
    for kills in itertools.count():
        pid = os.fork()  # jax has no devices yet: a start takes a tenth of a second
        if pid == 0:
            try:
                set_up_until(kills + 1, arguments)
            finally:
                traceback.print_exc()
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != -signal.SIGKILL:
            assert status == 0, f"start {kills + 1} failed"
            return kills
    raise AssertionError("unreachable")


if __name__ == "__main__":
    if sys.argv[1] == "set_up":
        print("kills:", kill_set_up(sys.argv[2:]), flush=True)
        sys.exit()
    patch(sys.argv[1])
    sys.argv = [str(TRAIN), *sys.argv[2:]]
    runpy.run_path(str(TRAIN), run_name="__main__")
