"""Flash attention on TPUs by the compiler's bundles: estimated milliseconds, forward and backward, beside the peers.

    python benchmarks/attention.py --tools DIR                     # the table (Python 3.12, jax 0.12), ~10 CPU minutes
    python benchmarks/attention.py --tools DIR --cell v5e:2x2 8192

DIR holds `tpu_cycles.py`, whose `estimate(fn, args, topology, prefetch)` compiles for the topology and runs the scalar
side of the kernels' bundles. It is a compiler's model, not a chip. Every cell is measured in a child process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    tools: Path, topology: str, T: int, heads: tuple[int, int, int], window: int | None, cut: Any = None
) -> Any:
    """{"forward": ms, "backward": ms} of one shape; heads = (N, K, H). cut: `Sizes`, or None for the table's."""
    sys.path.insert(0, str(tools))
    import jax
    import jax.numpy as jnp
    import numpy as np
    import tpu_cycles  # before jax: it sets the compiler's flags
    from jax.experimental import topologies

    from jaxllm import config
    from jaxllm.kernels.flash_tpu import flash_tpu
    from jaxllm.kernels.schedule import Arrays, Shape, schedule
    from jaxllm.kernels.tpu_sizes import sizes
    from jaxllm.records import Mask

    N, K, H = heads
    pattern = config.Causal() if window is None else config.Causal() & config.Local(window)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        cut = sizes(T, T, H, jnp.bfloat16) if cut is None else cut

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        o, pull = jax.vjp(lambda q, k, v: flash_tpu(q, k, v, pattern, Mask(), scale=H**-0.5, cut=cut), q, k, v)
        return o, pull(o)

    def scalars(tile: Any, keys: tuple[int, int] | None) -> dict[int, Any]:
        plan = schedule(
            pattern, Shape(T, T, cut.block_q, cut.block_k, tile.q, tile.k), Arrays(False, False, False), keys
        )
        visits = plan.visits
        return {0: visits.q, 1: visits.k, 2: 4 * visits.variant + visits.edge, 3: np.zeros(1, np.int32)}

    if cut.span < T:
        raise ValueError(f"T={T} needs several backward spans of {cut.span} keys; measure a shorter row")
    q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (N, K))
    forward, backward = scalars(cut.forward, None), scalars(cut.backward, (0, -(-T // cut.block_k)))
    # both kernels visit the same blocks; their codes differ only in the numbers of variants, which tiles decide
    if any((forward[i] != backward[i]).any() for i in range(4)):
        raise ValueError("forward and backward visits differ; estimate them apart")
    _, found = tpu_cycles.estimate(both, (q, k, k), topology, prefetch=forward)
    if any(r["unknown_branches"] for r in found.values()):
        raise RuntimeError(f"the estimate met branches it could not decide: {list(found)}")
    return {side: 1e3 * sum(r["seconds"] for n, r in found.items() if side in n) for side in ("forward", "backward")}


def child(*arguments: str) -> dict[str, float]:
    """`measure` in a child process, from the last line that it prints."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(tools: Path) -> None:
    print("| chip, T | forward ms (best peer) | backward ms (best peer) |\n|---|---|---|")
    for topology, T in CELLS:
        ours, chip = child("--tools", str(tools), "--cell", topology, str(T)), topology.partition(":")[0]
        best = [min(peer[side] for peer in PEERS[chip, T].values()) for side in (0, 1)]
        row = [f"{ours[side]:.3f} ({peer:.3f})" for side, peer in zip(("forward", "backward"), best, strict=True)]
        print(f"| {chip}, {T} | {row[0]} | {row[1]} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder of tpu_cycles.py")
    parser.add_argument("--cell", nargs=2, metavar=("TOPOLOGY", "T"), help="one cell, as JSON")
    parser.add_argument("--heads", type=int, nargs=3, default=(8, 8, 128), metavar=("N", "K", "H"))
    parser.add_argument("--window", type=int)
    parser.add_argument("--cut", type=json.loads, help="block_q, block_k, [q, k, ahead] forward, the same backward")
    args = parser.parse_args()
    if args.cell is None:
        table(args.tools)
    else:
        cut = None
        if args.cut is not None:
            from jaxllm.kernels.tpu_sizes import Sizes, Tile

            block_q, block_k, forward, backward = args.cut
            span = -(-int(args.cell[1]) // block_k) * block_k
            cut = Sizes(block_q, block_k, Tile(*forward), Tile(*backward), span, 56 * 2**20)
        print(json.dumps(measure(args.tools, args.cell[0], int(args.cell[1]), tuple(args.heads), args.window, cut)))
