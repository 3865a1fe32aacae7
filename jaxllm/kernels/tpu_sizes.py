"""Block and tile sizes of the TPU kernels, by chip and shape: a small table, found with the compiler.

`benchmarks/attention_blocks.py` regenerates the evidence. The chip is that of the mesh in the context (so that
compiling ahead of time for another chip works), else of the default device; an unknown one gets the smallest's sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm import config
from jaxllm.kernels.pattern import Kind, by_distance, kinds

MIB = 2**20
LARGEST_BLOCK = 1024


class Tile(NamedTuple):
    """What is computed at once, [k, q] scores; the scores of tile t + ahead are begun before the softmax of t."""

    q: int
    k: int
    ahead: int


class Chip(NamedTuple):
    """What the kernels need to know of a chip. vmem: bytes per core.  cores: that make one device."""

    vmem: int
    forward: Tile
    backward: Tile
    cores: int = 1


class Sizes(NamedTuple):
    """Blocks are multiples of tiles, in tokens. span: keys per backward call, whole blocks.  vmem: bytes to allow."""

    block_q: int
    block_k: int
    forward: Tile
    backward: Tile
    span: int
    vmem: int


V4 = Chip(16 * MIB, Tile(256, 128, 2), Tile(256, 128, 1), 2)
V5E = Chip(128 * MIB, Tile(256, 128, 8), Tile(256, 128, 3))
V5P = Chip(64 * MIB, Tile(256, 128, 8), Tile(256, 128, 3), 2)
V6E = Chip(128 * MIB, Tile(256, 128, 10), Tile(256, 256, 2))
V7X = Chip(64 * MIB, Tile(256, 128, 10), Tile(256, 256, 2))

# device kinds as JAX reports them, most specific first
CHIPS = (
    ("TPU v4", V4),
    ("TPU v5p", V5P),
    ("TPU v5 lite", V5E),
    ("TPU v5e", V5E),
    ("TPU v5", V5P),
    ("TPU v6", V6E),
    ("TPU7", V7X),
)


def chip() -> Chip:
    """The chip that the current trace is for."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return next((chip for name, chip in CHIPS if kind.startswith(name)), V4)


def sizes(pattern: config.Pattern, T: int, S: int, H: int, dtype: jnp.dtype) -> Sizes:
    """Sizes for lengths T, S and head width H.

    A pattern of distances that fills no block gets larger ones: a window has fewer, longer steps, which wait less.
    """
    here, width, item = chip(), -(-H // 128) * 128, jnp.dtype(dtype).itemsize
    small = item == 2 and (width == 128 or here.vmem > 16 * MIB)
    most = LARGEST_BLOCK if small else LARGEST_BLOCK // 2
    larger = small and here.vmem > 16 * MIB and by_distance(pattern)
    if larger and (kinds(pattern, T, S, most, most) < Kind.FULL).all():
        most *= 2
    block_q, block_k = even(T, most), even(S, most)
    per_key = width * (2 * 4 + 2 * 2 * item)  # dk, dv: float32 sums, and results in two buffers each
    span = max(here.vmem * 3 // 8 // per_key // block_k, 1) * block_k
    return Sizes(block_q, block_k, _fit(here.forward, block_q, block_k), _fit(here.backward, block_q, block_k), span,
                 here.vmem * 7 // 8)  # fmt: skip


def even(length: int, most: int) -> int:
    """The block that cuts `length` into as few blocks as `most` allows, in multiples of 128, and evenly."""
    count = -(-length // most)
    return -(-length // (128 * count)) * 128


def _fit(tile: Tile, block_q: int, block_k: int) -> Tile:
    """`tile`, no larger than what divides the block."""
    return Tile(128 if block_q % tile.q else tile.q, 128 if block_k % tile.k else tile.k, tile.ahead)
