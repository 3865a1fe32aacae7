"""Read a compiled program from its text: operations, how often each runs, and where in the source it came from.

The text is a *scheduled* module for one device (`compiled.as_text()`). A loop body is written once; the number of times
it runs is worked out from the loop's condition (a compare against a constant), its starting tuple and its increment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    **dict.fromkeys(("s4", "u4"), 4),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 8),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
}
_SHAPE = re.compile(rf"\b({'|'.join(sorted(BITS, key=len, reverse=True))})\[([0-9,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_OP = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Op:
    """One operation.  type: its result's shape, as text.  args: what its parentheses hold.  attrs: what follows."""

    name: str
    type: str
    kind: str
    args: str
    attrs: str
    root: bool

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operations it reads."""
        return _NAME.findall(self.args)

    def attr(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes, or None."""
        match = re.search(pattern, self.attrs)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """The path of jax transformations it came from, such as "jit(step)/transpose(jvp())/while/body/dot_general"."""
        return self.attr(r'op_name="([^"]*)"') or ""


Computation = dict[str, Op]


@dataclass(frozen=True)
class Module:
    """computations: by name.  entry: name of the main one.  sources: stack frame id -> ("file", line)."""

    computations: dict[str, Computation]
    entry: str
    sources: dict[int, tuple[str, int]] = field(default_factory=dict)

    def root(self, computation: str) -> Op:
        """The operation whose result the computation returns."""
        return next(op for op in self.computations[computation].values() if op.root)

    def source(self, op: Op) -> str:
        """ "file.py:123", the innermost frame known to the compiler; "" when there is none."""
        frame = op.attr(r"stack_frame_id=(\d+)")
        found = self.sources.get(int(frame)) if frame else None
        return f"{found[0]}:{found[1]}" if found else ""


def dims(type_text: str) -> list[int]:
    """Sizes of the first array in a type: "bf16[2,64]{1,0}" -> [2, 64]."""
    match = _SHAPE.search(type_text)
    return [int(n) for n in match[2].split(",") if n] if match else []


def nbytes(type_text: str) -> float:
    """Bytes of all arrays in a type, without padding."""
    total = 0.0
    for match in _SHAPE.finditer(type_text):
        size = BITS[match[1]] / 8
        for n in match[2].split(","):
            size *= int(n) if n else 1
        total += size
    return total


# --------------------------------------------------------------------------------------------------------- reading


