"""Compile for an NVIDIA H100 or A100 on a machine with neither GPU nor driver, in a child process.

    ptx = compile_gpu(fn, args, "h100")

Needs the wheels jax-cuda12-plugin and jax-cuda12-pjrt of JAX's own version, and nothing else of CUDA. Functions and
arguments travel by pickle, as in `tpu_aot`. A kernel that spills a register is an error.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

COMMON = """threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
registers_per_core_limit: 65536 registers_per_block_limit: 65536"""
REST = 'platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }'


class Gpu(NamedTuple):
    """A compilation target: its name to JAX, its cores, and XLA's description of it."""

    kind: str
    cores: int
    description: str


GPUS = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        132,
        f"""gpu_device_info {{ {COMMON} shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
        memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
        shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }} }}
        {REST} device_description_str: "NVIDIA H100 80GB HBM3" """,
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        108,
        f"""gpu_device_info {{ {COMMON} shared_memory_per_core: 167936 core_count: 108 fpus_per_core: 64
        memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85050982400
        shared_memory_per_block_optin: 166912 cuda_compute_capability {{ major: 8 }} }}
        {REST} device_description_str: "NVIDIA A100-SXM4-80GB" """,
    ),
}


def available() -> bool:
    """Whether the wheels are installed."""
    return all(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_plugins"))


def compile_gpu(fn: Callable[..., Any], args: tuple[Any, ...], gpu: str, timeout: float = 600) -> str:
    """The PTX of jit(fn)(*args). Raises AssertionError with the compiler's message when it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job")
        job.write_bytes(pickle.dumps((fn, args, gpu)))
        flags = (
            f"--xla_dump_to={folder}/dump --xla_dump_emitter_re=.* "
            "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"
        )
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        }
        child = subprocess.run(
            [sys.executable, __file__, str(job)], env=env, check=False, capture_output=True, text=True, timeout=timeout
        )
        assert child.returncode == 0, child.stderr[-3000:]
        return "\n".join(path.read_text() for path in sorted(Path(folder, "dump").glob("*.ptx")))


def _compile(fn: Callable[..., Any], args: tuple[Any, ...], gpu: str) -> None:
    import jax
    import numpy as np
    from jax._src.mesh import AbstractDevice
    from jax.experimental import topologies
    from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

    target = GPUS[gpu]
    topology = topologies.get_topology_desc(platform="cuda", target_config=target.description, topology="1x1x1")
    place = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    device = AbstractDevice(device_kind=target.kind, num_cores=target.cores, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.jit(fn).lower(*args).compile()


if __name__ == "__main__":
    _compile(*pickle.loads(Path(sys.argv[1]).read_bytes()))
