"""`jaxllm plan` and `jaxllm info` on a terminal and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxllm.architectures import Spec, halves
from jaxllm.config import Transformer
from jaxllm.data.files import write_atomic
from jaxllm.experiment import Experiment, load_config, saved
from jaxllm.model import Run, locate, spec_of
from jaxllm.models.presets import EVERY
from jaxllm.plan.compile import TIME_OUT, compile_step, prepare, require_compiler
from jaxllm.plan.estimate import NO_TIME, Plan, advice, estimate, to_json
from jaxllm.plan.info import Info, info, parameters_by_part, training_bytes
from jaxllm.plan.memory import PARTS
from jaxllm.plan.picture import draw, require_drawable
from jaxllm.plan.program import GROUPED, Program
from jaxllm.plan.topology import Slice, parse

GIB = 2**30


# ------------------------------------------------------------------------------------------------------------ plan


def plan(exp: Experiment, topology: str, *, time_out: float = TIME_OUT, console: Console | None = None) -> Plan:
    """Compile the experiment's train step for a slice such as "v5e:16x16" and estimate its memory and time.

    Raises ValueError for an unknown slice, a layout or batch that does not fit, or a missing compiler; TimeoutError;
    RuntimeError when the compiler fails.
    """
    target = parse(topology)
    require_compiler(target)
    ready = prepare(exp, target)
    shown = Console(stderr=True) if console is None else console
    with shown.status("starting the compiler") as status:

        def show(phase: str, elapsed: float) -> None:
            status.update(f"{phase} for {target.name}, {elapsed:.0f} s (an 8B model takes 1 to 3 minutes)")

        compiled = compile_step(ready, target, time_out=time_out, progress=show)
    return estimate(ready, target, compiled)


def plan_command(
    config_path: str,
    overrides: Iterable[str],
    topology: str,
    json_path: str | None = None,
    time_out: float = TIME_OUT,
    picture: str | None = None,
) -> int:
    """`jaxllm plan CONFIG --topology NAME`: print the plan. Returns 0, or 1 when it does not fit."""
    if picture is not None:
        require_timed(parse(topology), "--report draws seconds")
        require_drawable(Path(picture))
    result = plan(load_config(config_path, overrides), topology, time_out=time_out)
    print_plan(result, Console())
    if picture is not None and result.fits:
        draw(f"{result.exp.model.name} on {topology}", [(result.exp.model.name, to_json(result))], Path(picture))
    if json_path is not None:
        write_json(json_path, to_json(result))
    return 0 if result.fits else 1


def require_timed(target: Slice, what: str) -> None:
    """Raise ValueError for chips whose programs have no estimated time."""
    if target.gpu:
        raise ValueError(f"plan: {what}, and {NO_TIME}; for {target.name} plan one layout at a time, with --json FILE")


def print_plan(result: Plan, console: Console) -> None:
    """Memory by part, time, collectives, costliest operations; advice when it does not fit."""
    exp, target = result.exp, result.target
    console.print(f"[bold]{exp.model.name}[/] on [bold]{target.name}[/] ({target.devices} chips), per chip:")
    console.print(_memory_table(result))
    if not result.fits:
        over = result.memory.total - result.limit
        console.print(
            f"[bold red]Does not fit[/]: needs {result.memory.total / GIB:.2f} GiB of {result.limit / GIB:.2f} GiB, "
            f"{over / GIB:.2f} GiB too much. What would help:"
        )
        for line in advice(result):
            console.print(f"  - {line}", highlight=False)
        return
    if target.gpu:
        kernels = result.program.kernel_counts() if result.program else {}
        counts = ", ".join(f"{kind} x{count}" for kind, count in kernels.items())
        console.print(f"No time: {NO_TIME}. Pallas kernels: {counts or 'none'}.", highlight=False)
    else:
        console.print(_time_table(result))
    console.print(_wire_table(result))
    if not target.gpu:
        console.print(_cost_table(result))
        console.print(_limits(result), highlight=False)


def _memory_table(result: Plan) -> Table:
    table = plain_table("memory", "GiB", "what it is")
    for part, size in result.memory.by_part.items():
        if size >= result.memory.total / 1000:
            table.add_row(part, f"{size / GIB:.4g}", PARTS[part])
    table.add_row("[bold]peak", f"[bold]{result.memory.total / GIB:.3g}", f"of {result.limit / GIB:.2f}")
    for name, size in result.memory.largest[:4]:
        table.add_row("  largest", f"{size / GIB:.4g}", escape(name[:150]), style="dim")
    return table


def _time_table(result: Plan) -> Table:
    made, chip = result.program, result.target.chip
    assert made is not None and result.xla_seconds is not None, "only called for a plan that was timed"
    table = plain_table("time, as the compiler estimates it", "", "formula")
    table.add_row(
        "XLA", _seconds(result.xla_seconds), f"{made.cycles / 1e6:,.0f} M cycles / {chip.clock / 1e9:.2f} GHz"
    )
    if any(k.rows is None for k in made.kernels):
        table.add_row("Pallas kernels", *_kernel_row(result, made))
    if result.grouped_flops:
        shown = f"{result.grouped_flops / 1e12:,.0f} TFLOP at {chip.peak / 1e12:.0f} TFLOP/s, experts equally loaded"
        table.add_row("grouped matmuls", _seconds(result.grouped_seconds or 0), shown)
    step = "" if result.untimed is None else "at least "
    tokens = result.tokens_per_chip / (result.step_seconds or 1)
    table.add_row(
        "step", step + _seconds(result.step_seconds or 0), f"{tokens:,.0f} tokens/s per chip, collectives hidden"
    )
    table.add_row("model FLOPs", f"{result.model_flops / 1e12:.4g} TFLOP", "3 x forward, attention counted causally")
    hardware = (made.matrix_flops + result.kernel_flops + result.grouped_flops) / 1e12
    table.add_row(
        "hardware FLOPs", f"{hardware:.4g} TFLOP", "compiled matrix products and kernels, recomputation included"
    )
    formula = f"model FLOPs / (step x {chip.peak / 1e12:.0f} TFLOP/s)"
    table.add_row("MFU", f"{'' if result.untimed is None else 'at most '}{100 * (result.mfu or 0):.1f} %", formula)
    seconds = f"{result.compiled.seconds:.0f} s"
    table.add_row("compilation", seconds, f"{result.compiled.cpu_seconds:.0f} s of CPU, {_versions(result)}")
    return table


def _kernel_row(result: Plan, made: Program) -> tuple[str, str]:
    """Seconds of the kernels, and how they were found."""
    counts = ", ".join(f"{kind} x{count}" for kind, count in made.kernel_counts().items() if GROUPED not in kind)
    if result.pallas_seconds is not None:
        return _seconds(result.pallas_seconds), f"their bundles run, every row one document ({counts})"
    chip = result.target.chip
    at_peak = f"at least {result.kernel_flops / chip.peak:.3f} s: {result.kernel_flops / 1e12:.0f} TFLOP at peak"
    return "not timed", f"{at_peak} ({counts}); {result.untimed}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _versions(result: Plan) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.compiled.versions.items())


def _wire_table(result: Plan) -> Table:
    table = plain_table("collectives", "count", "wire GB", "axes", "largest")
    made = result.program
    for kind, axes in sorted({(c.kind, c.axes) for c in made.collectives} if made else ()):
        mine = [c for c in made.collectives if (c.kind, c.axes) == (kind, axes)]  # type: ignore[union-attr]
        gigabytes = sum(c.wire for c in mine) / 1e9
        largest = f"{escape(mine[0].shape)} {_place(mine[0].source)}"
        table.add_row(kind, str(sum(c.count for c in mine)), f"{gigabytes:.3f}", axes, largest)
    return table


def _cost_table(result: Plan) -> Table:
    table = plain_table("costliest operations", "M cycles", "%", "runs", "matrix %", "source")
    made, chip = result.program, result.target.chip
    for cost in made.costs[:10] if made else ():
        share = 100 * cost.cycles / max(made.cycles, 1)  # type: ignore[union-attr]
        use = 100 * cost.flops / (cost.cycles / chip.clock * chip.peak) if cost.cycles else 0
        row = f"{cost.cycles / 1e6:,.4g}", f"{share:.1f}", str(cost.count), f"{use:.0f}" if cost.flops else ""
        table.add_row(escape(cost.name), *row, _place(cost.source))
    return table


def _limits(result: Plan) -> str:
    """What limits the step: arithmetic, or the links if they need longer."""
    wire, step = result.wire_seconds or 0.0, result.step_seconds or 0.0
    rate = f"{result.target.chip.wire / 1e9:.0f} GB/s per chip"
    if wire > step:
        return f"Limited by the links: {wire:.2f} s at {rate} against {step:.2f} s of arithmetic."
    return f"Limited by arithmetic: collectives need {wire:.2f} s at {rate}. A compiler's model, not a chip."


def _place(source: str) -> str:
    """The last two parts of a source path."""
    return "/".join(source.split("/")[-2:])


def plain_table(first: str, *rest: str) -> Table:
    """A table without lines: names on the left, figures on the right."""
    table = Table(box=None, pad_edge=False, header_style="bold cyan", padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True, max_width=48)
    for name in rest:
        words = name in ("what it is", "formula", "source", "largest", "axes", "layout", "")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    return table


# ------------------------------------------------------------------------------------------------------------ info


def info_command(target: str, overrides: Iterable[str] = (), json_path: str | None = None, devices: int = 1) -> int:
    """`jaxllm info CONFIG`: a config file, a run directory, a model folder or file, or a preset's name. Returns 0."""
    found = find(target, overrides)
    match found:
        case Experiment():
            cost = info(found.model, found.data.context)
            cost = dataclasses.replace(cost, training_bytes=training_bytes(found, devices))
        case Transformer():
            cost = info(found)
        case _:
            return _compound_info(found, json_path)
    print_info(cost, Console(), devices)
    if json_path is not None:
        write_json(json_path, dataclasses.asdict(cost) | {"devices": devices})
    return 0