def parse(text: str) -> Module:
    """The module in a text. Raises ValueError when the text holds no entry computation."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    lines = _joined(text)
    for line in lines:
        if not line.startswith(" "):
            header = _HEADER.match(line)
            current = computations.setdefault(header[2], {}) if header else None
            entry = header[2] if header and header[1] else entry
        elif current is not None and (op := _op(line)) is not None:
            current[op.name] = op
    if entry is None:
        raise ValueError(f"hlo: the text has no ENTRY computation; it begins {text[:60]!r}")
    return Module(computations, entry, _sources(lines))


def _joined(text: str) -> list[str]:
    """Lines, with the continuation of an attribute that spans several (a kernel's metadata) put back in its place."""
    lines: list[str] = []
    for line in text.splitlines():
        inside = lines and lines[-1].startswith("  ") and not line.startswith((" ", "%", "ENTRY"))
        if inside and line.rstrip() not in ("", "}"):
            lines[-1] += " " + line
        else:
            lines.append(line)
    return lines


def _op(line: str) -> Op | None:
    match = _OP.match(line)
    if match is None:
        return None
    type_text, rest = _split_type(match[3])
    kind = re.match(r"([\w\-]+)\(", rest)
    if kind is None:
        return None
    end = _closing(rest, rest.index("("))
    return Op(match[2], type_text, kind[1], rest[kind.end() : end], rest[end + 1 :], bool(match[1]))


def _split_type(text: str) -> tuple[str, str]:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    return text[:end], text[end:].strip()


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _sources(lines: list[str]) -> dict[int, tuple[str, int]]:
    """Stack frame id -> (file, line), from the tables that precede the computations; empty when there are none."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] | None = None
    for line in lines:
        if line.rstrip() in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line.rstrip(), {})
        elif current is not None and (row := re.match(r"(\d+) (.*)$", line)):
            current[int(row[1])] = row[2]
        elif line.startswith(("%", "ENTRY")):
            break
    out: dict[int, tuple[str, int]] = {}
    for frame, row in tables.get("StackFrames", {}).items():
        location = tables["FileLocations"].get(_number(row, "file_location_id"), "")
        name = tables["FileNames"].get(_number(location, "file_name_id"), '""').strip('"')
        out[frame] = name, _number(location, "line")
    return out


def _number(text: str, key: str) -> int:
    match = re.search(rf"\b{key}=(\d+)", text)
    return int(match[1]) if match else 0


# --------------------------------------------------------------------------------------------------------- walking


@dataclass(frozen=True)
class Visit:
    """One place in the program.

    times: how often it runs per step.  level: identifies the loop body it belongs to, fusions included.
    fusion: the outermost fusion it is inside of, where its cycles are counted.  scattered: inside an all-reduce of
    which each device keeps a slice.
    """

    op: Op
    scope: Computation
    times: int
    level: int
    fusion: Op | None
    scattered: bool


@dataclass(frozen=True)
class _Place:
    times: int
    level: int
    fusion: Op | None
    scattered: bool


@dataclass
class Walk:
    """All visits of a module's operations, loops multiplied out.

    unknown: loop bodies whose trip count could not be read; they are counted once.
    trips: loop body -> trip count.
    """

    module: Module
    trips: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    _levels: int = 0

    def __iter__(self) -> Iterator[Visit]:
        """Visits, callers before what they call."""
        return self._visit(self.module.entry, _Place(1, self._level(), None, False), frozenset())

    def _level(self) -> int:
        self._levels += 1
        return self._levels

    def _visit(self, name: str, at: _Place, above: frozenset[str]) -> Iterator[Visit]:
        if name not in self.module.computations or name in above:
            return
        scope = self.module.computations[name]
        for op in scope.values():
            yield Visit(op, scope, at.times, at.level, at.fusion, at.scattered)
            for callee, place in self._callees(op, scope, at):
                yield from self._visit(callee, place, above | {name})

    def _callees(self, op: Op, scope: Computation, at: _Place) -> Iterator[tuple[str, _Place]]:
        match op.kind:
            case "while":
                body = op.attr(r"body=%?([\w.\-]+)") or ""
                times = at.times * self._trips(op, scope, body)
                yield body, _Place(times, self._level(), at.fusion, at.scattered)
            case "conditional":
                names = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", op.attrs)
                listed = op.attr(r"branch_computations=\{([^}]*)\}") or ""
                for branch in names + [n.strip().lstrip("%") for n in listed.split(",") if n.strip()]:
                    yield branch, _Place(at.times, self._level(), at.fusion, at.scattered)
            case "fusion" | "call" | "async-start" | "custom-call":
                callee = op.attr(_CALLED.pattern)
                if callee:
                    scattered = at.scattered or "all-reduce-scatter" in callee or "all-reduce-scatter" in op.name
                    fusion = at.fusion or (op if op.kind == "fusion" else None)
                    yield callee, _Place(at.times, at.level, fusion, scattered)
            case _:
                return

    def _trips(self, op: Op, scope: Computation, body: str) -> int:
        known = trip_count(self.module, op, scope)
        if known is None:
            self.unknown.append(body)
            return 1
        self.trips[body] = known
        return known


def trip_count(module: Module, loop: Op, scope: Computation) -> int | None:
    """How often a loop's body runs; None when that is not a matter of constants.

    scope: the computation that holds the loop.
    """
    known = loop.attr(r'known_trip_count"?:\{"n":"?(\d+)')
    if known:
        return int(known)
    condition = loop.attr(r"condition=%?([\w.\-]+)")
    body = loop.attr(r"body=%?([\w.\-]+)")
    if condition is None or body is None:
        return None
    test = _comparison(module, condition)
    start = scope.get(loop.operands[0])
    if test is None or start is None or start.kind != "tuple":
        return None
    index, limit, direction = test
    first = _constant(start.operands[index], scope) or 0
    last = limit if isinstance(limit, int) else _constant(start.operands[limit.index], scope)
    if last is None or direction not in ("LT", "LE"):
        return None
    step = _increment(module, body, index)
    return max(0, -(-(last + (direction == "LE") - first) // step))


@dataclass(frozen=True)
class _Carried:
    """An element of the loop's tuple."""

    index: int


def _comparison(module: Module, condition: str) -> tuple[int, int | _Carried, str] | None:
    """(which element of the tuple counts, what it is compared with, direction) of a loop's condition."""
    scope, root = module.computations[condition], module.root(condition)
    sides: list[int | _Carried] = []
    for side in _sides(module, root, scope):
        if isinstance(side, int):
            sides.append(side)
        elif (value := _constant(side, scope)) is not None:
            sides.append(value)
        elif side in scope and scope[side].kind == "get-tuple-element":
            sides.append(_Carried(int(scope[side].attr(r"index=(\d+)") or 0)))
    direction = _direction(module, root)
    if len(sides) != 2 or not isinstance(sides[0], _Carried) or direction is None:
        return None
    return sides[0].index, sides[1], direction


def _direction(module: Module, root: Op) -> str | None:
    inner = module.root(root.attr(_CALLED.pattern) or "") if root.kind == "fusion" else root
    return inner.attr(r"direction=(\w+)") if inner.kind == "compare" else None


def _sides(module: Module, root: Op, scope: Computation) -> list[str | int]:
    """What the condition compares: names in `scope`, or constants; looked for inside a fusion too."""
    if root.kind == "compare":
        return list(root.operands)
    called = root.attr(_CALLED.pattern)
    if root.kind != "fusion" or called is None:
        return []
    inner = module.computations[called]
    out: list[str | int] = []
    for name in module.root(called).operands:
        op = inner[name]
        if op.kind == "parameter":
            out.append(root.operands[int(op.args)])
        elif op.kind == "constant":
            out.append(int(op.args))
    return out


def _constant(name: str, scope: Computation) -> int | None:
    """The integer that `name` is in this computation, seen through copies; None when it is no constant."""
    op = scope.get(name)
    while op is not None and op.kind in ("copy", "bitcast", "convert", "copy-done", "copy-start") and op.operands:
        op = scope.get(op.operands[0])
    return int(op.args) if op is not None and op.kind == "constant" and re.fullmatch(r"-?\d+", op.args) else None


def _increment(module: Module, body: str, index: int) -> int:
    """By how much a loop's body advances element `index` of its tuple; 1 when it cannot be read."""
    scope, root = module.computations[body], module.root(body)
    if root.kind != "tuple":
        return 1
    op = scope.get(root.operands[index])
    total = 0
    while op is not None and op.kind in ("add", "copy", "bitcast", "copy-done", "copy-start"):
        if op.kind == "add":
            values = {name: _constant(name, scope) for name in op.operands}
            total += sum(v for v in values.values() if v is not None)
            rest = [name for name, v in values.items() if v is None]
            op = scope.get(rest[0]) if rest else None
        else:
            op = scope.get(op.operands[0])
    if op is not None and op.kind == "fusion":
        inner = module.computations.get(op.attr(_CALLED.pattern) or "", {})
        steps = [int(o.args) for o in inner.values() if o.kind == "constant" and re.fullmatch(r"\d+", o.args)]
        total += steps[0] if len(steps) == 1 else 0
    return total or 1
