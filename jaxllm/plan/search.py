"""Which layout fits a slice and is fastest: all of them by formula, the most promising by the compiler.

    predicted memory  = `zero.step_bytes`                                       within 15 % of what was compiled
    predicted seconds = max(arithmetic / (0.8 peak), weights' wire / links) + activations' wire / links
    arithmetic        = 3 x matrices + 3.5 x attention, forward FLOPs, + head + what is made again (`saved.py`)

A flash backward pass has 5 products for the forward's 2, so 2.5 of its FLOPs. The loss makes its logits twice. 0.8 is
what the compiler makes of the matrix unit in the steps of docs/benchmarks.md. Weights and gradients travel beside the
arithmetic, the activations that other layouts exchange in turn with it. Wire bytes: ZeRO 3 moves every weight three
times per micro-batch, ZeRO 1 twice per step; a tensor-parallel layer moves its residual stream twelve times (six
all-reduces, two of them recomputed), a split sequence as much, a mixture every choice six.

Candidates whose prediction exceeds the chip's memory by more than 15 % are dropped, the others compiled in order of
predicted tokens/s, one at a time, each in a child process, until the budget is spent; what was compiled before by this
code is read from the cache. The rank is by tokens/s per chip of those that fit, with the compiler's figures in the
same formula: predictions only choose what is compiled first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from etils import epath

from jaxllm import serial
from jaxllm.config import MoE
from jaxllm.data.files import write_atomic
from jaxllm.experiment import Experiment
from jaxllm.plan.compile import prepare, versions
from jaxllm.plan.info import declared, info, require_formula
from jaxllm.plan.saved import ladder, recomputed_flops
from jaxllm.plan.topology import Slice, names, parse
from jaxllm.plan.zero import elements, step_bytes
from jaxllm.sharding import DATA, Layout

EFFICIENCY = 0.8
"""Of the matrix unit's peak."""
SPLITS = ("tensor", "expert", "sequence")
"""Axes of a layout that a search chooses."""
SLACK = 1.15
"""Predicted over available memory up to which a candidate is worth compiling."""

_OF_WEIGHTS = {"replica", *DATA}
"""Axes over which weights and gradients travel."""


@dataclass(frozen=True)
class Candidate:
    """One way to run an experiment on a slice. bytes, seconds: predicted, per chip and step."""

    exp: Experiment
    target: Slice
    bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Per chip, predicted."""
        return self.exp.batch_size * self.exp.data.context / self.target.devices / self.seconds

    @property
    def label(self) -> str:
        """What distinguishes it from others of its search."""
        layout = self.exp.runtime.layout or Layout()
        axes = {name: getattr(layout, name) for name in SPLITS}
        cut = " ".join(f"{name} {n}" for name, n in axes.items() if n > 1)
        remat = self.exp.runtime.remat
        saved = f"remat {remat}" if isinstance(remat, str) else f"saving {'+'.join(remat)}"
        rest = f"ZeRO {layout.zero}, {saved}, accumulate {self.exp.accumulate}"
        return f"{cut}, {rest}" if cut else rest


@dataclass(frozen=True)
class Found:
    """A compiled candidate: `estimate.to_json` of its plan, or why there is none."""

    candidate: Candidate
    figures: dict[str, Any] | None
    problem: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Per chip, by arithmetic and links; None when it does not fit."""
        made = self.figures
        if made is None or not made["fits"]:
            return None
        links = made["wire_seconds"] / max(made["wire_gb"], 1e-9)
        of_weights = sum(gb for axes, gb in made["wire_gb_by_axes"].items() if set(axes.split("+")) <= _OF_WEIGHTS)
        return made["tokens"] / (max(made["step_seconds"], of_weights * links) + (made["wire_gb"] - of_weights) * links)


# -------------------------------------------------------------------------------------------------------- predicting


def predict(exp: Experiment, target: Slice) -> Candidate:
    """A prepared experiment with its predicted bytes and seconds."""
    held = step_bytes(exp, target.devices)
    return Candidate(exp, target, held.arguments + held.temporary, _seconds(exp, target))


