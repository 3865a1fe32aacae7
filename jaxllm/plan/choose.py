"""`jaxllm plan --search`, `--cheapest` and `--decode`: plans compared, the best one written as a config file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxllm.data.files import write_atomic
from jaxllm.experiment import load_config
from jaxllm.plan.compile import TIME_OUT, compile_step, require_compiler
from jaxllm.plan.estimate import estimate, to_json
from jaxllm.plan.picture import draw, require_drawable
from jaxllm.plan.report import GIB, plain_table, require_timed, write_json
from jaxllm.plan.search import Candidate, Found, cached, candidates, decoding, offers, search
from jaxllm.plan.topology import parse
from jaxllm.sharding import Layout

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jaxllm" / "plans"


def search_command(
    config: str,
    overrides: Iterable[str],
    topology: str,
    *,
    minutes: float,
    out: str | None = None,
    json_path: str | None = None,
    picture: str | None = None,
) -> int:
    """`jaxllm plan CONFIG --topology NAME --search`: a table of what was compiled. Returns 0, or 1: nothing fits."""
    if picture is not None:
        require_drawable(Path(picture))
    if out is not None and (Path(out).suffix != ".py" or not Path(out).resolve().parent.is_dir()):
        raise ValueError(f"plan: --out must be a .py file in a directory that exists, got {out!r}")
    overrides = list(overrides)
    exp, target, console = load_config(config, overrides), parse(topology), Console()
    require_timed(target, "--search ranks by seconds")
    require_compiler(target)
    wanted = candidates(exp, target)
    console.print(
        f"{exp.model.name} on {target.name}: {len(wanted)} layouts may fit by formula; compiling the most promising "
        f"for {minutes:g} minutes, then the one under way",
        highlight=False,
    )
    found = _compile_all(wanted, minutes, console)
    ranked = sorted(found, key=lambda f: -(f.tokens_per_second or 0))
    console.print(_table(ranked))
    if json_path is not None:
        write_json(json_path, [_row(f) for f in ranked])
    if ranked[0].tokens_per_second is None:
        console.print("[bold red]None of these fits[/]; give the search more --minutes, or take a larger slice")
        return 1
    if picture is not None:
        fits = [(f.candidate.label, f.figures) for f in ranked if f.tokens_per_second is not None and f.figures]
        draw(f"{exp.model.name} on {target.name}", fits, Path(picture))
        console.print(f"wrote {picture}")
    if out is not None:
        write_config(Path(out), config, overrides, ranked[0].candidate, topology)
        console.print(f"wrote {out}: jaxllm plan {out} --topology {topology}")
    return 0


def _compile_all(wanted: list[Candidate], minutes: float, console: Console) -> list[Found]:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=60 * minutes)

        def show(i: int, candidate: Candidate) -> None:
            bar.update(task, description=f"candidate {i + 1} of {len(wanted)}: {candidate.label}")

        def tick(phase: str, elapsed: float) -> None:
            bar.update(task, completed=bar.tasks[0].elapsed or 0)

        def compile_one(candidate: Candidate) -> dict[str, Any]:
            made = compile_step(candidate.exp, candidate.target, time_out=TIME_OUT, progress=tick)
            return to_json(estimate(candidate.exp, candidate.target, made))

        found = []
        for one in search(wanted, cached(compile_one, CACHE), minutes=minutes, progress=show):
            found.append(one)
            speed = one.tokens_per_second
            result = one.problem or ("does not fit" if speed is None else f"{speed:,.0f} tokens/s per chip")
            console.print(f"  {one.candidate.label}: {result}", highlight=False)
    return found


def _table(ranked: list[Found]) -> Table:
    table = plain_table("layout", "GiB", "by formula", "step s", "by formula", "tokens/s/chip", "MFU %")
    for one in ranked:
        made, c = one.figures, one.candidate
        if made is None:
            table.add_row(c.label, "", f"{c.bytes / GIB:.2f}", "", f"{c.seconds:.3f}", one.problem or "", style="dim")
            continue
        speed = one.tokens_per_second
        measured = f"{made['step_seconds']:.3f}" if speed else ""
        shown = (f"{speed:,.0f}", f"{100 * made['mfu']:.1f}") if speed else ("does not fit", "")
        memory = f"{made['hbm_gib']:.2f}", f"{c.bytes / GIB:.2f}"
        table.add_row(c.label, *memory, measured, f"{c.seconds:.3f}", *shown, style="" if speed else "dim")
    return table


def _row(one: Found) -> dict[str, Any]:
    c = one.candidate
    predicted = {"predicted_gib": c.bytes / GIB, "predicted_seconds": c.seconds, "accumulate": c.exp.accumulate}
    speed = {"tokens_per_second_per_chip": one.tokens_per_second, "problem": one.problem}
    return {"layout": c.label} | predicted | speed | (one.figures or {})


def write_config(path: Path, base: str, overrides: list[str], best: Candidate, topology: str) -> None:
    """A config file that is `base` with the candidate's layout, recomputation and micro-batch."""
    layout = best.exp.runtime.layout or Layout()
    chosen = {f.name: getattr(layout, f.name) for f in fields(layout) if getattr(layout, f.name) != f.default}
    start = os.path.relpath(base, path.resolve().parent)
    lines = [
        f'"""{best.exp.model.name} for {topology}: {best.label}.',
        "",
        "Found by `jaxllm plan --search`; everything else is the config it starts from.",
        '"""',
        "",
        "from dataclasses import replace",
        "from pathlib import Path",
        "",
        "from jaxllm.experiment import Experiment, load_config",
        "from jaxllm.sharding import Layout",
        "",
        f"BASE = Path(__file__).resolve().parent / {start!r}",
        "",
        "",
        "def config() -> Experiment:",
        f'    """{best.exp.model.name} on {topology}."""',
        f"    base = load_config(str(BASE), {overrides!r})",
        f"    layout = Layout({', '.join(f'{name}={value!r}' for name, value in chosen.items())})",
        f"    runtime = replace(base.runtime, remat={best.exp.runtime.remat!r}, layout=layout)",
        f"    return replace(base, accumulate={best.exp.accumulate}, runtime=runtime)",
        "",
    ]
    write_atomic(epath.Path(path), "\n".join(lines).encode())


