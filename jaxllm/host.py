"""What a process does once, before jax computes: find its devices quietly, keep compiled programs, keep freed memory.

Called by the command line; a program of your own may call `prepare()` too, as its first act.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def prepare() -> None:
    """All of this file, in order."""
    skip_absent_tpu()
    use_compilation_cache()
    keep_freed_memory()


def accelerators() -> list[Path]:
    """Device files of TPUs and GPUs on this machine."""
    return [p for pattern in ("accel*", "vfio/*", "nvidia*") for p in Path("/dev").glob(pattern)]


def skip_absent_tpu() -> None:
    """Where libtpu is installed but no TPU is (to plan, say), jax would look for one and complain loudly."""
    if not accelerators() and jax.config.values.get("jax_platforms") is None and importlib.util.find_spec("libtpu"):
        jax.config.update("jax_platforms", "cpu")


def use_compilation_cache() -> None:
    """Keep compiled programs in ~/.cache/jaxllm, so that a second start is quick. JAX_COMPILATION_CACHE_DIR wins."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxllm" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def keep_freed_memory() -> None:
    """On a CPU, have glibc reuse freed memory instead of giving it back to the system at every step.

    XLA allocates a step's temporaries anew each time; fresh pages cost a fault per 4 KiB. Reusing them made a
    quickstart step 1.5 times as fast (docs/benchmarks.md). Elsewhere than on Linux with glibc this does nothing.
    """
    if accelerators() or sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_ARENA_MAX, 1)
