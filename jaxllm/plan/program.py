"""Figures of one training step from its compiled program: cycles, matrix FLOPs, collectives, kernels, costliest lines.

Cycles are the compiler's own estimates (`estimated_cycles` in the scheduled text), summed over loop trips. Pallas
kernels and collectives carry no estimate: kernels are counted (`kernels.py` times them), collectives are given as bytes
on the wire. It is a compiler's model of a chip, not a chip.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from jaxllm.plan.groups import axes_of
from jaxllm.plan.hlo import Module, Op, Visit, Walk, dims, nbytes

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """count: per step and device.  wire: bytes per step and device, the full tensor once, all-reduce twice (a ring)."""

    kind: str
    axes: str
    shape: str
    count: int
    wire: float
    source: str


GROUPED = "ragged-dot"
"""How the names of XLA's own kernels begin that multiply groups of rows."""


@dataclass(frozen=True)
class Kernel:
    """A call of a Pallas kernel in the program, or of XLA's grouped matmul.

    name: of the operation.  count: runs per step.  shapes: of its operands.  flops: per run, if its author stated them;
    of a grouped matmul those of all rows, used or not.
    """

    name: str
    count: int
    shapes: tuple[tuple[int, ...], ...]
    flops: float | None

    @property
    def kind(self) -> str:
        """The name without what tells calls apart."""
        return re.sub(r"(\.pallas_call)?[.\d]+$", "", self.name)

    @property
    def rows(self) -> int | None:
        """Rows of a grouped matmul; None of a Pallas kernel, 0 of what only prepares one."""
        matrices = self.shapes[-2:]
        return (matrices[0][0] if len(matrices[-1]) > 1 else 0) if self.name.startswith(GROUPED) else None


@dataclass(frozen=True)
class Cost:
    """Operations made on one source line by one transformation: cycles, runs and matrix FLOPs per step."""

    name: str
    source: str
    cycles: int
    count: int
    flops: float


@dataclass(frozen=True)
class Program:
    """Per device and step.  unknown_loops: loops whose trip count could not be read, counted once."""

    cycles: int
    matrix_flops: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    costs: tuple[Cost, ...]
    trips: Mapping[str, int]
    unknown_loops: tuple[str, ...]

    def kernel_counts(self) -> dict[str, int]:
        """Runs per step of each kind of kernel."""
        return {kind: sum(k.count for k in self.kernels if k.kind == kind) for kind in {k.kind for k in self.kernels}}

    def wire(self) -> dict[str, tuple[int, float]]:
        """Kind -> (count, wire GB)."""
        kinds = sorted({c.kind for c in self.collectives})
        mine = {k: [c for c in self.collectives if c.kind == k] for k in kinds}
        return {k: (sum(c.count for c in cs), sum(c.wire for c in cs) / 1e9) for k, cs in mine.items()}


def program(module: Module, sizes: Mapping[str, int]) -> Program:
    """Figures of a module whose devices form a mesh of these axis sizes, major axis first."""
    walk = Walk(module)
    cycles: Counter[tuple[str, str]] = Counter()
    runs: Counter[tuple[str, str]] = Counter()
    collectives: Counter[tuple[str, str, str, str, float]] = Counter()
    kernels: dict[str, Kernel] = {}
    flops: defaultdict[tuple[str, str], float] = defaultdict(float)
    seen: set[tuple[int, str, str]] = set()
    for visit in walk:
        op, outer = visit.op, visit.fusion or visit.op
        flops[_short(outer), module.source(outer)] += visit.times * matrix_flops(op, visit.scope)
        if (kind := _kind(op)) is not None and (key := _once(visit, kind)) not in seen:
            seen.add(key)
            shown, size = _wire(visit, kind)
            collectives[shown, axes_of(op, sizes), _shape(op), module.source(op), size] += visit.times
        if op.kind == "custom-call" and (op.attr(r'custom_call_target="([^"]*)"') in _KERNELS):
            before = kernels[op.name].count if op.name in kernels else 0
            shapes = tuple(tuple(dims(visit.scope[name].type)) for name in op.operands)
            stated = _grouped_flops(shapes) if op.name.startswith(GROUPED) else _stated_flops(op)
            kernels[op.name] = Kernel(_kernel_name(op), before + visit.times, shapes, stated)
        estimate = None if visit.fusion else op.attr(r'"estimated_cycles":"(\d+)"')
        if estimate is not None:
            where = (_short(op), module.source(op))
            cycles[where] += visit.times * int(estimate)
            runs[where] += visit.times
    return Program(
        sum(cycles.values()),
        sum(flops.values()),
        tuple(sorted((Collective(k, a, s, n, n * b, at) for (k, a, s, at, b), n in collectives.items()), key=_by_wire)),
        tuple(kernels.values()),
        tuple(Cost(*where, n, runs[where], flops[where]) for where, n in cycles.most_common()),
        walk.trips,
        tuple(walk.unknown),
    )


_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton")


def _kernel_name(op: Op) -> str:
    """The operation's; on GPUs, where all are called alike, with what jax was told before it."""
    return f"{op.op_name.split('/')[-2]}.{op.name}" if op.name.startswith("pallas_call") else op.name


def _by_wire(collective: Collective) -> float:
    return -collective.wire


