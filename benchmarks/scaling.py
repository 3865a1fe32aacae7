"""How a training step grows from 8 to 4,096 chips: by formula, beside what the compiler says where it was asked.

    python benchmarks/scaling.py [--compile POINT ...]      by formula: half a minute; each compiled point: minutes

It prints the tables of docs/scaling.md and draws docs/scaling.png. Compiled points are kept in benchmarks/scaling.json
and shown from there; `--compile` (a name of POINTS, or "all") makes them anew on Python 3.12 with jax 0.12.

    arithmetic = `plan.search`: matrices (3 + 1) + attention (3.5 + 1) forward FLOPs, at 80 % of the peak
    weights    = 3 gathers or scatters of every weight in bf16 per micro-batch, over the chip's links (ZeRO 3)
    exchanged  = activations: 12 crossings of a layer's stream for tensor or sequence, 6 of every choice for experts
    network    = a ring all-reduce between S slices of a slice's share of the bf16 gradients: 4 P (S - 1) / (S chips)
    step       = max(arithmetic, weights, network) + exchanged

The links are taken at their published rate in all directions at once, which only a ring over every axis reaches.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from jaxllm.config import Transformer
from jaxllm.experiment import Data, Experiment, Source, resolve
from jaxllm.models.llama import llama
from jaxllm.models.presets import PRESETS
from jaxllm.plan.compile import prepare
from jaxllm.plan.estimate import to_json
from jaxllm.plan.info import info
from jaxllm.plan.report import plan, write_json
from jaxllm.plan.search import Candidate, candidates, predict
from jaxllm.plan.topology import Slice, names, parse
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout
from jaxllm.show_mask import new_figure

HERE = Path(__file__).resolve().parent
GIB = 2**30
NETWORK = {"v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9}
"""Bytes/s per chip of the data centre's network, published: 6.4 Tbps per 256 chips, 50 Gbps per chip, 25.6 per 256."""


@dataclass(frozen=True)
class Model:
    """What is trained, in batches of `rows` of `context` tokens: 16.8 M, for DeepSeek-V3 67 M (62.9 M published)."""

    spec: Transformer
    context: int
    rows: int

    def experiment(self, rows: int | None = None, layout: Layout | None = None) -> Experiment:
        """Full recomputation, bfloat16 compute, fp32 AdamW."""
        runtime = Runtime("bfloat16", remat="full", layout=layout)
        rows = self.rows if rows is None else rows
        return resolve(
            Experiment(self.spec, Data((Source("corpus"),), self.context), 1000, rows, "runs/plan", runtime=runtime)
        )


