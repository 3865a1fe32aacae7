"""Which mesh axes a collective runs over, from its replica groups.

The compiler writes groups as lists of devices, as a reshaped and transposed count, or as axes of a mesh (ours, or
one of its own with the same devices in the same order). Each is turned into the devices of the first group, and
their coordinates on our mesh say which axes vary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from jaxllm.plan.hlo import Op


def axes_of(op: Op, sizes: Mapping[str, int]) -> str:
    """Names of the mesh axes that the collective spans, joined by "+"; "?" when its groups cannot be read.

    sizes: axis -> size, major first: device d has the coordinates of d in row-major order.
    """
    devices = first_group(op.attrs)
    if not devices or max(devices) >= math.prod(sizes.values()):
        return "?"
    coordinates = np.array(np.unravel_index(devices, tuple(sizes.values())))
    varying = [name for name, row in zip(sizes, coordinates, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(varying) or "none"


def first_group(attrs: str) -> list[int]:
    """Devices of the first group (or pair) in a collective's attributes; empty when written in an unknown way.

    "[4,2]<=[2,4]T(1,0)" is a grid of shape [2, 4], transposed, as 4 groups of 2.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attrs)
    if listed:
        return [int(d) for d in listed[1].split(",") if d]
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attrs)
    if counted:
        shape, source = _ints(counted[1]), _ints(counted[2])
        order = _ints(counted[3]) if counted[3] else list(range(len(source)))
        return np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape)[0].ravel().tolist()
    order = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]" + order + r" \{([^}]*)\}", attrs)
    return _on_mesh(*named.groups()) if named else []


def _on_mesh(mesh: str, source: str | None, turned: str | None, axes: str) -> list[int]:
    """'a'=4,'b'=8 and 'b' -> devices 0..7. A part of an axis is written 'b':(2)4: 4 of its positions, after 2.

    source, turned: the mesh's devices are 0, 1 ... as an array of this shape, transposed; None: in their order.
    """
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    wanted = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    shape: list[int] = []
    varying: list[bool] = []
    for name, n in sizes.items():
        before, size = wanted.get(name, ("", ""))
        part = (int(before), int(size), n // int(before) // int(size)) if size else (1, n, 1)
        shape += part
        varying += [False, name in wanted, False]
    index = tuple(slice(None) if v else 0 for v in varying)
    devices = np.arange(math.prod(shape))
    if source is not None and turned is not None:
        devices = devices.reshape(_ints(source)).transpose(_ints(turned))
    return devices.reshape(shape)[index].ravel().tolist()


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