def _compound_info(spec: Spec, json_path: str | None) -> int:
    """Parameters of the whole, and the costs of its transformers over tokens. Towers over pixels are counted only."""
    console, parameters = Console(), parameters_by_part(spec)
    costs = {name: info(half) for name, half in halves(spec).items()}
    console.print(f"[bold]{spec.name}[/], a model of several parts")
    print_parameters(parameters, console)
    for name, cost in costs.items():
        console.print(f"[bold]{name}[/] at a context of {cost.context:,} tokens")
        print_costs(cost, console)
    if json_path is not None:
        write_json(json_path, {"name": spec.name, "parameters": parameters}
                   | {name: dataclasses.asdict(cost) for name, cost in costs.items()})  # fmt: skip
    return 0


def find(target: str, overrides: Iterable[str] = ()) -> Experiment | Spec:
    """An experiment from a config file or run directory, or the spec of a model folder, file or preset.

    Raises ValueError when it is none of them.
    """
    if target.endswith(".py"):
        return load_config(target, overrides)
    if target in EVERY and not Path(target).exists():
        return EVERY[target]()
    try:
        match locate(target):
            case Run(path):
                return saved((path / "config.json").read_text())
            case _:
                return spec_of(target)
    except FileNotFoundError:
        raise ValueError(
            f"info: {target!r} must be a config file (.py), a run directory, a model folder or .gguf file, or one of "
            f"{', '.join(EVERY)}"
        ) from None