LLAMA_405B = llama("llama31_405b", (126, 16_384, 128, 8, 128, 128_256, 53_248), theta=500_000.0, context=131_072)
MODELS = {
    "8B": Model(PRESETS["llama31_8b"](), 8192, 2048),
    "70B": Model(PRESETS["llama3_70b"](), 8192, 2048),
    "405B": Model(LLAMA_405B, 8192, 2048),
    "DeepSeek-V3": Model(PRESETS["deepseek_v3"](), 4096, 16_384),
}
CUBES = ("v5p:2x2x2", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x8", "v5p:8x16x16", "v5p:16x16x16")
PODS = (1, 2, 4, 8, 16)  # of 256 chips


@dataclass(frozen=True)
class Point:
    """A step to compile. rows: of the model's context, in all."""

    model: str
    topology: str
    rows: int
    layout: Layout = Layout()


POINTS = {
    "8B on 8": Point("8B", "v5p:2x2x2", 16),
    "8B on 512": Point("8B", "v5p:8x8x8", 1024),
    "8B on 4096": Point("8B", "v5p:16x16x16", 8192),
    "70B on 512": Point("70B", "v5p:8x8x8", 1024),
    "405B on 4096": Point("405B", "v5p:16x16x16", 4096),
    "DeepSeek-V3 on 512": Point("DeepSeek-V3", "v5p:8x8x8", 1024, Layout(expert=8)),
}


# ------------------------------------------------------------------------------------------------------- by formula


@cache
def best(name: str, target: Slice) -> Candidate | None:
    """The fastest by formula under full recomputation and ZeRO 3; None when nothing fits."""
    try:
        found = candidates(MODELS[name].experiment(), target)
    except ValueError:
        return None
    return next((c for c in found if _plain(c) and c.bytes <= target.chip.hbm), None)


def _plain(c: Candidate) -> bool:
    layout = c.exp.runtime.layout
    return c.exp.runtime.remat == "full" and layout is not None and layout.zero == 3


def strong(name: str, target: Slice) -> tuple[str, ...]:
    """One row: the model's own batch on so many chips."""
    model = MODELS[name]
    tokens = model.rows * model.context // target.devices
    c = best(name, target)
    if c is None:
        return name, target.name, f"{target.devices:,}", f"{tokens:,}", "does not fit", "", "", ""
    cost = info(model.spec, model.context)
    mfu = tokens * cost.train_flops / (c.seconds * target.chip.peak)
    layout = c.exp.runtime.layout or Layout()
    cut = " ".join(f"{axis} {n}" for axis in ("tensor", "expert", "sequence") if (n := getattr(layout, axis)) > 1)
    shown = f"{c.bytes / GIB:.1f}", f"{c.seconds:.2f}", f"{100 * mfu:.0f} %"
    return name, target.name, f"{target.devices:,}", f"{tokens:,}", cut or "FSDP", str(c.exp.accumulate), *shown


def seconds(model: Model, chip: str, tokens: float, chips: int, slices: int = 1) -> dict[str, float]:
    """Of one step of FSDP in each of so many slices of `chips`, `tokens` per chip: arithmetic, weights, network."""
    side = {"v5p": parse("v5p:4x4x4"), "v5e": parse("v5e:16x16"), "v6e": parse("v6e:16x16")}[chip].chip
    cost = info(model.spec, model.context)
    forward, stored = cost.forward_flops, cost.parameters["total"]
    flops = tokens * (4 * forward["matrices"] + 4.5 * forward["attention"])
    return {
        "arithmetic": flops / (0.8 * side.peak),
        "weights": 3 * 2 * stored * (chips - 1) / chips / side.wire,
        "network": 4 * stored / chips * (slices - 1) / slices / NETWORK[chip],
    }


def least_tokens(model: Model, chip: str, chips: int) -> float:
    """Tokens per chip and micro-batch below which gathering weights takes longer than multiplying by them."""
    one = seconds(model, chip, 1.0, chips)
    return one["weights"] / one["arithmetic"]


def least_slice(model: Model, chip: str) -> str:
    """The smallest slice that is sold on which FSDP with one row per chip fits by formula."""
    for target in map(parse, names()):
        if target.chip.name == chip:
            c = predict(prepare(model.experiment(target.devices), target), target)
            if c.bytes <= target.chip.hbm:
                return f"{target.name} ({c.bytes / GIB:.1f} GiB)"
    return "none"


# --------------------------------------------------------------------------------------------------------- compiled


def compile_points(wanted: Iterable[str], kept: Path) -> None:
    """Compile points and add their figures to the file, one after the other."""
    for name in wanted:
        point = POINTS[name]
        found = json.loads(kept.read_text()) if kept.exists() else {}
        made = to_json(plan(MODELS[point.model].experiment(point.rows, point.layout), point.topology, time_out=3000))
        write_json(str(kept), found | {name: made})


def compiled_table(found: dict[str, Any]) -> Table:
    """Compiled figures beside those of the formula."""
    table = _table("compiled", "tokens/chip", "layout", "GiB", "formula", "XLA + kernels s", "formula", "wire GB",
                  "formula", "links s", "compile CPU s")  # fmt: skip
    for name, made in found.items():
        point = POINTS[name]
        model, target = MODELS[point.model], parse(point.topology)
        c = predict(prepare(model.experiment(point.rows, point.layout), target), target)
        tokens = point.rows * model.context / target.devices
        by_formula = seconds(model, target.chip.name, tokens, target.devices)
        wire = _wire(model, point, tokens) / 1e9
        layout = f"FSDP {target.devices // point.layout.expert}" + (
            f" x expert {point.layout.expert}" if point.layout.expert > 1 else ""
        )
        step = f"{made['step_seconds']:.2f}" if made["fits"] else "does not fit"
        table.add_row(name, f"{tokens:,.0f}", layout, f"{made['hbm_gib']:.1f}", f"{c.bytes / GIB:.1f}", step,
                      f"{by_formula['arithmetic']:.2f}", f"{made['wire_gb'] or 0:.1f}", f"{wire:.1f}",
                      f"{made['wire_seconds'] or 0:.3f}", f"{made['compile_cpu_seconds']:.0f}")  # fmt: skip
    return table


def _wire(model: Model, point: Point, tokens: float) -> float:
    """Bytes by formula: three crossings of what a chip multiplies, six of every choice of experts."""
    total, experts, chosen = info(model.spec, model.context).parameters["total"], 0, 0
    for stack in model.spec.stacks:
        for block in stack.pattern:
            if hasattr(block.ffn, "router"):
                experts += stack.repeats * 3 * model.spec.dim * block.ffn.expert.hidden * block.ffn.experts
                chosen += stack.repeats * block.ffn.router.top_k
    here = total - experts + experts // point.layout.expert
    return 6 * here + (5 * 2 * model.spec.dim * tokens * chosen * point.layout.spare if point.layout.expert > 1 else 0)


# ---------------------------------------------------------------------------------------------------------- picture


def draw(found: dict[str, Any], path: Path) -> None:
    """Memory against chips; arithmetic and weights against chips; several pods. Lines by formula, stars compiled."""
    figure = new_figure(figsize=(15, 4.8))
    memory, step, pods = figure.subplots(1, 3)
    for i, name in enumerate(MODELS):
        _model_lines(name, memory, step, f"C{i}")
    for name, made in found.items():
        point = POINTS[name]
        colour, n = f"C{list(MODELS).index(point.model)}", parse(point.topology).devices
        memory.plot(n, made["hbm_gib"], "*", color=colour, markersize=12, markeredgecolor="black")
        scale = MODELS[point.model].rows / point.rows
        step.plot(
            n, (made["step_seconds"] or math.nan) * scale, "*", color=colour, markersize=12, markeredgecolor="black"
        )
    memory.axhline(95, color="black", linestyle="--", linewidth=1)
    memory.set_title("GiB per chip, v5p (line: 95)")
    step.set_title("seconds per batch, v5p: arithmetic, and weights (dashed)")
    _pods(pods)
    for axes, ticks in ((memory, (8, 64, 512, 4096)), (step, (8, 64, 512, 4096)), (pods, (256, 1024, 4096))):
        axes.set(xscale="log", yscale="log", xlabel="chips")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.minorticks_off()
    figure.savefig(path, dpi=110)


def _model_lines(name: str, memory: Any, step: Any, colour: str) -> None:
    """What fits, and the two times of one batch, at each size."""
    model, targets = MODELS[name], [parse(cube) for cube in CUBES]
    fits = [(target.devices, c.bytes / GIB) for target in targets if (c := best(name, target)) is not None]
    memory.plot(*zip(*fits, strict=True), "o-", color=colour, markersize=3, label=name)
    chips = [target.devices for target in targets]
    parts = [seconds(model, "v5p", model.rows * model.context / n, n) for n in chips]
    step.plot(chips, [p["arithmetic"] for p in parts], "-", color=colour, label=name)
    step.plot(chips, [p["weights"] for p in parts], "--", color=colour)


def _pods(axes: Any) -> None:
    """The 8B model on pods of v5e, gradients summed over the network between them."""
    axes.set_title("seconds per step, 8B on pods of 256 v5e")
    chips = [256 * n for n in PODS]
    for tokens in (8192, 1024):
        y = [seconds(MODELS["8B"], "v5e", tokens, 256, n)["arithmetic"] for n in PODS]
        axes.plot(chips, y, "-" if tokens == 8192 else ":", color="C0", label=f"arithmetic, {tokens:,} tokens per chip")
    found = [seconds(MODELS["8B"], "v5e", 1.0, 256, n) for n in PODS]
    axes.plot(chips, [f["weights"] for f in found], "--", color="C1", label="weights, links of a pod")
    axes.set_ylim(2e-3, 30)
    axes.plot(chips[1:], [f["network"] for f in found[1:]], "-.", color="C3", label="gradients, network between pods")


# ------------------------------------------------------------------------------------------------------------- main


def _table(*columns: str) -> Table:
    """A table to be pasted into a document."""
    return Table(*columns, box=MARKDOWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="+", default=[], metavar="POINT", help=f"of {', '.join(POINTS)}, or all")
    options = parser.parse_args()
    kept, console = HERE / "scaling.json", Console(width=160)
    compile_points(POINTS if options.compile == ["all"] else options.compile, kept)
    found = json.loads(kept.read_text()) if kept.exists() else {}
    table = _table("model", "slice", "chips", "tokens/chip", "layout", "micro-batches", "GiB", "step s", "MFU")
    for name in MODELS:
        for target in map(parse, CUBES):
            table.add_row(*strong(name, target))
    console.print(table)
    console.print(compiled_table(found))
    least = _table("model", *(f"{chip}, {n:,} chips" for chip, n in (("v5e", 256), ("v5p", 4096), ("v6e", 256))))
    for name, model in MODELS.items():
        least.add_row(
            name, *(f"{least_tokens(model, c, n):,.0f}" for c, n in (("v5e", 256), ("v5p", 4096), ("v6e", 256)))
        )
    console.print("tokens per chip and micro-batch below which gathering weights takes longer than arithmetic:", least)
    across = _table("8B on v5e", "chips", "arithmetic s, 8,192 tokens/chip", "weights s", "network s")
    for n in PODS:
        made = seconds(MODELS["8B"], "v5e", 8192, 256, n)
        across.add_row(
            f"{n} x 16x16", f"{256 * n:,}", *(f"{made[k]:.3f}" for k in ("arithmetic", "weights", "network"))
        )
    console.print(across)
    smallest = _table("smallest slice by memory", "v5e", "v5p", "v6e")
    for name, model in MODELS.items():
        smallest.add_row(name, *(least_slice(model, chip) for chip in ("v5e", "v5p", "v6e")))
    console.print(smallest)
    draw(found, HERE.parent / "docs" / "scaling.png")


if __name__ == "__main__":
    main()
