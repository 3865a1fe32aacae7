"""Seconds of a program's Pallas kernels.

A kernel is compiled once more, alone, so that only its own bundles are written: to have those of the whole step written
doubles the time its compilation takes. What steers it comes from the traced step (`steering.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.plan.bundles import dumped, timing
from jaxllm.plan.program import Kernel
from jaxllm.plan.scalar_unit import Undecided
from jaxllm.plan.steering import Shapes, Steering
from jaxllm.plan.topology import Chip


@dataclass(frozen=True)
class Call:
    """A Pallas call. shapes: of its operands.  scalars: those prefetched, None for unknown ones.  bundles: as text."""

    name: str
    shapes: Shapes
    scalars: tuple[tuple[int, ...] | None, ...]
    bundles: str


def call_of(json_data: dict[str, Any]) -> Call:
    """A call that went through JSON."""
    scalars = tuple(None if values is None else tuple(values) for values in json_data["scalars"])
    return Call(json_data["name"], tuple(map(tuple, json_data["shapes"])), scalars, json_data["bundles"])


def compile_alone(
    found: Sequence[Steering], device: Any, folder: Path, say: Callable[[str], None] = lambda line: None
) -> list[Call]:
    """Every different one of these calls, compiled for one device.

    folder: where libtpu writes bundles, as `bundles.flags` asks it to.
    Raises Undecided when this libtpu writes none.
    """
    mesh, calls = Mesh(np.array([device]), ("device",)), []
    for steering in dict.fromkeys(found):
        say(f"timing {steering.name}")
        calls.append(Call(steering.name, steering.shapes, steering.scalars, _bundles(steering, mesh, folder)))
    return calls


def _bundles(steering: Steering, mesh: Mesh, folder: Path) -> str:
    """The text libtpu writes of one kernel, compiled for operands of the call's shape and dtype."""
    equation, place = steering.equation, NamedSharding(mesh, PartitionSpec())
    operands = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=place) for x in equation.invars]

    def kernel(*operands: Any) -> Any:
        with jax.named_scope(steering.name):  # which names the operation, and so the file of its bundles
            return equation.primitive.bind(*operands, **equation.params)

    before = set(folder.glob("*"))
    with jax.set_mesh(mesh):
        jax.jit(kernel).lower(*operands).compile()
    text = dumped(set(folder.glob("*")) - before, steering.name)
    if text is None:
        raise Undecided(f"this libtpu wrote no bundles of {steering.name}; libtpu 0.0.52 with jax 0.12 does")
    return text


def seconds(kernels: Sequence[Kernel], calls: Sequence[Call], chip: Chip) -> dict[str, float]:
    """Kernel of a compiled program -> seconds of one run, for all of them.

    Raises Undecided, saying why, when one of them cannot be timed.
    """
    return {kernel.name: call_seconds(_call_of(kernel, calls), chip) for kernel in kernels}


def _call_of(kernel: Kernel, calls: Sequence[Call]) -> Call:
    fitting = [call for call in calls if call.name in kernel.name and call.shapes == kernel.shapes]
    if len(fitting) != 1:
        raise Undecided(f"{len(fitting)} different Pallas calls could be {kernel.name} of operands {kernel.shapes}")
    return fitting[0]


def call_seconds(call: Call, chip: Chip) -> float:
    """Seconds of one run. Raises Undecided when its course depends on something unknown."""
    known = {number: values for number, values in enumerate(call.scalars) if values is not None}
    try:
        return timing(call.bundles, known, chip).cycles / chip.clock
    except Undecided as error:
        raise Undecided(f"{call.name}: {error}") from error
