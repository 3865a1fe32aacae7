"""A layer's product and both of its gradients in bfloat16, int8 and fp8, by the TPU compiler's cycles. No TPU is used.

    python benchmarks/lowered.py [CHIP ...]      about a minute

8,192 tokens, a kernel [4096, 14336], as in Llama-3-8B. Milliseconds are the compiler's estimated cycles over the clock,
with what it takes to find scales and to round; "operands" are the dtypes that reach the matrix unit. A compiler's
model, no chip. Figures of record: Python 3.12, jax 0.12.0.1, libtpu 0.0.52.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from jaxllm.lowered import matmul
from jaxllm.plan.compile import environment
from jaxllm.plan.hlo import parse as parse_hlo
from jaxllm.plan.program import program
from jaxllm.plan.topology import CHIPS

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
EQUATION = "TD,DF->TF"
SHAPES = (8192, 4096), (4096, 14336), (8192, 14336)


def both_passes(kind: str, x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
    """The product [T, F] and the gradients of x and w."""
    run = jnp.einsum if kind == "bfloat16" else lambda equation, x, w: matmul(equation, kind, x, w)  # type: ignore[arg-type]
    y, pull = jax.vjp(lambda x, w: run(EQUATION, x, w), x, w)
    return y, *pull(g)


def measure(chip: str, kind: str) -> dict[str, Any]:
    """Milliseconds, and operands' dtypes of the matrix products with their number. In a child process."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[chip]).devices
    where = NamedSharding(Mesh(devices[:1], "device"), PartitionSpec())
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in SHAPES]
    text = jax.jit(both_passes, static_argnums=0).lower(kind, *args).compile().as_text()
    made = program(parse_hlo(text), {"device": 1})
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    found = Counter[str]()
    for result, a, b in re.findall(r"= (\w+)\[[^=]*? (?:convolution|dot)\(%([\w.\-]+), %([\w.\-]+)\)", text):
        found[f"{types.get(a)} x {types.get(b)} -> {result}"] += 1
    return {"ms": 1e3 * made.cycles / CHIPS[chip].clock, "operands": dict(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chips", nargs="*", choices=[*SLICES, []], metavar="CHIP")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    table = Table("chip", "kind", "ms", "operands")
    for chip in options.chips or SLICES:
        for kind in ("bfloat16", "int8", "fp8"):
            command = [sys.executable, __file__, "--child", chip, kind]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=600)
            made = json.loads(done.stdout.splitlines()[-1])
            table.add_row(chip, kind, f"{made['ms']:.2f}", ", ".join(f"{n} {k}" for k, n in made["operands"].items()))
    Console().print(table)


if __name__ == "__main__":
    main()
