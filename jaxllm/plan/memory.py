"""Where the memory of a compiled step goes, from the compiler's buffer assignment.

The assignment gives every buffer an allocation: the arguments have one each, temporaries share one heap at fixed
offsets. The live ranges say when each is in use. Parts are read at the moment when most of the heap is in use; what
the heap holds beyond that (buffers of different moments that could not be packed) is "fragmentation".

A temporary is told apart by what made it and by its shape: shapes of parameters are gathered weights or gradients (made
by the backward pass), stacks over layers are activations saved for the backward pass, the rest are working activations.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxllm.plan.hlo import Module, Op, dims

HBM = "default"  # the colour-0 memory space; others are on-chip (vmem, smem) or the host's

PARTS = {
    "parameters": "masters",
    "optimiser": "moments",
    "counters": "step counters",
    "inputs": "the batch",
    "weights": "weights as they are multiplied: cast, gathered",
    "gradients": "gradients",
    "saved": "activations saved for the backward pass",
    "working": "activations and other temporaries in use at the peak",
    "fragmentation": "heap beyond what is in use at the peak",
    "constants": "constants, small results and alignment",
    "code": "the program",
}
"""Part -> what it is, in the order of the table."""


@dataclass(frozen=True)
class Buffer:
    """A value in an allocation.  name: of the operation that made it.  index: in its tuple.  phi: carried by a loop."""

    name: str
    index: int | None
    phi: bool
    offset: int
    size: int
    type: str


@dataclass(frozen=True)
class Allocation:
    """A stretch of memory.  colour: memory space, 0 = HBM.  parameter: number of the argument it holds, or None."""

    size: int
    colour: int
    parameter: int | None
    heap: bool
    buffers: tuple[Buffer, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes per chip, by part (keys of PARTS); they sum to the peak.  largest: the greatest temporaries at the peak."""

    by_part: Mapping[str, int]
    largest: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """The peak: arguments + results that are not donated + temporaries + code."""
        return sum(self.by_part.values())


@dataclass(frozen=True)
class Shapes:
    """Tells a temporary's part: sorted sizes (without 1s) of parameters and their pieces, lengths of layer stacks."""

    weights: frozenset[tuple[int, ...]]
    layers: frozenset[int]


_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$")
_VALUE = re.compile(r"^ value: <\d+ ([^ ]+?)(?:\{(\d*)[\d,]*\})?( \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")


def allocations(text: str) -> list[Allocation]:
    """The allocations in the compiler's "buffer-assignment" text. Raises ValueError when it holds none.

    Thread-local ones are left out: what an asynchronous computation (a gather on SparseCore) sees of buffers that its
    caller holds.
    """
    out: list[Allocation] = []
    head: re.Match[str] | None = None
    buffers: list[Buffer] = []

    def close() -> None:
        if head is not None and "thread-local" not in head[2]:
            colour, parameter = (re.search(rf"\b{key} (\d+)", head[2]) for key in ("color", "parameter"))
            numbers = int(colour[1]) if colour else 0, int(parameter[1]) if parameter else None
            out.append(Allocation(int(head[1]), *numbers, "preallocated-temp" in head[2], tuple(buffers)))

    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            close()
            head, buffers = match, []
        elif value := _VALUE.match(line):
            name, index, phi, size, offset, kind = value.groups()
            buffers.append(Buffer(name, int(index) if index else None, bool(phi), int(offset), int(size), kind))
    close()
    if not out:
        raise ValueError(f"plan: the buffer assignment holds no allocation; it begins {text[:60]!r}")
    return out


def live_ranges(text: str) -> dict[tuple[str, int | None], tuple[int, int]]:
    """(name, index) -> first and last moment, from the compiler's "live-range" text."""
    rows = re.findall(r"^    ([^\s{]+)\{(\d*)[\d,]*\}:(\d+)-(\d+)$", text, re.MULTILINE)
    return {(name, int(index) if index else None): (int(start), int(end)) for name, index, start, end in rows}


def memory(module: Module, assignment: str, ranges: str, shapes: Shapes, code: int) -> Memory:
    """Memory by part of a module, from texts of its buffer assignment and live ranges.  code: bytes of the program."""
    parts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    largest: list[tuple[str, int]] = []
    arguments = _arguments(module)
    for allocation in allocations(assignment):
        if allocation.colour != 0:
            continue
        if allocation.parameter is not None:
            parts[_argument_part(arguments.get(allocation.parameter, ""))] += allocation.size
        elif allocation.heap:
            live = _at_peak(allocation.buffers, live_ranges(ranges))
            for buffer, size in _claims(live):
                op, source = _origin(module, buffer.name, buffer.index)
                part = _part(op, source, buffer.type, shapes)
                parts[part] += size
                largest.append(
                    (f"{part}: {buffer.type.split('{')[0]} {op.op_name or buffer.name} {module.source(op)}", size)
                )
            parts["fragmentation"] += allocation.size - sum(size for _, size in largest)
        else:
            parts["constants"] += allocation.size
    parts["code"] = code
    return Memory(dict(parts), tuple(sorted(largest, key=_size, reverse=True)[:12]))


