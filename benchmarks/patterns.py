"""Sparse patterns on the TPU kernel by the compiler's bundles: what a pattern costs beside what it leaves of the pairs.

    python benchmarks/patterns.py                 # the table (Python 3.12, libtpu 0.0.52), ~10 CPU minutes
    python benchmarks/patterns.py --cell window

16,384 tokens, 8 heads of 128, bfloat16, v5e. Blocks of a pattern are as large as the kernel's (1,024), or it would
compute pairs that the pattern forbids. Every cell is measured in a child process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from jaxllm.config import BigBird, Blocks, Causal, Dilated, Full, GlobalTokens, Local, Pattern, Strided
from jaxllm.kernels.bigbird import at_length
from jaxllm.kernels.flash_tpu import flash_tpu
from jaxllm.kernels.pattern import allowed
from jaxllm.plan.bundles import flags
from jaxllm.plan.compile import environment
from jaxllm.plan.kernels import call_seconds, compile_alone
from jaxllm.plan.steering import steering
from jaxllm.plan.topology import CHIPS
from jaxllm.records import Mask

TOPOLOGY, T, HEADS, WIDTH = "v5e:2x2", 16_384, 8, 128
PATTERNS: dict[str, tuple[Pattern, str]] = {  # and what it is measured against
    "causal": (Causal(), "causal"),
    "window": (Causal() & Local(1024), "causal"),
    "strided": (Causal() & Strided(4, 1024), "causal"),
    "full": (Full(), "full"),
    "blocks": (Blocks(1024, 1), "full"),
    "longformer": (Local(257) | GlobalTokens(256), "full"),
    "bigbird": (at_length(BigBird(1024, 1, seed=0), T), "full"),
    "dilated": (Dilated(64, 16), "full"),
}


def density(pattern: Pattern) -> float:
    """The share of all pairs that may meet."""
    slots = np.arange(T, dtype=np.int32)
    return float(np.mean([allowed(pattern, q, slots[None]).mean() for q in np.split(slots[:, None], 64)]))


def measure(pattern: Pattern, folder: Path) -> dict[str, float]:
    """{"forward": ms, "backward": ms}. folder: where libtpu writes bundles."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        o, pull = jax.vjp(lambda q, k, v: flash_tpu(q, k, v, pattern, Mask(), scale=WIDTH**-0.5), q, k, v)
        return o, pull(o)

    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        x = jax.ShapeDtypeStruct((1, T, HEADS, WIDTH), jnp.bfloat16)
        traced = jax.jit(both).trace(x, x, x)
    calls, chip = steering(traced.jaxpr, [None] * 3), CHIPS[TOPOLOGY.partition(":")[0]]
    found = [(call.name, call_seconds(call, chip)) for call in compile_alone(calls, device, folder)]
    return {side: 1e3 * sum(s for name, s in found if side in name) for side in ("forward", "backward")}


def child(name: str) -> dict[str, float]:
    """`measure` in a child process, from the last line that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        env = environment(libtpu_flags=flags(Path(folder)))
        command = [sys.executable, __file__, "--cell", name, "--folder", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def table() -> None:
    print("| pattern | pairs | forward ms (of the base) | backward ms (of the base) |\n|---|---|---|---|")
    seen: dict[str, tuple[float, dict[str, float]]] = {}
    for name, (pattern, base) in PATTERNS.items():
        seen[name] = density(pattern), child(name)
        pairs, (share, ms) = seen[base][0], seen[name]
        cells = [f"{ms[side]:.3f} ({100 * ms[side] / seen[base][1][side]:.1f} %)" for side in ("forward", "backward")]
        print(f"| {name}, of {base} | {100 * share / pairs:.1f} % | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=PATTERNS, help="one pattern, as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to the child that measures
    args = parser.parse_args()
    if args.cell is None:
        table()
    elif args.folder is None:
        print(json.dumps(child(args.cell)))
    else:
        print(json.dumps(measure(PATTERNS[args.cell][0], args.folder)))
