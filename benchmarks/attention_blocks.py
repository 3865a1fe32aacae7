"""Searches block and tile sizes of the TPU kernels with the compiler: the evidence for `kernels/tpu_sizes.py`.

    python benchmarks/attention_blocks.py --topology v5e:2x2 --T 4096       # ~15 CPU minutes

Prints estimated milliseconds of every candidate, forward and backward, best first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from itertools import product

from attention import child

BLOCKS = ((1024, 1024), (512, 1024), (2048, 1024))
TILES = ((256, 128), (128, 128), (256, 256), (512, 128))  # queries, keys
AHEAD = (1, 2, 3)


def candidates() -> list[list[object]]:
    """Tiles of forward and backward are searched together: the two kernels do not influence each other."""
    return [[*block, [*tile, ahead], [*tile, ahead]] for block, tile, ahead in product(BLOCKS, TILES, AHEAD)]


def search(topology: str, T: int, heads: list[int]) -> list[tuple[dict[str, float], str]]:
    found = []
    for cut in candidates():
        text = json.dumps(cut)
        cell = ["--cell", topology, str(T), "--heads", *map(str, heads), "--cut", text]
        try:
            found.append((child(*cell), text))
        except subprocess.CalledProcessError as error:
            print(f"{text}: {error.stderr.strip().splitlines()[-1][:120]}", flush=True)
            continue
        print(f"{text}: {found[-1][0]}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--T", type=int, default=4096)
    parser.add_argument("--heads", type=int, nargs=3, default=[8, 8, 128])
    args = parser.parse_args()
    results = search(args.topology, args.T, args.heads)
    for side in ("forward", "backward"):
        print(f"\n{side}, best first:")
        for milliseconds, text in sorted(results, key=lambda result: result[0][side])[:5]:
            print(f"  {milliseconds[side]:.3f} ms  {text}")