def _size(row: tuple[str, int]) -> int:
    return row[1]


# ------------------------------------------------------------------------------------------------------- arguments


def _arguments(module: Module) -> dict[int, str]:
    """Parameter number -> its path in the step's arguments, such as "state.params['embed']['tokens']"."""
    entry = module.computations[module.entry].values()
    return {int(op.args): op.op_name for op in entry if op.kind == "parameter" and op.args.isdigit()}


def _argument_part(path: str) -> str:
    if path.startswith("batch"):
        return "inputs"
    if ".params" in path:
        return "parameters"
    return "optimiser" if ".mu" in path or ".nu" in path else "counters"


# ------------------------------------------------------------------------------------------------------------ heap


def _at_peak(buffers: Iterable[Buffer], ranges: Mapping[tuple[str, int | None], tuple[int, int]]) -> list[Buffer]:
    """Buffers in use at the moment when they cover most of the heap."""
    timed = [(buffer, ranges[key]) for buffer in buffers if (key := (buffer.name, buffer.index)) in ranges]
    moments = sorted({start for _, (start, _) in timed})

    def at(moment: int) -> list[Buffer]:
        return [buffer for buffer, (start, end) in timed if start <= moment <= end]

    def covered(moment: int) -> int:
        return sum(size for _, size in _claims(at(moment)))

    return at(max(moments, key=covered)) if moments else []


def _claims(buffers: Iterable[Buffer]) -> list[tuple[Buffer, int]]:
    """Each buffer with the bytes of the heap that no larger one before it covers (aliases share their place)."""
    out: list[tuple[Buffer, int]] = []
    taken: list[tuple[int, int]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.phi, b.offset)):
        start, end = buffer.offset, buffer.offset + buffer.size
        free = end - start - sum(max(0, min(end, e) - max(start, s)) for s, e in taken)
        if free > 0:
            out.append((buffer, free))
            taken = _merged([*taken, (start, end)])
    return out


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


# ----------------------------------------------------------------------------------------------------------- parts


def _origin(module: Module, name: str, index: int | None) -> tuple[Op, str]:
    """What made a value, seen through loops' tuples and copies, and the argument's path if it is the cast of one."""
    scope = next((c for c in module.computations.values() if name in c), {})
    op = scope.get(name) or Op(name, "", "?", "", "", False)
    first = op
    for _ in range(16):
        if op.kind == "while" and index is not None:
            op, index = scope.get(scope[op.operands[0]].operands[index], op), None
        elif op.kind == "parameter" and (loop := _loop_of(module, scope)) is not None and index is not None:
            scope, op = loop
        elif op.kind == "get-tuple-element":
            index = int(op.attr(r"index=(\d+)") or 0)
            op = scope.get(op.operands[0], op)
        elif op.kind in ("copy", "bitcast", "convert", "copy-done", "copy-start") and op.operands[0] in scope:
            op = scope[op.operands[0]]
        else:
            break
    argument = op.op_name if op.kind == "parameter" and scope is module.computations[module.entry] else ""
    return (first if argument and first.kind != "parameter" else op), argument


def _loop_of(module: Module, body: Mapping[str, Op]) -> tuple[dict[str, Op], Op] | None:
    """The loop whose body or condition this computation is, and the computation that holds it."""
    mine = next((name for name, c in module.computations.items() if c is body), "")
    for scope in module.computations.values():
        for op in scope.values():
            if op.kind == "while" and re.search(rf"(?:body|condition)=%?{re.escape(mine)}(?![\w.\-])", op.attrs):
                return scope, op
    return None


def _part(op: Op, argument: str, type_text: str, shapes: Shapes) -> str:
    sizes = [n for n in dims(type_text) if n > 1]
    if argument:
        return "weights" if ".params" in argument else "working"
    if tuple(sorted(sizes)) in shapes.weights:
        return "gradients" if _is_gradient(op) else "weights"
    return "saved" if len(sizes) > 2 and sizes[0] in shapes.layers and _is_stack(op) else "working"


def _is_stack(op: Op) -> bool:
    """Filled layer by layer: begins empty or as a constant, or is updated one slice at a time."""
    return op.kind == "broadcast" or not op.operands or "dynamic-update-slice" in op.name


def _is_gradient(op: Op) -> bool:
    """Made by the backward pass: not gathered or recomputed there."""
    gathered = "gather" in op.name or "gather" in op.kind or "convert_element_type" in op.op_name
    zeros = op.kind == "broadcast"
    return zeros or ("transpose(" in op.op_name and "rematted" not in op.op_name and not gathered)
