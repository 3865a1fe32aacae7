"""Training steps planned on TPU slices with the real compiler: memory, cycles, collectives. No TPU is used.

    python benchmarks/plan_table.py [CELL ...] [--json FILE]      about two minutes and 2 GiB per cell

Figures of record are taken on Python 3.12 with jax 0.12 and its libtpu, no special XLA flags. Seconds are the
compiler's estimated cycles over the chip's clock, without Pallas kernels and collectives: its model of a chip, no chip.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from jaxllm.experiment import Data, Experiment, Source, resolve
from jaxllm.models.presets import PRESETS
from jaxllm.plan.estimate import to_json
from jaxllm.plan.report import plan, print_plan, write_json
from jaxllm.plan.topology import parse
from jaxllm.remat import Remat
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout


@dataclass(frozen=True)
class Cell:
    """A model on a slice. rows: of `context` tokens per chip.  bars: (HBM GiB, XLA seconds, wire GB) to stay below."""

    preset: str
    topology: str
    context: int
    rows: int
    remat: Remat
    layout: Layout
    bars: tuple[float, float, float]


WIDE: Remat = ("attention", "attention_out", "gate", "up")

CELLS = {
    "a": Cell("llama31_8b", "v5e:16x16", 8192, 1, "full", Layout(), (4.5, 3.1, 60.0)),
    "a'": Cell("llama31_8b", "v5e:16x16", 8192, 1, "attention", Layout(), (11.0, 3.0, 60.2)),
    "b": Cell("llama31_8b", "v5p:4x4x4", 8192, 2, "full", Layout(), (10.0, 2.5, 60.0)),
    "b'": Cell("llama31_8b", "v5p:4x4x4", 8192, 2, WIDE, Layout(), (50.0, 2.4, 59.3)),
    "b2": Cell("llama31_8b", "v5p:4x4x4", 8192, 2, "full", Layout(tensor=2, split_stream=True), (11.0, 2.8, 95.0)),
    "c": Cell("llama2_7b", "v5e:16x16", 4096, 2, "attention", Layout(), (10.0, 2.55, 53.4)),
    "d": Cell("mixtral_8x7b", "v5p:4x4x4", 4096, 2, "full", Layout(expert=8), (19.0, 1.0, 55.0)),
    "e": Cell("llama32_1b", "v5e:2x4", 2048, 4, "full", Layout(), (5.0, 0.60, 7.6)),
}


def experiment(cell: Cell) -> Experiment:
    """The cell's training run: bfloat16 compute, float32 AdamW, flash attention."""
    runtime = Runtime("bfloat16", attention="auto", remat=cell.remat, layout=cell.layout)
    data = Data((Source("corpus"),), cell.context)
    batch = cell.rows * parse(cell.topology).devices
    return resolve(Experiment(PRESETS[cell.preset](), data, 1000, batch, "runs/plan", runtime=runtime))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(CELLS)}; default all")
    parser.add_argument("--json", metavar="FILE", help="write every plan")
    options = parser.parse_args()
    unknown = set(options.cells) - CELLS.keys()
    if unknown:
        parser.error(f"unknown cell {', '.join(sorted(unknown))}; known: {', '.join(CELLS)}")
    console = Console()
    table = Table("cell", "HBM GiB (bar)", "XLA s (bar)", "wire GB (bar)", "MFU at most", "compile CPU s")
    found = {}
    for name in options.cells or CELLS:
        cell = CELLS[name]
        result = plan(experiment(cell), cell.topology)
        print_plan(result, console)
        found[name] = made = to_json(result)
        figures = [made["hbm_gib"], made["xla_seconds"], made["wire_gb"]]
        shown = [
            f"{x:.2f} ({bar})" if x is not None else "does not fit" for x, bar in zip(figures, cell.bars, strict=True)
        ]
        mfu = "" if made["mfu"] is None else f"{100 * made['mfu']:.1f} %"
        table.add_row(name, *shown, mfu, f"{made['compile_cpu_seconds']:.0f}")
    console.print(table)
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