# ------------------------------------------------------------------------------------------------------ by formula


def cheapest_command(config: str, overrides: Iterable[str], tokens: float, days: float, json_path: str | None) -> int:
    """`jaxllm plan CONFIG --cheapest TOKENS DAYS`: slices that train in time, in chip-hours, by formula. Returns 0."""
    exp = load_config(config, overrides)
    table = plain_table("slice", "days", "chip-hours", "tokens/s/chip", "GiB", "layout")
    found = offers(exp, tokens, days)
    for o in found:
        c = o.candidate
        figures = f"{o.days:.1f}", f"{o.chip_hours:,.0f}", f"{c.tokens_per_second:,.0f}", f"{c.bytes / GIB:.1f}"
        table.add_row(c.target.name, *figures, c.label)
    console = Console()
    console.print(f"{exp.model.name}, {tokens:.3g} tokens within {days:g} days, {exp.batch_size} rows per step:")
    console.print(table)
    console.print("By formula; ask the compiler with: jaxllm plan CONFIG --topology SLICE --search", highlight=False)
    if json_path is not None:
        write_json(json_path, [{"topology": o.candidate.target.name, "days": o.days, "chip_hours": o.chip_hours,
                                "layout": o.candidate.label} for o in found])  # fmt: skip
    return 0


def decode_command(config: str, overrides: Iterable[str], topology: str, batch: int, json_path: str | None) -> int:
    """`jaxllm plan CONFIG --topology NAME --decode BATCH`: cache and the bound of the memory. Returns 0, 1: too big."""
    exp, target = load_config(config, overrides), parse(topology)
    made, console = decoding(exp, target, batch), Console()
    console.print(
        f"{exp.model.name} decoding {batch} rows of {exp.data.context:,} tokens on {target.name}, bfloat16, per chip: "
        f"weights {made.weight_bytes / GIB:.2f} GiB, cache {made.cache_bytes / GIB:.2f} GiB of "
        f"{target.chip.hbm / GIB:.0f}. At most {made.tokens_per_second:,.0f} tokens/s in all, "
        f"{made.tokens_per_second / batch:,.1f} per row: a step reads both once at {target.chip.bandwidth / 1e9:,.0f} "
        "GB/s.",
        highlight=False,
    )
    if json_path is not None:
        write_json(json_path, vars(made) | {"topology": target.name, "batch": batch, "context": exp.data.context})
    if not made.fits:
        rows = int((0.9 * target.chip.hbm - made.weight_bytes) * batch / max(made.cache_bytes, 1))
        cure = f"decode at most {rows} rows at a time" if rows > 0 else "take more chips"
        console.print(f"[bold red]Does not fit[/]: {cure}")
    return 0 if made.fits else 1
