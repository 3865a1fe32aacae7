"""Decode attention on TPUs by the compiler's bundles: microseconds and share of the memory bound, beside the peers.

    python benchmarks/decode_attention.py                       # the table (Python 3.12, libtpu 0.0.52), ~10 CPU minutes
    python benchmarks/decode_attention.py --cell v5e:2x2 paged16 1

Kernels are timed as `jaxllm plan` times them (`jaxllm/plan/bundles.py`): bundles issued and stalls for copies, HBM at
90 % of its published bandwidth, a compiler's model and not a chip. The memory bound is the bytes of the live cache over
the *published* bandwidth, so 90 % is the most that this model gives. Ours and the peers' kernels go through the same
timing. Every cell is measured in a child process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from jaxllm import config
from jaxllm.cache import KV, Paged
from jaxllm.kernels.decode import New
from jaxllm.kernels.decode_tpu import decode_tpu
from jaxllm.plan.bundles import flags
from jaxllm.plan.compile import environment
from jaxllm.plan.kernels import call_seconds, compile_alone
from jaxllm.plan.steering import steering
from jaxllm.plan.topology import CHIPS

B, S, N, K, H = 16, 2048, 32, 8, 128
LATENT, VALUE, LATENT_HEADS = 576, 512, 16  # DeepSeek-V2-Lite
Known = tuple[Any, list[Any]]  # a function, and its arguments: numpy arrays are known to the timing, others are shapes


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def tables(page: int) -> np.ndarray:
    """A page table [B, S / page] in no order."""
    pages = np.random.default_rng(0).permutation(B * S // page)
    return pages.reshape(B, -1).astype(np.int32)


def ours(kind: str, page: int, T: int) -> tuple[Known, int]:
    """The call, and the bytes of its live cache."""
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

    live = B * S * kv_heads * parts * (width * jnp.dtype(dtype).itemsize + (4 if int8 else 0))
    return (call, [shape(B, T, heads, width), *held, *new]), live


def paged_attention(page: int) -> Known:
    """jax's older kernel, with as many pages per block as its documentation suggests by size: 512 tokens."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    pool = shape(K, B * S // page, page, H)
    run = partial(kernel, pages_per_compute_block=512 // page)
    return run, [shape(B, N, H), pool, pool, np.full(B, S, np.int32), tables(page)]


def ragged_paged_attention(page: int, T: int) -> Known:
    """jax's newer kernel with its own table of block sizes."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as kernel

    lengths, starts = np.full(B, S, np.int32), np.arange(B + 1, dtype=np.int32) * T
    pool = shape(B * S // page, page, 2 * K, H)
    return kernel, [shape(B * T, N, H), pool, lengths, tables(page), starts, np.array([B], np.int32)]


def measure(topology: str, kind: str, T: int, folder: Path) -> dict[str, float]:
    """{"us": microseconds, "share": of the memory bound}. folder: where libtpu writes bundles."""
    name, page = kind.rstrip("0123456789"), int("0" + "".join(c for c in kind if c.isdigit() and kind != "int8"))
    name, page = (name, page) if not kind.startswith("int8") else ("int8", int(kind[4:] or 0))
    live = B * S * K * 2 * H * 2
    match name:
        case "paged_attention":
            call, args = paged_attention(page)
        case "ragged_paged_attention":
            call, args = ragged_paged_attention(page, T)
        case _:
            (call, args), live = ours(name, page, T)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        traced = jax.jit(call).trace(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))
    calls = steering(traced.jaxpr, [x if isinstance(x, np.ndarray) else None for x in args])
    chip = CHIPS[topology.partition(":")[0]]
    (found,) = compile_alone(calls, device, folder)
    seconds = call_seconds(found, chip)
    return {"us": 1e6 * seconds, "share": live / chip.bandwidth / seconds}


def child(*arguments: str) -> dict[str, float]:
    """`measure` in a child process, from the last line that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        env = environment(libtpu_flags=flags(Path(folder)))
        command = [sys.executable, __file__, "--cell", *arguments, "--folder", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stderr[-6000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs=3, metavar=("TOPOLOGY", "KIND", "T"), help="one cell, as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to the child that measures
    args = parser.parse_args()
    if args.folder is None:
        print(json.dumps(child(*args.cell)))
    else:
        print(json.dumps(measure(args.cell[0], args.cell[1], int(args.cell[2]), args.folder)))
