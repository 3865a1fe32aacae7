"""Checkpoints: Orbax writes the arrays in the background, `manifest` seals them, nothing unsealed ever counts.

    with Checkpointer(directory) as saver:
        saver.save(state, metric=loss, meta={"tokens": n})    # returns once the state is copied off the devices
    state, meta = restore(directory, like)                     # the newest intact one, onto the shardings of `like`

A state is stored as nested dicts keyed by its paths (`params/stacks/0/0/attn/q/kernel`), whatever tuples and records it
was made of: any Orbax reader can open it, and `like` alone decides what comes back. Arrays are not compressed: weights
shrink by a tenth at best, and so the space that a save needs is known beforehand.

With several processes each writes its shards to the one directory they share; process 0 seals, deletes, and decides
which checkpoint is restored. All of them must call `save`, `wait`, `close` and `restore` in the same order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.params import path_name
from jaxllm.records import Params, TrainState
from jaxllm.train import folder, manifest
from jaxllm.train.folder import steps
from jaxllm.train.processes import decided_by_first

__all__ = ["CHECKPOINTS", "Checkpointer", "load_params", "restore", "steps"]

CHECKPOINTS = "checkpoints"
"""The directory of a run directory that holds its checkpoints."""

_log = logging.getLogger(__name__)
_absl = logging.getLogger("absl")

# ----------------------------------------------------------------------------------------------------------- saving


class Checkpointer:
    """Saves in the background, one at a time. The only state: the save in flight.

    directory: local or gs://; made if needed, cleaned of what killed saves left.  keep: newest checkpoints that stay,
    besides the one of the lowest metric when `best`.  Raises ValueError when the directory holds something else.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, best: bool = True) -> None:
        if keep < 1:
            raise ValueError(
                f"checkpoint.keep={keep} must be at least 1; to save only at the end set checkpoint.every=none"
            )
        self._directory = folder.absolute(directory)
        self._keep, self._best = keep, best
        decided_by_first(partial(folder.claim, self._directory))
        self._orbax = ocp.AsyncCheckpointer(_handler())
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        _absl.addFilter(_not_orbax)

    def save(self, state: TrainState, metric: float | None = None, meta: dict[str, Any] | None = None) -> None:
        """Start to save; returns after the copy to host memory, so that `state` may be donated at once.

        Waits for the save before.  A step that has an intact checkpoint is left as it is.
        metric: lower is better; not-a-number counts as None.  meta: JSON, given back by `restore`.
        Raises OSError when the disk is too small, or when the save before failed; earlier checkpoints stay intact.
        """
        self.wait()
        arrays = _flatten(state)
        step, size = int(jax.device_get(state.step)), sum(x.nbytes for x in arrays.values())
        if not decided_by_first(partial(folder.make_room, self._directory, step, size)):
            return
        metric = metric if metric is not None and math.isfinite(metric) else None
        seal = partial(manifest.seal, step=step, metric=metric, meta=meta or {}, arrays=_shapes(arrays))
        try:
            with jax.transfer_guard("allow"):
                self._orbax.save(self._directory / str(step), args=ocp.args.PyTreeSave(_nest(arrays)))
        except Exception as error:
            raise self._failed(step, size, error) from error
        self._pending = self._worker.submit(self._finish, step, size, seal)

    def wait(self) -> None:
        """Until the save in flight is sealed and old ones are gone. Raises OSError when it failed, once."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if jax.process_index() != 0:
            pending.result()
        decided_by_first(pending.result)

    def close(self) -> None:
        """`wait`, then give the threads back."""
        try:
            self.wait()
        finally:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return self.close()
        if self._pending is not None and (failed := self._pending.exception()) is not None:
            _log.error("%s", failed)  # beside the error under way, which is not hidden
        self._stop()

    def _stop(self) -> None:
        self._worker.shutdown()
        self._orbax.close()
        _absl.removeFilter(_not_orbax)

    def _finish(self, step: int, size: int, seal: Callable[[epath.Path], None]) -> None:
        """On the worker thread: Orbax's end, the seal, the deletion of what is no longer kept."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                seal(self._directory / str(step))
                folder.prune(self._directory, step, self._keep, self._best)
        except Exception as error:
            raise self._failed(step, size, error) from error

    def _failed(self, step: int, size: int, error: Exception) -> OSError:
        """Remove what the failed save left, and say what happened."""
        if jax.process_index() == 0:
            with suppress(
                OSError
            ):  # its other writes may still be ending; the next save and the next start clean again
                folder.clean(self._directory)
        reason = str(error).partition("\n")[0] or type(error).__name__
        return OSError(folder.failure(self._directory, step, size, reason))


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a failed save three times, with tracebacks, before it raises it; once is enough."""
    return "orbax" not in record.pathname


# -------------------------------------------------------------------------------------------------------- restoring


def restore(directory: epath.PathLike, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest intact checkpoint and its meta; None when there is none yet.

    like: a TrainState of arrays or `jax.ShapeDtypeStruct`, whose shardings (default: the first device) say where the
    arrays go, on any number of devices.  A damaged checkpoint is named in a warning and the one before it is taken.
    Raises ValueError when all are damaged, when the directory is not ours, or when paths, shapes or dtypes differ.
    """
    directory = folder.absolute(directory)
    step = decided_by_first(partial(folder.newest_intact, directory))
    if step is None:
        return None
    entry = manifest.read(directory / str(step))
    wanted = _flatten(like)
    _check_same(directory / str(step), entry.arrays, _shapes(wanted))
    arrays = _read(directory / str(step), {path: _target(leaf) for path, leaf in wanted.items()})
    return jax.tree.unflatten(jax.tree.structure(like), arrays.values()), entry.meta


