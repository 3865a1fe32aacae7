"""A plan: the figures of one compiled step per chip, what they add up to, and what to change when it does not fit.

    step seconds = cycles / clock + kernel seconds + grouped matmul seconds      collectives: hidden behind these
    MFU          = model FLOPs / (step seconds x peak)    model FLOPs: `jaxllm.flops`, without recomputation

Cycles are the compiler's estimates. Pallas kernels have none, so their bundles are run (`bundles.py`), for rows of one
document each. Where that cannot be done their seconds are null, with the reason, and step seconds takes them at the
matrix unit's peak: then it is a lower bound, and MFU an upper one. XLA's grouped matmul works on the rows it is given;
it is taken at that peak too, for a balanced load of the experts, with which a loop over rounds of their exchange runs
once. For GPUs XLA estimates no time: all seconds are null.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import MoE
from jaxllm.experiment import Experiment
from jaxllm.nn.dispatch import room
from jaxllm.params import leaves
from jaxllm.plan.compile import Compiled
from jaxllm.plan.hlo import parse
from jaxllm.plan.info import info
from jaxllm.plan.kernels import seconds
from jaxllm.plan.memory import Memory, Shapes, memory
from jaxllm.plan.program import Program, program
from jaxllm.plan.scalar_unit import Undecided
from jaxllm.plan.topology import Slice
from jaxllm.sharding import Layout, partition, shares, storage
from jaxllm.transformer import transformer_params

NO_TIME = "XLA estimates no time for GPU programs, and nothing here has run them"


@dataclass(frozen=True)
class Plan:
    """One step of an experiment on a slice, per chip.

    program: None when it does not fit.  limit: bytes of HBM to fit in.
    model_flops, attention_flops: per chip and step, without recomputation.
    kernel_seconds: of one run of each Pallas kernel.  untimed: why they could not be timed, None when they were.
    grouped_flops: of the mixtures' grouped matmuls per chip and step, recomputation included, at a balanced load.
    """

    exp: Experiment
    target: Slice
    memory: Memory
    limit: int
    program: Program | None
    model_flops: float
    attention_flops: float
    compiled: Compiled
    kernel_seconds: Mapping[str, float] = field(default_factory=dict)
    untimed: str | None = None
    grouped_flops: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether everything can be placed in HBM. (A compiler of GPU programs has none to run out of.)"""
        return self.program is not None and self.memory.total <= self.limit

    @property
    def xla_seconds(self) -> float | None:
        """Estimated cycles / clock; None for GPUs."""
        if self.program is None or self.target.gpu:
            return None
        return self.program.cycles / self.target.chip.clock

    @property
    def kernel_flops(self) -> float:
        """FLOPs of the Pallas kernels: as their authors state them, else the model's attention FLOPs."""
        kernels = [k for k in self.program.kernels if k.rows is None] if self.program else []
        stated = [k.flops * k.count for k in kernels if k.flops is not None]
        return sum(stated) if len(stated) == len(kernels) else self.attention_flops

    @property
    def pallas_seconds(self) -> float | None:
        """Of all kernels, as often as they run; None when they could not be timed."""
        if self.program is None or self.untimed is not None:
            return None
        return sum(k.count * self.kernel_seconds[k.name] for k in self.program.kernels if k.rows is None)

    @property
    def grouped_seconds(self) -> float | None:
        """Of the grouped matmuls, at the matrix unit's peak."""
        return None if self.program is None or self.target.gpu else self.grouped_flops / self.target.chip.peak

    @property
    def step_seconds(self) -> float | None:
        """XLA's, the kernels' and the grouped matmuls' seconds; a lower bound when kernels could not be timed."""
        if self.xla_seconds is None or self.grouped_seconds is None:
            return None
        at_peak = self.kernel_flops / self.target.chip.peak
        kernels = at_peak if self.pallas_seconds is None else self.pallas_seconds
        return self.xla_seconds + kernels + self.grouped_seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; an upper bound when kernels could not be timed."""
        return None if self.step_seconds is None else self.model_flops / (self.step_seconds * self.target.chip.peak)

    @property
    def wire_seconds(self) -> float | None:
        """Collectives' bytes over the chip's published link speed: what must be hidden behind the arithmetic."""
        if self.program is None or self.target.gpu:
            return None
        return sum(c.wire for c in self.program.collectives) / self.target.chip.wire

    @property
    def tokens_per_chip(self) -> float:
        """Tokens per chip and step."""
        return self.exp.batch_size * self.exp.data.context / self.target.devices


def estimate(exp: Experiment, target: Slice, compiled: Compiled) -> Plan:
    """The plan of a prepared experiment from what the compiler left."""
    layout = exp.runtime.layout or Layout()
    sizes = layout.sizes(target.devices, target.shape)
    cost = info(exp.model, exp.data.context)
    tokens = exp.batch_size * exp.data.context / target.devices
    shapes = shapes_of(exp, layout, target.devices)
    made = None if compiled.scheduled is None else program(parse(compiled.scheduled), sizes)
    kernel_seconds, untimed = _timed(made, compiled, target)
    return Plan(
        exp,
        target,
        memory(parse(compiled.optimised), compiled.assignment, compiled.ranges, shapes, compiled.code),
        target.chip.hbm if compiled.limit is None else compiled.limit,
        made,
        tokens * cost.train_flops,
        tokens * 3 * cost.forward_flops["attention"],
        compiled,
        kernel_seconds,
        untimed,
        0.0 if made is None else _balanced_flops(made, exp, sizes),
    )


def _balanced_flops(made: Program, exp: Experiment, sizes: Mapping[str, int]) -> float:
    """Of all grouped matmuls, without the rows of an exchange's buffers that a balanced load leaves empty."""
    devices = sizes["expert"]
    tokens = exp.batch_size * exp.data.context // (shares(sizes) * sizes["sequence"] * exp.accumulate)
    used: dict[int, int] = {}
    for block in (block for stack in exp.model.stacks for block in stack.pattern):
        if isinstance(block.ffn, MoE) and devices > 1:
            choices = tokens * block.ffn.router.top_k
            used[devices * room((exp.runtime.layout or Layout()).spare, choices, devices)] = choices
    return sum(k.count * (k.flops or 0.0) * used.get(k.rows, k.rows) / k.rows for k in made.kernels if k.rows)


