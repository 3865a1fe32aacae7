"""The mesh of a layout, laid along the torus that TPU chips form; slices lie along `replica`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from jaxllm.sharding import MESH_AXES, Layout


def torus_of(devices: Sequence[Any]) -> tuple[int, ...]:
    """The sides of the box of chips that TPU devices fill; () for other devices and for chips that fill none."""
    places: list[Any] = [d.coords for d in devices if hasattr(d, "coords")]
    if not places or len(places) < len(devices):
        return ()
    sides = tuple(1 + max(p[i] for p in places) - min(p[i] for p in places) for i in range(len(places[0])))
    return sides if math.prod(sides) == len(devices) else ()


def make_mesh(layout: Layout, devices: Any = None, torus: Sequence[int] | None = None) -> Mesh:
    """The mesh of a layout over `devices` (default: all of jax's). torus: default, what the devices of a slice say.

    Slices, between which links are slow, lie along `replica`, the major axis. Raises ValueError when they cannot.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = slices_of(devices)
    sizes = layout.sizes(len(devices), torus_of(slices[0]) if torus is None else torus)
    if sizes["replica"] % len(slices):
        raise ValueError(
            f"layout: replica={layout.replica} must be a multiple of the slices of the devices, {len(slices)}, so "
            f"that only sums of gradients leave a slice; set layout.replica={len(slices)}"
        )
    shape = tuple(sizes.values())
    own = shape[0] // len(slices), *shape[1:]
    # by default jax splits a side of the torus between two axes (tensor=2 of a side of 4) on v5e alone
    places = [create_device_mesh(own, chips, allow_split_physical_axes=True) for chips in slices]
    return Mesh(np.concatenate(places), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def slices_of(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each TPU slice; all together where devices are not of slices."""
    found: dict[int, list[Any]] = {}
    for d in devices:
        found.setdefault(getattr(d, "slice_index", 0) if d.platform == "tpu" else 0, []).append(d)
    return [found[i] for i in sorted(found)]