def load_params(run_dir: epath.PathLike, step: int | None = None) -> tuple[int, Params]:
    """(step, parameters as nested dicts of numpy arrays) of a run, for inference; nothing else is read.

    step: None for the newest intact checkpoint.  Raises ValueError when there is none, or when `step` is damaged.
    """
    directory = folder.absolute(run_dir) / CHECKPOINTS
    if not directory.exists():
        raise ValueError(
            f"{run_dir} is not a run directory: it has no {CHECKPOINTS}/; give the run_dir of a training run"
        )
    if step is None:
        step = folder.newest_intact(directory)
    elif step not in steps(directory):
        raise ValueError(f"{directory} has no checkpoint of step {step}; it has those of {steps(directory)}")
    elif (problem := manifest.damage(directory / str(step))) is not None:
        raise ValueError(f"{problem}; take another step of {steps(directory)}")
    if step is None:
        raise ValueError(f"{directory} has no checkpoint yet; train until the first one is saved")
    arrays = manifest.read(directory / str(step)).arrays
    targets = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in arrays if path.startswith("params/")}
    return step, _nest(_read(directory / str(step), targets))["params"]


def _read(directory: epath.Path, targets: dict[str, ocp.RestoreArgs]) -> dict[str, Any]:
    """Path -> array, of these paths only, in their order."""
    item = _nest(dict.fromkeys(targets, 0))
    args = ocp.args.PyTreeRestore(item=item, restore_args=_nest(targets), partial_restore=True)
    with jax.transfer_guard("allow"), ocp.Checkpointer(_handler()) as reader:
        found = _flatten(reader.restore(directory, args=args))
    return {path: found[path] for path in targets}


def _target(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _check_same(directory: epath.Path, saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    """Raise ValueError naming the first path at which checkpoint and model differ."""
    for path in sorted(saved.keys() | wanted.keys()):
        if saved.get(path) != wanted.get(path):
            raise ValueError(
                f"{directory} does not fit this model and optimiser: expected {path} to be "
                f"{_describe(wanted.get(path))}, found {_describe(saved.get(path))}; use the config it was trained "
                "with, or another run_dir"
            )


def _describe(array: list[Any] | None) -> str:
    return "absent" if array is None else f"{array[1]}{array[0]}"


# ------------------------------------------------------------------------------------------------------------ trees


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _flatten(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in jax's order. Raises ValueError when two leaves share a path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {path_name(path): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError(f"checkpoint: {len(leaves)} arrays have {len(flat)} different paths; no key may contain '/'")
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{'a/b': x} as {'a': {'b': x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _shapes(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    return {path: [list(x.shape), str(x.dtype)] for path, x in arrays.items()}
