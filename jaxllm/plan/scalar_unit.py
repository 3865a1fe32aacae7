"""The scalar unit of a TPU core, as far as timing needs it: integers, predicates, scalar memory, copies under way.

A number that is not known is None, and so is what is computed from it; only what decides the course of a kernel must be
known. Integers have 32 bits.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

GRANULE = 32  # bytes: the unit in which copies are counted

Number = int | None
Scalars = Mapping[int, Sequence[int]]  # operand number -> the integers it holds


class Undecided(ValueError):
    """The kernel's course depends on something unknown."""


# -------------------------------------------------------------------------------------------------------- operands


def value_of(text: str) -> Callable[[Machine], Number]:
    """What an operand stands for: a number, a value, its negation, or an address made of several, [a + b]."""
    text = text.strip()
    inner = re.fullmatch(r"(?:\[?\w+:)?\[([^\[\]]*)\]+", text)
    if inner is not None:
        parts = [value_of(part) for part in inner[1].split(" + ")]
        return lambda machine: _known(sum, [part(machine) for part in parts])
    if (name := re.fullmatch(r"(!?)%([sp]\d+)_[sp]\d+", text)) is not None:
        key = name[2]
        if name[1]:
            return lambda machine: _known(lambda x: not x, machine.values.get(key))
        return lambda machine: machine.values.get(key)
    if text.startswith("#"):
        return lambda machine: machine.place(text)
    number = int(text.lstrip("$"), 0) if re.fullmatch(r"\$?-?(0x[0-9a-f]+|\d+)", text) else None
    wrapped = None if number is None else _signed(number)
    return lambda machine: wrapped


# ------------------------------------------------------------------------------------------------------ arithmetic


def _signed(x: int) -> int:
    """The low 32 bits as a signed number."""
    return ((x + 2**31) & 0xFFFFFFFF) - 2**31


def _unsigned(x: int) -> int:
    return x & 0xFFFFFFFF


def _known(function: Callable[..., int], *operands: object) -> Number:
    """function(*operands), None when one of them, or one in a list of them, is not known."""
    held = [x for operand in operands for x in (operand if isinstance(operand, list) else [operand])]
    return None if any(x is None for x in held) else function(*operands)


_INTEGER: dict[str, Callable[..., int]] = {
    "smov": lambda x: x,
    "sadd": lambda x, y: x + y,
    "ssub": lambda x, y: x - y,
    "smul": lambda x, y: x * y,
    "smulhi": lambda x, y: _unsigned(x) * _unsigned(y) >> 32,
    "sshll": lambda x, n: x << n,
    "sshrl": lambda x, n: _unsigned(x) >> n,
    "sshra": lambda x, n: x >> n,
    "sand": lambda x, y: x & y,
    "sor": lambda x, y: x | y,
    "sxor": lambda x, y: x ^ y,
    "int_to_ptr": lambda x: x,
    "scalar_lea": lambda *parts: sum(parts),
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


def _both(x: Number, y: Number) -> Number:
    """x and y, where one that is false decides."""
    if any(side is not None and not side for side in (x, y)):
        return False
    return None if x is None or y is None else True


def _negated(x: Number) -> Number:
    return None if x is None else not x


def _either(x: Number, y: Number) -> Number:
    return _negated(_both(_negated(x), _negated(y)))


_LOGIC: dict[str, Callable[..., Number]] = {
    "pmov": lambda x: x,
    "pneg": _negated,
    "pand": _both,
    "pnand": lambda x, y: _negated(_both(x, y)),
    "por": _either,
    "pnor": lambda x, y: _negated(_either(x, y)),
    "pxor": lambda x, y: _known(lambda a, b: bool(a) != bool(b), x, y),
    "scalar_select": lambda p, x, y: None if p is None else x if p else y,
}


def function_of(kind: str) -> Callable[..., Number] | None:
    """What an instruction computes from its operands; None when that is not modelled, floats for one."""
    base, _, detail = kind.partition(".")
    if base in _LOGIC:
        return _LOGIC[base]
    if "f32" in detail:
        return None
    if base == "scmp":
        relation, _, width = detail.partition(".")
        order = _unsigned if width.startswith("u32") else _signed
        return lambda x, y: _known(lambda x, y: _COMPARE[relation](order(x), order(y)), x, y)
    if base in ("smin", "smax"):
        order, pick = (_unsigned if detail.startswith("u32") else _signed), min if base == "smin" else max
        return lambda x, y: _known(lambda x, y: pick(x, y, key=order), x, y)
    if base in _INTEGER:
        return lambda *operands: _known(lambda *xs: _signed(_INTEGER[base](*xs)), *operands)
    return None


# --------------------------------------------------------------------------------------------------------- running


@dataclass
class Machine:
    """The scalar unit, its memory, and the copies under way. Times are cycles since the kernel began.

    rate: bytes per cycle between HBM and the core.  free: when the last copy to or from HBM is through.
    issued: bundles of the blocks before this one.  offset: the bundle of this one.
    pending: flag -> (time of arrival, granules) of the copies that raise it.
    """

    scalars: Scalars
    rate: float
    latency: float
    values: dict[str, Number] = field(default_factory=dict)
    memory: dict[Number, Number] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    pending: defaultdict[int, deque[tuple[float, int]]] = field(default_factory=lambda: defaultdict(deque))
    issued: int = 0
    offset: int = 0
    stalled: float = 0.0
    copied: int = 0
    free: float = 0.0

    @property
    def now(self) -> float:
        """Cycles so far."""
        return self.issued + self.offset + self.stalled

    def decide(self, guard: Callable[[Machine], Number], what: str) -> bool:
        """Whether a guard holds. Raises Undecided when that is not known."""
        held = guard(self)
        if held is None:
            raise Undecided(f"bundles: {what} after {self.issued:,} bundles depends on a number that is not known")
        return bool(held)

    def place(self, name: str) -> int:
        """The address of an allocation."""
        return self.places.setdefault(name, (len(self.places) + 1) << 20)

    def store(self, address: Number, value: Number) -> None:
        """Write a word of scalar memory."""
        if address is not None:
            self.memory[address] = value

    def fetch(self, operand: int | None, to: Number) -> None:
        """What a copy brings into scalar memory: the integers of a prefetched operand."""
        if operand is not None and operand in self.scalars and to is not None:
            self.memory |= {to + i: int(x) for i, x in enumerate(self.scalars[operand])}

    def copy(self, granules: Number, flag: Number, outside: bool) -> None:
        """Begin a copy; those between HBM and the core (`outside`) share its bandwidth."""
        if granules is None or flag is None:
            raise Undecided(f"bundles: a copy after {self.issued:,} bundles has a size or a flag that is not known")
        begin = self.now
        if outside:
            self.free = begin = max(self.free, begin) + granules * GRANULE / self.rate
            self.copied += granules * GRANULE
        self.pending[flag].append((begin + self.latency, granules))

    def wait(self, flag: Number, granules: Number) -> None:
        """Stall until so many granules have arrived under a flag."""
        if granules is None or flag is None:
            raise Undecided(f"bundles: a wait after {self.issued:,} bundles has a size or a flag that is not known")
        copies, left, arrival = self.pending[flag], granules, self.now
        while copies and left > 0:
            time, size = copies.popleft()
            arrival = max(arrival, time)
            if size > left:
                copies.appendleft((time, size - left))
            left -= size
        self.stalled += arrival - self.now
