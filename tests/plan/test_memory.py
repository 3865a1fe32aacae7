"""Memory by part of Llama 3.1 8B on 256 v5e chips, full remat, one row of 8,192 per chip."""

import gzip
from pathlib import Path

import pytest

from jaxllm.experiment import Data, Experiment, Source
from jaxllm.models.llama import llama31_8b
from jaxllm.plan.estimate import shapes_of
from jaxllm.plan.hlo import parse
from jaxllm.plan.memory import PARTS, allocations, live_ranges, memory
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUT = Layout()
CODE = 52_931_584


def read(name):
    return gzip.decompress((FIXTURES / f"llama8b_v5e256.{name}.txt.gz").read_bytes()).decode()


@pytest.fixture(scope="module")
def parts():
    exp = Experiment(llama31_8b(), Data((Source("x"),), 8192), 1, 256, "x", runtime=Runtime("bfloat16", remat="full"))
    module = parse(read("hlo"))
    return memory(module, read("buffers"), read("ranges"), shapes_of(exp, LAYOUT, 256), CODE)


def test_the_peak_is_what_the_compiler_says(parts):
    """argument + output - alias + temp + code of the same program's memory_analysis()."""
    reported = 379_800_064 + 379_607_552 - 379_603_456 + 4_492_853_248 + CODE
    assert parts.total == pytest.approx(reported, rel=1e-4)
    assert set(parts.by_part) == set(PARTS)
    assert all(size >= 0 for size in parts.by_part.values())


def test_parts_equal_what_is_known(parts):
    gib = {part: size / 2**30 for part, size in parts.by_part.items()}
    masters = 8_030_261_248 * 4 / 256 / 2**30
    assert gib["parameters"] == pytest.approx(masters, rel=0.02)  # norms are whole on every chip
    assert gib["optimiser"] == pytest.approx(2 * masters, rel=0.02)
    assert gib["saved"] == 32 * 8192 * 4096 * 2 / 2**30  # each layer's input
    assert gib["inputs"] == pytest.approx(6 * 8192 * 4 / 2**30, rel=0.2)
    assert gib["gradients"] > masters  # sharded accumulators, and a layer's gradient before it is scattered
    assert parts.largest[0][0].startswith("saved: bf16[32,1,8192,4096]")


def test_reading_allocations():
    text = (
        "BufferAssignment:\n"
        "allocation 0: size 64, page 0, parameter 3, shape |f32[16]| at ShapeIndex {}:\n"
        " value: <1 p @0> (size=64,offset=0): f32[16]{0}\n"
        "allocation 2: size 4096, page 0, thread-local:\n"
        " value: <4 param_0.1 @0> (size=4096,offset=0): bf16[2048]{0}\n"
        "allocation 1: size 512, color 1, page 0, preallocated-temp:\n"
        " value: <2 while.1{2} (phi) @0> (size=8,offset=16): s32[2]{0}\n"
        "Total bytes"
    )
    first, second = allocations(text)
    assert (first.parameter, first.colour, first.heap, first.buffers[0].name) == (3, 0, False, "p")
    (carried,) = second.buffers
    assert (second.colour, second.heap) == (1, True)
    assert (carried.name, carried.index, carried.phi, carried.offset) == ("while.1", 2, True, 16)
    assert live_ranges("  BufferLiveRange:\n    a.1{}:2-5\n    b{3}:4-4\n") == {("a.1", None): (2, 5), ("b", 3): (4, 4)}
    with pytest.raises(ValueError, match="holds no allocation"):
        allocations("nothing")