def _short(op: Op) -> str:
    """What an operation does, without the transformations around it: "backward dot_general [fusion]"."""
    parts = op.op_name.split("/")
    what = parts[-1] if parts[-1] else op.kind
    backward = "transpose(" in op.op_name
    again = "rematted_computation" in op.op_name or "/remat" in op.op_name
    when = "again " if again else "backward " if backward else ""
    return f"{when}{what} [{re.sub(r'[.0-9]+$', '', op.name)}]"


# ----------------------------------------------------------------------------------------------------- collectives


def _kind(op: Op) -> str | None:
    base = op.kind.removesuffix("-start")
    return base if base in KINDS else None


def _once(visit: Visit, kind: str) -> tuple[int, str, str]:
    """An asynchronous collective's parts repeat it: one per channel, shape and loop body counts.

    Those that a `shard_map` asks for all have one channel: they count by name.
    """
    channel, mapped = visit.op.attr(r"channel_id=(\d+)"), "shard_map" in visit.op.op_name
    return visit.level, kind, visit.op.name if mapped or not channel else f"{channel} {_shape(visit.op)}"


def _wire(visit: Visit, kind: str) -> tuple[str, float]:
    """(kind as done, bytes on the wire for one run). An all-reduce of which each keeps a slice is a reduce-scatter."""
    op, scope = visit.op, visit.scope
    each = [nbytes(scope[name].type) for name in op.operands if name in scope]
    if kind == "ragged-all-to-all":
        return kind, min(each[:2])
    if kind == "all-gather":
        return kind, nbytes(op.type) - (sum(each) if op.kind.endswith("-start") else 0)
    if kind == "all-reduce" and (visit.scattered or "all-reduce-scatter" in op.name):
        return "reduce-scatter", sum(each)
    return kind, sum(each) * (2 if kind == "all-reduce" else 1)


def _shape(op: Op) -> str:
    """The result's arrays without layouts, the largest three."""
    shapes = re.findall(r"\w+\[[\d,]*\]", op.type)
    return " ".join(sorted(set(shapes), key=nbytes, reverse=True)[:3])


def _stated_flops(op: Op) -> float | None:
    stated = op.attr(r'"cost_estimate":\{[^}]*"flops":"?([\d.e+]+)')
    return float(stated) if stated else None


def _grouped_flops(shapes: tuple[tuple[int, ...], ...]) -> float:
    """Of [M, D] times [E, D, F] in either order, or [M, D] and [M, F] to [E, D, F]: all are 2 M D F."""
    if len(shapes[-1]) < 2:  # what prepares it
        return 0.0
    x, w = shapes[-2:]
    return 2.0 * math.prod(x) * (w[1] if len(w) == 2 else math.prod(w[1:]) // x[1])


# ----------------------------------------------------------------------------------------------------------- flops


def matrix_flops(op: Op, scope: Mapping[str, Op]) -> float:
    """FLOPs of a matrix product, 2 per multiply-add; 0 for anything else. On TPU, products appear as convolutions."""
    match op.kind:
        case "dot":
            lhs = dims(scope[op.operands[0]].type)
            contracted = op.attr(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
            return 2.0 * math.prod(dims(op.type)) * math.prod(lhs[int(d)] for d in contracted.split(",") if d)
        case "convolution":
            return _convolution_flops(op, scope)
        case _:
            return 0.0


@dataclass(frozen=True)
class _Window:
    """One spatial dimension of a convolution: sizes of input, output and kernel, and how they slide."""

    n: int
    out: int
    size: int
    stride: int
    pad: int
    lhs_dilate: int
    rhs_dilate: int

    def hits(self) -> int:
        """Pairs (output position, kernel position) that read a real input, not padding or a hole."""
        last = (self.n - 1) * self.lhs_dilate
        count = 0
        for k in range(self.size):
            offset = k * self.rhs_dilate - self.pad
            if self.lhs_dilate == 1:
                low = max(0, (self.stride - 1 - offset) // self.stride)
                high = min(self.out - 1, (last - offset) // self.stride)
                count += max(0, high - low + 1)
            else:
                at = (x * self.stride + offset for x in range(self.out))
                count += sum(0 <= p <= last and p % self.lhs_dilate == 0 for p in at)
        return count


def _convolution_flops(op: Op, scope: Mapping[str, Op]) -> float:
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", op.attrs)
    if labels is None:
        return 0.0
    lhs_label, rhs_label, out_label = labels.groups()
    lhs, rhs = (dims(scope[name].type) for name in op.operands[:2])
    out = dims(op.type)
    spatial = [c for c in out_label if c.isdigit()]
    window = dict(pair.split("=") for pair in (op.attr(r"window=\{([^}]*)\}") or "").split())

    def each(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    keys = (("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    rows = zip(*(each(*key) for key in keys), strict=True)
    hits = 1
    for c, (size, stride, pad, lhs_dilate, rhs_dilate) in zip(spatial, rows, strict=True):
        sizes = lhs[lhs_label.index(c)], out[out_label.index(c)]
        slide = int(size), int(stride), int(pad.split("_")[0]), int(lhs_dilate), int(rhs_dilate)
        hits *= _Window(*sizes, *slide).hits()
    batch, features, inner = out[out_label.index("b")], out[out_label.index("f")], rhs[rhs_label.index("i")]
    return 2.0 * batch * features * inner * hits / int(op.attr(r"batch_group_count=(\d+)") or 1)
