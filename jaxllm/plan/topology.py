"""The chips that can be planned for, and the names of their slices.

A slice of TPUs is named as Google Cloud names it, chip:AxB or chip:AxBxC, chips along each axis of its torus:
"v5e:16x16". GPUs of one host are counted: "h100:8".
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as the compiler sees it.

    clock: Hz at which the compiler counts its estimated cycles (it has none for GPUs: their boost clock).
    peak: bf16 FLOP/s, published.
    hbm: bytes, published.  bandwidth: of HBM, bytes/s, published.
    wire: bytes/s over all of the chip's links to others, published, one direction.
    axes: dimensions of its torus.  cores: how many are joined to one device.
    description: what the compiler is told of a GPU, which it cannot look up; None for a TPU.
    """

    name: str
    clock: float
    peak: float
    hbm: int
    bandwidth: float
    wire: float
    axes: int
    cores: int = 1
    description: str | None = None


_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin} core_count: {cores} fpus_per_core: {lanes}
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
_H100 = _GPU.format(
    name="NVIDIA H100 80GB HBM3", major=9, cores=132, lanes=128, clock=1.98, shared=233_472, optin=232_448,
    bandwidth=3_352_320_000_000, cache=52_428_800, memory=84_978_434_048,
)  # fmt: skip
_A100 = _GPU.format(
    name="NVIDIA A100-SXM4-80GB", major=8, cores=108, lanes=64, clock=1.41, shared=167_936, optin=166_912,
    bandwidth=2_039_000_000_000, cache=41_943_040, memory=85_050_982_400,
)  # fmt: skip

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1.05e9, 275e12, 32 * 2**30, 1228e9, 300e9, 3, 2),
        Chip("v5e", 1.50e9, 197e12, 16 * 2**30, 819e9, 200e9, 2),
        Chip("v5p", 1.75e9, 459e12, 95 * 2**30, 2765e9, 600e9, 3, 2),
        Chip("v6e", 1.75e9, 918e12, 32 * 2**30, 1640e9, 448e9, 2),
        Chip("a100", 1.41e9, 312e12, 85_050_982_400, 2039e9, 300e9, 1, description=_A100),
        Chip("h100", 1.98e9, 989e12, 84_978_434_048, 3352e9, 450e9, 1, description=_H100),
    )
}
"""Google Cloud TPU documentation, system architecture pages; clock = peak / FLOPs per cycle. GPUs: NVIDIA's data sheets
of the SXM versions of 80 GB; wire is NVLink's."""

_SIZES = {
    1: ("1", "2", "4", "8"),
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}


@dataclass(frozen=True)
class Slice:
    """A slice of a pod: chips of one kind on a torus of `shape`."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def gpu(self) -> bool:
        """Whether these are GPUs: for them the compiler estimates no time."""
        return self.chip.description is not None

    @property
    def name(self) -> str:
        """As the compiler takes it: "v5e:16x16"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)


def names() -> list[str]:
    """Slices that are sold; the compiler accepts some others too."""
    return [f"{chip.name}:{size}" for chip in CHIPS.values() for size in _SIZES[chip.axes]]


def parse(name: str) -> Slice:
    """The slice of this name. Raises ValueError naming the nearest one when the chip or the number of axes is wrong."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name.strip().lower())
    chip = CHIPS.get(match[1]) if match else None
    shape = tuple(int(n) for n in match[2].split("x")) if match else ()
    if chip is None or len(shape) != chip.axes or 0 in shape:
        raise ValueError(
            f"topology {name!r} is not known; did you mean {nearest(name)!r}? A name is chip:AxB for v5e and v6e, "
            "chip:AxBxC for v4 and v5p, chip:N for a100 and h100"
        )
    return Slice(chip, shape)


def nearest(name: str) -> str:
    """The slice that is sold whose chip and number of chips come closest to what `name` asks for."""
    chip, size = re.match(r"([^:-]*)[:-]?(.*)", name.strip().lower()).groups()  # type: ignore[union-attr]
    known = difflib.get_close_matches(chip, CHIPS, 1, 0.0)
    numbers = [int(n) for n in re.findall(r"\d+", size)]
    wanted = math.prod(numbers) if numbers else 4
    options = [n for n in names() if n.startswith((known[0] if known else "v5e") + ":")]
    return min(options, key=lambda n: abs(math.log2(max(wanted, 1) / math.prod(map(int, n.split(":")[1].split("x"))))))