def print_info(cost: Info, console: Console, devices: int = 1) -> None:
    """Parameters, FLOPs, cache and training memory."""
    console.print(f"[bold]{cost.name}[/] at a context of {cost.context:,} tokens")
    print_parameters(cost.parameters, console)
    print_costs(cost, console)
    if cost.training_bytes is not None:
        table = plain_table(f"training memory, {devices} chip{'s' * (devices > 1)}, by formula", "GiB per chip")
        for part, size in cost.training_bytes.items():
            table.add_row(part, f"{size / GIB:.3f}")
        console.print(table)


def print_parameters(parameters: Mapping[str, int], console: Console) -> None:
    """Counts by part."""
    table = plain_table("parameters", "count")
    for part, n in parameters.items():
        table.add_row(part, f"{n:,}")
    console.print(table)


def print_costs(cost: Info, console: Console) -> None:
    """FLOPs per token and cache."""
    table = plain_table("FLOPs per token", "GFLOP", "formula")
    forward = cost.forward_flops
    table.add_row(
        "forward, matrices", f"{forward['matrices'] / 1e9:.3f}", f"2 x {cost.matrix_parameters:,} multiplied parameters"
    )
    keys = (
        "2 x heads x (key + value width) x keys seen on average, summed over layers; (T + 1) / 2 keys if causal, less "
        "in windows"
    )
    table.add_row("forward, attention", f"{forward['attention'] / 1e9:.3f}", keys)
    table.add_row("training", f"{cost.train_flops / 1e9:.3f}", "3 x forward; recomputation not counted")
    console.print(table)
    if cost.kv_bytes:
        table = plain_table("KV cache, bfloat16", "bytes")
        table.add_row("one token, while no window is full", f"{cost.kv_bytes:,}")
        table.add_row(f"{cost.context:,} tokens", f"{cost.kv_bytes_context:,}")
        table.add_row("one more than these", f"{cost.kv_bytes_next:,}")
        console.print(table)


def write_json(path: str, data: Any) -> None:
    """Write JSON data; the file appears whole or not at all."""
    write_atomic(epath.Path(path), (json.dumps(data, indent=1) + "\n").encode())
