"""Decode attention on TPUs by the compiler's bundles: microseconds and share of the memory bound, beside the peers.

    python benchmarks/decode_attention.py                       # the table (Python 3.12, libtpu 0.0.52)
    python benchmarks/decode_attention.py --cell v5e:2x2 ours paged 16 1

Kernels are timed as `jaxllm plan` times them (`jaxllm/plan/bundles.py`): bundles issued and stalls for copies, HBM at
90 % of its published bandwidth, a compiler's model and not a chip. The memory bound is the bytes of the live cache over
the *published* bandwidth, so 90 % is the most that this model gives. Ours and the peers' kernels go through the same
timing, the peers' with the best of several block sizes. Every cell is measured in a child process.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as older
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as newer

from jaxllm import config
from jaxllm.cache import KV, Paged
from jaxllm.kernels.decode import New
from jaxllm.kernels.decode_tpu import decode_tpu
from jaxllm.plan.bundles import flags
from jaxllm.plan.compile import environment
from jaxllm.plan.kernels import call_seconds, compile_alone
from jaxllm.plan.scalar_unit import Undecided
from jaxllm.plan.steering import steering
from jaxllm.plan.topology import CHIPS, Chip

B, S, N, K, H = 16, 2048, 32, 8, 128
LATENT, VALUE, LATENT_HEADS = 576, 512, 16  # DeepSeek-V2-Lite
CACHES = [("dense", 0), *(("paged", page) for page in (16, 32, 64, 128)), ("int8", 0), ("int8", 128)]
CACHES += [("latent", 0), *(("latent", page) for page in (16, 64, 128))]
PEERS = (16, 128)  # pages at which the peers are measured, which takes minutes
COLUMNS = ("T = 1", "T = 4", "jax ragged", "jax paged")
Known = tuple[Any, list[Any]]  # a function, and its arguments: numpy arrays are known to the timing, others are shapes


class Cell(NamedTuple):
    """whose: "ours" or "jax".  kind: dense, paged, int8, latent of ours; paged, ragged of jax.  page: 0 for dense."""

    whose: str
    kind: str
    page: int
    T: int


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def tables(page: int) -> np.ndarray:
    """A page table [B, S / page] in no order."""
    pages = np.random.default_rng(0).permutation(B * S // page)
    return pages.reshape(B, -1).astype(np.int32)


def ours(kind: str, page: int, T: int) -> tuple[Known, int]:
    """The call, and the bytes of its live cache as they lie in HBM: latents of 576 in 640 lanes."""
    heads, kv_heads, width, value = (LATENT_HEADS, 1, LATENT, VALUE) if kind == "latent" else (N, K, H, H)
    int8 = kind.startswith("int8")
    dtype, parts = jnp.int8 if int8 else jnp.bfloat16, 1 if kind == "latent" else 2
    names = [np.broadcast_to(np.arange(S, dtype=np.int32), (B, S)).copy(), np.ones((B, S), np.int32)]
    new = [shape(B, T, kv_heads, width), shape(B, T, kv_heads, value)]
    new += [np.tile(S + np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32)]
    if page:
        pool = (1, B * S // page, kv_heads, parts, page)
        held = [shape(*pool, width, dtype=dtype), tables(page), *names]
        scale = pool
    else:
        held = [shape(1, B, kv_heads, S, w, dtype=dtype) for w in (width, width if parts == 2 else 0)] + names
        scale = (1, B, kv_heads, parts, S)
    held += [shape(*scale, dtype=jnp.float32)] if int8 else []
    count = len(held)

    def call(q: jax.Array, *arrays: jax.Array) -> jax.Array:
        cache = (Paged if page else KV)(*arrays[:count])
        return decode_tpu(q, New(*arrays[count:]), (cache, 0), config.Causal(), scale=width**-0.5)

    live = B * S * kv_heads * parts * (-(-width // 128) * 128 * jnp.dtype(dtype).itemsize + (4 if int8 else 0))
    return (call, [shape(B, T, heads, width), *held, *new]), live


def paged_attention(page: int, tokens: int) -> Known:
    """jax's older kernel, for one query token. tokens: of a block."""
    pool = shape(K, B * S // page, page, H)
    run = partial(older, pages_per_compute_block=tokens // page)
    return run, [shape(B, N, H), pool, pool, np.full(B, S, np.int32), tables(page)]


def ragged_paged_attention(page: int, T: int, tokens: int, queries: int) -> Known:
    """jax's newer kernel. tokens, queries: of a block."""
    lengths, starts = np.full(B, S, np.int32), np.arange(B + 1, dtype=np.int32) * T
    pool = shape(B * S // page, page, 2 * K, H)
    options = {"num_kv_pages_per_block": tokens // page, "num_queries_per_block": queries}
    run = partial(newer, **options, vmem_limit_bytes=64 * 2**20)
    return run, [shape(B * T, N, H), pool, lengths, tables(page), starts, np.array([B], np.int32)]


def peers(kind: str, page: int, T: int) -> list[Known]:
    """The peer's call with several block sizes."""
    if kind == "paged":
        return [paged_attention(page, tokens) for tokens in (1024, 2048)]
    return [ragged_paged_attention(page, T, tokens, 16) for tokens in (1024, 2048)]


def seconds(call: Known, device: Any, chip: Chip, folder: Path) -> float:
    """Of one call; infinite when its course cannot be followed or the compiler refuses it."""
    function, args = call
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))
    (found,) = steering(traced.jaxpr, [x if isinstance(x, np.ndarray) else None for x in args])
    try:
        (compiled,) = compile_alone([replace(found, name="decode_kernel")], device, folder)
        return call_seconds(compiled, chip)
    except (Undecided, jax.errors.JaxRuntimeError) as error:
        print(str(error)[:300], file=sys.stderr)
        return math.inf


def measure(topology: str, cell: Cell, folder: Path) -> dict[str, float]:
    """{"us": microseconds, "share": of the memory bound}. folder: where libtpu writes bundles."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    chip = CHIPS[topology.partition(":")[0]]
    if cell.whose == "ours":
        call, live = ours(cell.kind, cell.page, cell.T)
        calls = [call]
    else:
        calls, live = peers(cell.kind, cell.page, cell.T), B * S * K * 2 * H * 2
    best = min(seconds(call, device, chip, folder) for call in calls)
    return {"us": 1e6 * best, "share": live / chip.bandwidth / best}


def child(topology: str, cell: Cell) -> dict[str, float]:
    """`measure` in a child process, from the last line that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        env = environment(libtpu_flags=flags(Path(folder)))
        command = [sys.executable, __file__, "--cell", topology, *map(str, cell), "--folder", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stderr[-6000:])
    return json.loads(done.stdout.splitlines()[-1])


def table() -> None:
    """Ours with one and four queries, and the peers' best block sizes, as markdown."""
    topologies = ("v5e:2x2", "v6e:2x2")
    print("| cache | " + " | ".join(f"{t[:3]} {column}" for t in topologies for column in COLUMNS) + " |")
    print("|---" * (1 + len(topologies) * len(COLUMNS)) + "|")
    for kind, page in CACHES:
        cells: list[Cell | None] = [Cell("ours", kind, page, 1), Cell("ours", kind, page, 4)]
        compared = kind == "paged" and page in PEERS
        cells += [Cell("jax", "ragged", page, 1), Cell("jax", "paged", page, 1)] if compared else [None, None]
        row = [f"{child(t, c)['share']:.1%}" if c else "" for t in topologies for c in cells]
        print(f"| {kind}{f', pages of {page}' if page else ''} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs=5, metavar=("TOPOLOGY", "WHOSE", "KIND", "PAGE", "T"), help="one cell, as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to the child that measures
    args = parser.parse_args()
    if args.cell is None:
        table()
    else:
        topology, whose, kind, page, T = args.cell
        cell = Cell(whose, kind, int(page), int(T))
        print(json.dumps(child(topology, cell) if args.folder is None else measure(topology, cell, args.folder)))