def _seconds(exp: Experiment, target: Slice) -> float:
    layout = exp.runtime.layout or Layout()
    sizes, cost = layout.sizes(target.devices), info(exp.model, exp.data.context)
    tokens = exp.batch_size * exp.data.context / target.devices
    places = [(block, stack.repeats) for stack in exp.model.stacks for block in stack.pattern]
    again = sum(n * recomputed_flops(block, exp.model, exp.data.context, exp.runtime) for block, n in places)
    head = 2.0 * exp.model.dim * exp.model.vocab
    flops = tokens * (3 * cost.forward_flops["matrices"] + 3.5 * cost.forward_flops["attention"] + head + again)
    stored, used = elements(layout, sizes)
    moved = 2 * sum(used(p) for p in declared(exp.model).values() if used(p) > stored(p))
    moves = 3 * exp.accumulate if layout.zero == 3 else 2
    stream = 2 * exp.model.dim * tokens
    layers = exp.model.layers
    exchanged = 12 * stream * layers * layout.tensor if layout.tensor > 1 else 0
    exchanged += 6 * stream * _chosen(exp) if layout.expert > 1 else 0
    exchanged += 12 * stream * layers if layout.sequence > 1 else 0
    weights = moved * moves / target.chip.wire
    return max(flops / (EFFICIENCY * target.chip.peak), weights) + exchanged / target.chip.wire


def _chosen(exp: Experiment) -> int:
    """Experts that a token meets, over all layers."""
    blocks = [block for stack in exp.model.stacks for block in stack.pattern * stack.repeats]
    return sum(block.ffn.router.top_k for block in blocks if isinstance(block.ffn, MoE))


def candidates(exp: Experiment, target: Slice) -> list[Candidate]:
    """Every layout, recomputation and micro-batch of the experiment that the slice and the model admit.

    Best first: by predicted tokens/s, then few micro-batches, among those that may fit. Raises ValueError when none
    may, with the least bytes.
    """
    found = [predict(one, target) for one in _admitted(exp, target)]
    if not found:
        prepare(exp, target)  # says why, if that is why
        raise ValueError(
            f"search: no layout divides batch_size={exp.batch_size} over {target.name}; choose a multiple of "
            f"{target.devices}"
        )
    possible = [c for c in found if c.bytes <= SLACK * target.chip.hbm]
    if not possible:
        least = min(found, key=lambda c: c.bytes)
        raise ValueError(
            f"search: {exp.model.name} fits {target.name} in no way: the least is {least.bytes / 2**30:.1f} GiB per "
            f"chip ({least.label}) of {target.chip.hbm / 2**30:.0f}; take a larger slice, or data.context below "
            f"{exp.data.context}"
        )
    return sorted(possible, key=lambda c: (-c.tokens_per_second, c.exp.accumulate, c.bytes))


