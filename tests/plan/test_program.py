"""The reader of compiled programs: against hand-written programs, and against one of Llama 3.1 8B on 256 v5e chips."""

import gzip
from pathlib import Path

import pytest

from jaxllm.models.llama import llama31_8b
from jaxllm.plan.groups import first_group
from jaxllm.plan.hlo import Walk, dims, nbytes, parse
from jaxllm.plan.info import info
from jaxllm.plan.program import program

FIXTURES = Path(__file__).parent / "fixtures"
MESH = {"replica": 1, "stage": 1, "data": 256, "expert": 1, "sequence": 1, "tensor": 1}

LOOP = """
%body (p: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {
  %p = (s32[], f32[8,16], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %w = f32[16,16] constant({...})
  %y = f32[8,16] dot(%x, %w), lhs_contracting_dims={1}, backend_config={"estimated_cycles":"7"}
  %g = f32[32,16] all-gather(%y), channel_id=3, replica_groups={{0,2},{1,3}}, dimensions={0}
  ROOT %out = (s32[], f32[8,16], s32[]) tuple(%next, %y, %n)
}

%cond (p: (s32[], f32[8,16], s32[])) -> pred[] {
  %p = (s32[], f32[8,16], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] {limit}
  ROOT %lt = pred[] compare(%i, %limit), direction={direction}
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16] parameter(0), metadata={op_name="state.params['w']"}
  %zero = s32[] constant({start})
  %ten = s32[] constant(10)
  %t = (s32[], f32[8,16], s32[]) tuple(%zero, %a, %ten)
  %loop = (s32[], f32[8,16], s32[]) while(%t), condition=%cond, body=%body
  ROOT %r = f32[8,16] get-tuple-element(%loop), index=1
}
"""


def loop(start=0, step=1, limit="constant(5)", direction="LT"):
    values = {"{start}": str(start), "{step}": str(step), "{limit}": limit, "{direction}": direction}
    text = LOOP
    for key, value in values.items():
        text = text.replace(key, value)
    return parse(text)


CARRIED = "get-tuple-element(%p), index=2"


@pytest.mark.parametrize(
    ("arguments", "trips"),
    [
        ({}, 5),
        ({"start": 2}, 3),
        ({"step": 2}, 3),
        ({"direction": "LE"}, 6),
        ({"limit": CARRIED}, 10),
        ({"limit": CARRIED, "start": 1, "step": 4}, 3),
        ({"start": 9}, 0),
    ],
)
def test_trip_counts(arguments, trips):
    walk = Walk(loop(**arguments))
    assert [v.times for v in walk if v.op.kind == "dot"] == [trips]
    assert walk.unknown == []


def test_a_loop_without_constants_is_counted_once_and_named():
    made = program(loop(limit="custom-call(%i)"), {"data": 2, "tensor": 2})
    assert made.unknown_loops == ("body",)
    assert made.cycles == 7


def test_figures_are_multiplied_by_trips():
    made = program(loop(), {"data": 2, "tensor": 2})
    assert made.cycles == 5 * 7
    assert made.matrix_flops == 5 * 2 * 8 * 16 * 16
    (gather,) = made.collectives
    assert (gather.kind, gather.axes, gather.count, gather.wire) == ("all-gather", "data", 5, 5 * 32 * 16 * 4)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}", [0, 4]),
        ("source_target_pairs={{0,1},{1,2}}", [0, 1]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x=1", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x=1", [0, 2]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, x=1", [0, 4]),
        ("replica_groups=unheard_of", []),
    ],
)
def test_groups(text, group):
    assert first_group(text) == group


def test_shapes():
    assert dims("bf16[2,64]{1,0:T(8,128)}") == [2, 64]
    assert nbytes("(f32[2,3]{1,0}, s4[10], pred[])") == 24 + 5 + 1


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")


@pytest.fixture(scope="module")
def llama():
    return program(parse(gzip.decompress((FIXTURES / "llama8b_v5e256.hlo.txt.gz").read_bytes()).decode()), MESH)


def test_llama_matrix_flops_equal_the_closed_form(llama):
    """Forward, its recomputation without each layer's last product, and twice as much for gradients."""
    matrices = info(llama31_8b(), 8192).matrix_parameters
    last = 32 * 4096 * 14336
    assert llama.matrix_flops == 2 * 8192 * (4 * matrices - last)


def test_llama_agrees_with_an_independent_reader(llama):
    """Figures of another program that reads the same text."""
    assert llama.cycles == 4_960_074_263
    wire = llama.wire()
    assert {kind: count for kind, (count, _) in wire.items()} == {"all-gather": 336, "all-reduce": 235, "all-to-all": 2}
    assert {kind: round(gb, 3) for kind, (_, gb) in wire.items()} == {
        "all-gather": 28.945,
        "all-reduce": 32.185,
        "all-to-all": 0.134,
    }
    assert sorted(llama.trips.values()) == [8, 8, 32, 32]
    assert sum(kernel.count for kernel in llama.kernels) == 96
    assert {c.axes for c in llama.collectives} == {"data"}


def test_llama_costs_name_their_source(llama):
    top = llama.costs[0]
    assert top.source == "jaxllm/leaves.py:110"
    assert "backward dot_general" in top.name
    assert sum(c.cycles for c in llama.costs) == llama.cycles
    assert sum(c.flops for c in llama.costs) <= llama.matrix_flops


GROUPED = """
ENTRY %main (x: bf16[20,8], w: bf16[2,8,6], g: bf16[20,6], n: s32[2]) -> bf16[2,8,6] {
  %x = bf16[20,8] parameter(0)
  %w = bf16[2,8,6] parameter(1)
  %g = bf16[20,6] parameter(2)
  %n = s32[2] parameter(3)
  %ragged-dot-metadata = (s32[3]) custom-call(%n), custom_call_target="tpu_custom_call"
  %ragged-dot-none = bf16[20,6] custom-call(%n, %x, %w), custom_call_target="tpu_custom_call"
  %ragged-dot-none.1 = bf16[20,8] custom-call(%n, %g, %w), custom_call_target="tpu_custom_call"
  ROOT %ragged-dot-none.2 = bf16[2,8,6] custom-call(%n, %x, %g), custom_call_target="tpu_custom_call"
}
"""


def test_grouped_matmuls_count_all_rows():
    """XLA's own kernel, forward, backward to rows and to matrices: 2 x 20 rows x 8 x 6 each; no Pallas kernel."""
    made = program(parse(GROUPED), MESH)
    assert [(k.rows, k.flops) for k in made.kernels] == [(0, 0.0), (20, 1920.0), (20, 1920.0), (20, 1920.0)]
