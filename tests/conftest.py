"""Strict JAX for every test: 8 CPU devices, rank promotion is an error, warnings are errors (pyproject)."""

import os

# Compiling takes most of the suite's time: code that is compiled faster and runs slower, a third less in all.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import itertools
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture
def getkey():
    """A function that gives another PRNG key at every call."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(1234), next(counter))


MAPS, DONE = Path("/proc/self/maps"), itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Compiled programs are memory maps, of which Linux gives a process 65,530; beyond them XLA's compiler crashes."""
    yield
    if next(DONE) % 20 == 0 and MAPS.exists() and MAPS.read_text().count("\n") > 30_000:
        jax.clear_caches()