def _timed(made: Program | None, compiled: Compiled, target: Slice) -> tuple[dict[str, float], str | None]:
    """(seconds of one run of each kernel, None), or ({}, why they could not be timed)."""
    if target.gpu:
        return {}, NO_TIME
    if isinstance(compiled.calls, str):
        return {}, compiled.calls
    try:
        pallas = [k for k in made.kernels if k.rows is None] if made else []
        return seconds(pallas, compiled.calls, target.chip), None
    except Undecided as error:
        return {}, str(error)


def shapes_of(exp: Experiment, layout: Layout, devices: int) -> Shapes:
    """Every shape that tells weights and gradients from activations: of parameters, whole and as laid out.

    Stacked parameters [L, ...] come as one layer too.
    """
    sizes = layout.sizes(devices)
    found: set[tuple[int, ...]] = set()
    for p in leaves(transformer_params(exp.model)):
        for spec in ((), partition(p.axes, p.shape, layout, sizes), storage(p, layout, sizes)):
            ways = [math.prod(sizes[a] for a in _names(axes)) for axes in (*spec, *[None] * len(p.shape))]
            local = [n // w for n, w in zip(p.shape, ways, strict=False)]
            for piece in (local, local[1:]) if p.axes[0] == "layers" else (local,):
                found.add(tuple(sorted(n for n in piece if n > 1)))
    found |= {tuple(sorted((rows, exp.model.dim))) for rows in _head_chunks(exp.model.vocab, exp.runtime.vocab_chunk)}
    return Shapes(frozenset(found), frozenset(s.repeats for s in exp.model.stacks if s.repeats > 1))


def _names(axes: Any) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _head_chunks(vocab: int, chunk: int) -> set[int]:
    """Rows that a chunk of the head may have: vocab / n for the n around vocab / chunk that divide it."""
    least = -(-vocab // chunk)
    return {vocab // n for n in range(least, 2 * least + 1) if vocab % n == 0}


# ---------------------------------------------------------------------------------------------------------- advice


def advice(plan: Plan) -> list[str]:
    """What would help a plan that does not fit, most promising first, from its memory by part."""
    layout = plan.exp.runtime.layout or Layout()
    part = plan.memory.by_part
    state = part["parameters"] + part["optimiser"] + part["gradients"]
    moving = part["saved"] + part["working"]
    rows = plan.exp.batch_size // plan.exp.accumulate // shares(layout.sizes(plan.target.devices))
    options: list[tuple[int, str]] = []
    if plan.exp.runtime.remat != "full":
        options.append((part["saved"] + part["working"] // 2, "runtime.remat=full: save only each layer's input"))
    if rows > 1:
        more = plan.exp.accumulate * 2
        options.append((moving // 2, f"accumulate={more}: half as many rows at a time"))
    if layout.zero < 3:
        options.append(
            (state + part["weights"], "runtime.layout.zero=3: shard masters, moments and gradients, gather per layer")
        )
    if not layout.offload:
        options.append((part["optimiser"], "runtime.layout.offload=true: moments in the host's memory"))
    if plan.exp.runtime.vocab_chunk > 4096 and part["working"] > part["saved"]:
        options.append(
            (part["working"] // 4, f"runtime.vocab_chunk={plan.exp.runtime.vocab_chunk // 4}: fewer logits at a time")
        )
    tensor = layout.tensor * 2
    options.append((moving // 2, f"runtime.layout.tensor={tensor}: half the heads and ffn columns per chip"))
    options.append((state // 2, f"a slice of {plan.target.devices * 2} chips: half the state per chip"))
    ranked = sorted(options, key=lambda option: -option[0])
    return [f"{text} (about {size / 2**30:.1f} GiB less)" for size, text in ranked if size > 2**20]


def _hardware_flops(plan: Plan, made: Program) -> float:
    return made.matrix_flops + plan.kernel_flops + plan.grouped_flops


def _by_axes(made: Program) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for c in made.collectives:
        found[c.axes] += c.wire / 1e9
    return dict(found)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data. GiB are 2**30 bytes, GB 10**9; FLOPs, bytes and seconds are per chip and step."""
    made = plan.program
    return {
        "topology": plan.target.name,
        "fits": plan.fits,
        "hbm_gib": plan.memory.total / 2**30,
        "hbm_limit_gib": plan.limit / 2**30,
        "hbm_by_part": {part: size / 2**30 for part, size in plan.memory.by_part.items()},
        "model_tflop": plan.model_flops / 1e12,
        "hardware_tflop": None if made is None or plan.target.gpu else _hardware_flops(plan, made) / 1e12,
        "xla_seconds": plan.xla_seconds,
        "pallas_seconds": plan.pallas_seconds,
        "pallas_note": None if plan.untimed in (None, NO_TIME) else f"not timed, taken at peak: {plan.untimed}",
        "time_note": NO_TIME if plan.target.gpu else None,
        "pallas_calls": made and made.kernel_counts(),
        "grouped_seconds": plan.grouped_seconds,
        "step_seconds": plan.step_seconds,
        "mfu": plan.mfu,
        "mfu_formula": "model_tflop / (step_seconds x peak); step_seconds = xla_ + pallas_ + grouped_seconds",
        "collectives": made and {kind: {"count": n, "wire_gb": gb} for kind, (n, gb) in made.wire().items()},
        "wire_gb": made and sum(c.wire for c in made.collectives) / 1e9,
        "wire_gb_by_axes": made and _by_axes(made),
        "wire_seconds": plan.wire_seconds,
        "tokens": plan.tokens_per_chip,
        "unknown_loops": made and list(made.unknown_loops),
        "compile_seconds": plan.compiled.seconds,
        "compile_cpu_seconds": plan.compiled.cpu_seconds,
        "versions": plan.compiled.versions,
    }
