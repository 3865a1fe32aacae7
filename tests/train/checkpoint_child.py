"""One of two processes of 4 devices that save, damage and restore together. Arguments: index, port, directory.

Prints one JSON line: what this process saw.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.records import TrainState
from jaxllm.train import manifest
from jaxllm.train.checkpoint import Checkpointer, restore, steps


def state(step: int) -> TrainState:
    """w[i, j] = step + 100 i + j, over all 8 devices; b is whole on each."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    w = np.float32(step) + 100 * np.arange(16, dtype=np.float32)[:, None] + np.arange(8, dtype=np.float32)

    def place(x: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    b = place(np.full((3,), step, np.float32), PartitionSpec())
    return TrainState(
        place(np.int32(step), PartitionSpec()), {"w": place(w, PartitionSpec("data", "tensor")), "b": b}, (), {}
    )


def same(got: TrainState, want: TrainState) -> bool:
    """Bitwise equality of every shard that lives here."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(
        np.array_equal(a.data, b.data) and a.index == b.index
        for x, y in pairs
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )


def error_of(call: object, *args: object) -> str:
    """'OSError: text' of the error that the call raises."""
    try:
        call(*args)  # type: ignore[operator]
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def full(*_: object, **__: object) -> None:
    """A manifest on a full disk."""
    raise OSError(28, "No space left on device")


def together(name: str, first: object) -> None:
    """Process 0 runs `first`; the other waits for it."""
    if jax.process_index() == 0:
        first()  # type: ignore[operator]
    multihost_utils.sync_global_devices(name)


def flip_newest(directory: Path) -> None:
    """One bit of the largest data file of step 20."""
    path = max((p for p in (directory / "20").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def main(directory: Path) -> dict[str, object]:
    """The whole scenario."""
    seen: dict[str, object] = {"none": restore(directory / "c", state(0)) is None}
    with Checkpointer(directory / "c") as saver:
        saver.save(state(10), meta={"rows": [1, 2]})
        saver.save(state(20))
        usage, sealed = shutil.disk_usage(directory), manifest.seal
        if jax.process_index() == 0:
            shutil.disk_usage = lambda _: usage._replace(free=100)
        seen["no_room"] = error_of(saver.save, state(30))
        shutil.disk_usage = lambda _: usage
        if jax.process_index() == 0:
            manifest.seal = full
        saver.save(state(30))
        seen["no_seal"] = error_of(saver.wait)
        manifest.seal = sealed
    seen["steps"] = steps(directory / "c")
    got = restore(directory / "c", state(0))
    seen["newest"] = got is not None and same(got[0], state(20))
    together("flip", lambda: flip_newest(directory / "c"))
    got = restore(directory / "c", state(0))
    seen["previous"] = got is not None and same(got[0], state(10)) and got[1]
    together("foreign", lambda: (directory / "photos" / "x").mkdir(parents=True))
    seen["foreign"] = error_of(Checkpointer, directory / "photos")
    return seen


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
    assert jnp.zeros(()).dtype == jnp.float32 and len(jax.devices()) == 8
    print(json.dumps(main(Path(sys.argv[3]))), flush=True)
    jax.distributed.shutdown()
