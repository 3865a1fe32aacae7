"""Flash attention on TPUs by the compiler's bundles: estimated milliseconds, forward and backward, beside the peers.

    python benchmarks/attention.py                     # the table (Python 3.12, libtpu 0.0.52), ~5 CPU minutes
    python benchmarks/attention.py --cell v5e:2x2 8192

Kernels are timed as `jaxllm plan` times them (`jaxllm/plan/bundles.py`): a compiler's model, not a chip. Every cell is
measured in a child process.
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

from jaxllm import config
from jaxllm.kernels.flash_tpu import flash_tpu
from jaxllm.kernels.tpu_sizes import Sizes, Tile
from jaxllm.plan.bundles import flags
from jaxllm.plan.compile import environment
from jaxllm.plan.kernels import call_seconds, compile_alone
from jaxllm.plan.steering import steering
from jaxllm.plan.topology import CHIPS
from jaxllm.records import Mask

# best block sizes of the peers, ms (forward, backward), causal, bfloat16, 8 heads x 128, measured in the same way
PEERS = {
    ("v5e", 4096): {"flash": (0.327, 0.926), "splash": (0.327, 0.609), "tokamax": (0.312, 0.612)},
    ("v5e", 8192): {"flash": (1.138, 3.315), "splash": (1.149, 2.236)},
    ("v6e", 4096): {"flash": (0.192, 0.534), "splash": (0.187, 0.302), "tokamax": (0.163, 0.292)},
    ("v6e", 8192): {"flash": (0.665, 1.908), "splash": (0.612, 1.088), "tokamax": (0.562, 1.106)},
    ("v5p", 4096): {"flash": (0.149, 0.424), "splash": (0.160, 0.528), "tokamax": (0.140, 0.532)},
}
CELLS = (("v5e:2x2", 4096), ("v5e:2x2", 8192), ("v6e:2x2", 4096), ("v6e:2x2", 8192), ("v5p:2x2x1", 4096))


def measure(
    topology: str, T: int, heads: tuple[int, int, int], window: int | None, cut: Sizes | None, folder: Path
) -> dict[str, float]:
    """{"forward": ms, "backward": ms} of one shape. heads: (N, K, H).  folder: where libtpu writes bundles."""
    N, K, H = heads
    pattern = config.Causal() if window is None else config.Causal() & config.Local(window)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        o, pull = jax.vjp(lambda q, k, v: flash_tpu(q, k, v, pattern, Mask(), scale=H**-0.5, cut=cut), q, k, v)
        return o, pull(o)

    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (N, K))
        traced = jax.jit(both).trace(q, k, k)
    calls, chip = steering(traced.jaxpr, [None] * 3), CHIPS[topology.partition(":")[0]]
    found = {call.name: call_seconds(call, chip) for call in compile_alone(calls, device, folder)}
    return {side: 1e3 * found[f"flash_{side}"] for side in ("forward", "backward")}


def child(*arguments: str) -> dict[str, float]:
    """`measure` in a child process, from the last line that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        env = environment(libtpu_flags=flags(Path(folder)))
        command = [sys.executable, __file__, *arguments, "--folder", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def table() -> None:
    print("| chip, T | forward ms (best peer) | backward ms (best peer) |\n|---|---|---|")
    for topology, T in CELLS:
        ours, chip = child("--cell", topology, str(T)), topology.partition(":")[0]
        best = [min(peer[side] for peer in PEERS[chip, T].values()) for side in (0, 1)]
        row = [f"{ours[side]:.3f} ({peer:.3f})" for side, peer in zip(("forward", "backward"), best, strict=True)]
        print(f"| {chip}, {T} | {row[0]} | {row[1]} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs=2, metavar=("TOPOLOGY", "T"), help="one cell, as JSON")
    parser.add_argument("--heads", type=int, nargs=3, default=(8, 8, 128), metavar=("N", "K", "H"))
    parser.add_argument("--window", type=int)
    parser.add_argument("--cut", type=json.loads, help="block_q, block_k, [q, k, ahead] forward, the same backward")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to the child that measures
    args = parser.parse_args()
    if args.cell is None:
        table()
    elif args.folder is None:
        print(json.dumps(child(*sys.argv[1:])))
    else:
        cut = None
        if args.cut is not None:
            block_q, block_k, forward, backward = args.cut
            span = -(-int(args.cell[1]) // block_k) * block_k
            cut = Sizes(block_q, block_k, Tile(*forward), Tile(*backward), span, 56 * 2**20)
        print(json.dumps(measure(args.cell[0], int(args.cell[1]), tuple(args.heads), args.window, cut, args.folder)))