def _admitted(exp: Experiment, target: Slice) -> Iterator[Experiment]:
    """Splits over tensor and, where there are experts, over them; over sequence where rows are fewer than chips."""
    powers = [2**i for i in range(target.devices.bit_length()) if target.devices % 2**i == 0]
    own = exp.runtime.layout or Layout()
    mixture = any(isinstance(block.ffn, MoE) for stack in exp.model.stacks for block in stack.pattern)
    axes = powers[:5], powers[:7] if mixture else [1], powers if exp.batch_size < target.devices else [1]
    for tensor, expert, sequence in itertools.product(*axes):
        ways = target.devices // (tensor * sequence)
        for zero, remat in itertools.product((3, 1), ladder(exp.model)):
            layout = replace(own, data=None, replica=1, zero=zero, tensor=tensor, expert=expert, sequence=sequence)
            offload = () if remat == "none" else exp.runtime.offload
            runtime = replace(exp.runtime, layout=layout, remat=remat, offload=offload)
            for accumulate in (2**i for i in range((exp.batch_size // max(ways, 1)).bit_length())):
                try:
                    yield prepare(replace(exp, runtime=runtime, accumulate=accumulate), target)
                except ValueError:
                    continue


# --------------------------------------------------------------------------------------------------------- compiling


def search(
    wanted: list[Candidate],
    compile_one: Callable[[Candidate], dict[str, Any]],
    *,
    minutes: float,
    progress: Callable[[int, Candidate], None] = lambda i, c: None,
) -> Iterator[Found]:
    """Compiles candidates in order until the time is spent (at least one). `compile_one` gives `estimate.to_json`.

    One of the same layout and no less predicted memory as one that did not fit is passed over.
    """
    end = time.monotonic() + 60 * minutes
    failed: list[Candidate] = []
    for i, candidate in enumerate(wanted):
        if i and time.monotonic() > end:
            return
        if any(_hopeless(candidate, other) for other in failed):
            continue
        progress(i, candidate)
        try:
            found = Found(candidate, compile_one(candidate))
        except (RuntimeError, TimeoutError) as error:
            found = Found(candidate, None, str(error))
        if found.tokens_per_second is None and found.problem is None:
            failed.append(candidate)
        yield found


def _hopeless(candidate: Candidate, failed: Candidate) -> bool:
    """Whether the compiler's refusal of one says it of the other: the same layout, and no less predicted memory."""
    return candidate.exp.runtime.layout == failed.exp.runtime.layout and candidate.bytes >= failed.bytes


def cached(compile_one: Callable[[Candidate], dict[str, Any]], folder: Path) -> Callable[[Candidate], dict[str, Any]]:
    """`compile_one` that keeps what it made in `folder`, by experiment, slice, compiler and this library's source."""
    stamp = _source_hash() + os.environ.get("LIBTPU_INIT_ARGS", "")

    def get(candidate: Candidate) -> dict[str, Any]:
        plain = replace(candidate.exp, run_dir="", samples=())
        compiler = json.dumps(versions(candidate.target), sort_keys=True)
        key = hashlib.sha256((stamp + compiler + candidate.target.name + serial.dumps(plain)).encode()).hexdigest()[:32]
        path = folder / f"{key}.json"
        if path.exists():
            return json.loads(path.read_text())
        made = compile_one(candidate)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(epath.Path(path), json.dumps(made).encode())
        return made

    return get


def _source_hash() -> str:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Offer:
    """A slice that trains in time. days, chip_hours: predicted, at the best candidate's speed."""

    candidate: Candidate
    days: float
    chip_hours: float


def offers(exp: Experiment, tokens: float, days: float, chips: tuple[str, ...] = ("v5e", "v5p", "v6e")) -> list[Offer]:
    """Slices on which the experiment sees `tokens` within `days`, by formula; fewest chip-hours first.

    Raises ValueError when none does, with the fastest, and for layouts of whose memory no formula speaks.
    """
    require_formula(exp.runtime.layout or Layout())
    found, last = [], ""
    for target in (parse(name) for name in names() if name.split(":")[0] in chips):
        try:
            best = candidates(exp, target)[0]
        except ValueError as error:
            last = f"{target.name}: {error}"
            continue
        seconds = tokens / (best.tokens_per_second * target.devices)
        found.append(Offer(best, seconds / 86400, seconds / 3600 * target.devices))
    if not found:
        raise ValueError(f"cheapest: {exp.model.name} fits no slice of {', '.join(chips)}; reduce data.context. {last}")
    in_time = sorted((o for o in found if o.days <= days), key=lambda o: o.chip_hours)
    if not in_time:
        fastest = min(found, key=lambda o: o.days)
        raise ValueError(
            f"cheapest: no slice sees {tokens:.3g} tokens in {days:g} days; the fastest, "
            f"{fastest.candidate.target.name}, takes {fastest.days:.1f}"
        )
    return in_time


@dataclass(frozen=True)
class Decoding:
    """Decoding bound by bytes: a step reads all weights once and every row's cache, and gives a token to each row.

    weight_bytes, cache_bytes: per chip.  tokens_per_second: of all rows together, their caches full.
    fits: whether both fit the chip with a tenth to spare.
    """

    weight_bytes: int
    cache_bytes: int
    tokens_per_second: float
    fits: bool


def decoding(exp: Experiment, target: Slice, batch: int) -> Decoding:
    """A bound on decoding `batch` rows of `data.context` tokens, weights and cache in bfloat16, cut over all chips."""
    cost = info(exp.model, exp.data.context)
    weights = 2 * cost.parameters["total"] // target.devices
    cache = batch * cost.kv_bytes_context // target.devices
    speed = batch * target.chip.bandwidth / (weights + cache)
    return Decoding(weights, cache, speed, weights + cache <= 0.9 * target.chip.hbm)
