"""Memory of a training step under ZeRO stages 0-3 against the formula of `jaxllm.plan.zero`. No TPU is used.

    python benchmarks/zero_memory.py [STAGE,ACCUMULATE ...] [--json FILE]      about 3 minutes and 2 GiB per cell

The model is Llama-like, 468,239,360 parameters: 24 layers, width 1024, 8 heads of 128, ffn 4096, vocabulary 32,000,
untied; bfloat16 compute, float32 AdamW, flash attention, full recomputation. Every cell has 2 rows of 2,048 tokens per
chip and micro-batch, on v5e:2x4 with data=8. Figures of record: Python 3.12, jax 0.12.0.1, libtpu 0.0.52.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxllm.experiment import Data, Experiment, Source, resolve
from jaxllm.models.llama import llama
from jaxllm.plan.memory import Memory
from jaxllm.plan.report import plan, write_json
from jaxllm.plan.topology import parse
from jaxllm.plan.zero import step_bytes
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

TOPOLOGY = "v5e:2x4"
SHAPE = (24, 1024, 8, 8, 128, 32_000, 4096)  # layers, dim, heads, kv_heads, head_dim, vocab, hidden
CONTEXT, ROWS = 2048, 2
CELLS = tuple((zero, accumulate) for accumulate in (1, 4) for zero in range(4))
MIB = 2**20


def experiment(zero: int, accumulate: int) -> Experiment:
    """One cell: the same micro-batch per chip in all of them."""
    layout = Layout(zero=zero)  # type: ignore[arg-type]
    runtime = Runtime("bfloat16", attention="tpu", remat="full", layout=layout)
    rows = ROWS * parse(TOPOLOGY).devices * accumulate
    data = Data((Source("corpus"),), CONTEXT)
    model = llama("llama_468m", SHAPE)
    return resolve(Experiment(model, data, 1000, rows, "runs/plan", accumulate=accumulate, runtime=runtime))


def arguments_and_temporary(memory: Memory) -> tuple[int, int]:
    """Bytes of the step's arguments and of its heap, from the compiler's buffer assignment."""
    part = memory.by_part
    arguments = sum(part[name] for name in ("parameters", "optimiser", "counters", "inputs"))
    return arguments, memory.total - arguments - part["code"]


def row(zero: int, accumulate: int) -> dict[str, Any]:
    """Bytes per chip of one cell, measured and by formula."""
    exp = experiment(zero, accumulate)
    arguments, temporary = arguments_and_temporary(plan(exp, TOPOLOGY).memory)
    formula = step_bytes(exp, parse(TOPOLOGY).devices)
    return {
        "zero": zero,
        "accumulate": accumulate,
        "arguments": arguments,
        "arguments_formula": formula.arguments,
        "temporary": temporary,
        "temporary_formula": formula.temporary,
    }


def cell(text: str) -> tuple[int, int]:
    """A cell from the command line, such as "3,4"."""
    found = tuple(int(n) for n in text.split(","))
    if found not in CELLS:
        raise argparse.ArgumentTypeError(f"a cell is STAGE,ACCUMULATE, one of {CELLS}; got {text!r}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", type=cell, metavar="STAGE,ACCUMULATE", help="default: all eight")
    parser.add_argument("--json", metavar="FILE", help="write the rows, in bytes")
    options = parser.parse_args()
    table = Table("ZeRO", "acc.", "args MiB", "formula", "ratio", "temp MiB", "formula", "ratio")
    rows = []
    for zero, accumulate in options.cells or CELLS:
        found = row(zero, accumulate)
        rows.append(found)
        shown = []
        for what in ("arguments", "temporary"):
            measured, stated = found[what], found[f"{what}_formula"]
            shown += [f"{measured / MIB:.0f}", f"{stated / MIB:.0f}", f"{measured / stated:.3f}"]
        table.add_row(str(zero), str(accumulate), *shown)
    Console().print(table)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
