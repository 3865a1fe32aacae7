"""Bundles are run as the core would run them; what steers kernels is read from the traced program."""

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from jaxllm import config
from jaxllm.kernels.flash_tpu import flash_tpu
from jaxllm.kernels.ring import Ring, ring_attention
from jaxllm.kernels.schedule import Arrays, Shape, schedule
from jaxllm.kernels.tpu_sizes import Sizes, Tile
from jaxllm.mesh import make_mesh
from jaxllm.plan import bundles, kernels
from jaxllm.plan.compile import environment
from jaxllm.plan.kernels import Call, call_of
from jaxllm.plan.program import Kernel
from jaxllm.plan.scalar_unit import Undecided, function_of
from jaxllm.plan.steering import steering
from jaxllm.plan.topology import CHIPS
from jaxllm.records import Mask
from jaxllm.sharding import Layout

# A loop of three turns, whose body is four bundles longer when the prefetched number is not 0.
KERNEL = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: s32[3], index: 0] /* a */ ;;  %s2_s1 = smov.u32 [#allocation3] }
   0x1   :  { %s3_s2 = sshll.u32 %s1_s0, 4  ;;  %s4_s2 = int_to_ptr.hbm [resolvable:$true] %s3_s2 }
   0x2   :  { %9 = dma.hbm_to_smem /*hbm=*/%s4_s2, /*size_in_granules=*/16, /*smem=*/%s2_s1, /*flag=*/[#allocation1] }
   0x3   :  { %10 = dma.done.wait [#allocation1], 16 }
   0x4   :  { %s5_s3 = smov.u32 0 }
   0x5 LB: > { %s8_s5 = sld [smem:[#allocation3 + %s6_s4]]  ;;  %s6_s4 = sphi %s5_s3, %s7_s4 /* turn */ }
   0x6   : > { %p9_p0 = scmp.eq.s32.totalorder %s8_s5, 0 }
   0x7   : > { %11 = sbr.rel (%p9_p0) target bundleno = 16 (0x10), region = 4 }
   0x8   : > { }
   0x9   : > { }
   0xa   : > { }
   0xb   : > { }
   0xc   : > { %v20_v0 = vld [vmem:[#allocation4] sm:$0xff]
  ;;  %v21_v1 = vadd.f32 %v20_v0, %v20_v0 }
   0xd   : > { %22 = vst [vmem:[#allocation4]] %v21_v1 }
   0xe   : > { }
   0xf   : > { }
  0x10 PF: > { %s7_s4 = sadd.s32 1, %s6_s4 }
  0x11   : > { %p12_p1 = scmp.ge.s32.totalorder %s7_s4, 3 }
  0x12   : > { %13 = sbr.rel (!%p12_p1) target bundleno = 5 (0x5), region = 5 }
  0x13   : > { }
  0x14   : > { }
  0x15   : > { }
  0x16   : > { }
  0x17   :  { }
"""
V5E = CHIPS["v5e"]


@pytest.mark.parametrize(("scalars", "long_turns"), [([1, 0, 7], 2), ([0, 0, 0], 0), ([2, 2, 2], 3)])
def test_bundles_issued(scalars, long_turns):
    made = bundles.timing(KERNEL, {0: scalars}, V5E)
    assert made.issued == 5 + 3 * 14 + 4 * long_turns + 1
    assert made.copied == 512


def test_a_wait_stalls_until_the_copy_arrives():
    made = bundles.timing(KERNEL, {0: [1, 1, 1]}, V5E)
    per_cycle = 0.9 * 819e9 / 1.5e9
    assert made.stalled == pytest.approx(2 + 512 / per_cycle + 0.4e-6 * 1.5e9 - 3)
    assert made.cycles == made.issued + made.stalled


def test_copies_share_the_bandwidth():
    twice = KERNEL.replace("0x4   :  { ", "0x4   :  { %30 = dma.vmem_to_hbm %s4_s2, 32768, %s2_s1, [#allocation7] ;; ")
    twice = twice.replace("0x17   :  { }", "0x17   :  { %31 = dma.done.wait (%p12_p1), [#allocation7], 32768 }")
    made = bundles.timing(twice, {0: [0, 0, 0]}, V5E)
    one = bundles.timing(KERNEL, {0: [0, 0, 0]}, V5E)
    assert made.copied == one.copied + 2**20
    began = 4 + one.stalled  # of the second copy; by then the first is through
    assert made.cycles == pytest.approx(began + 2**20 / (0.9 * 819e9 / 1.5e9) + 600 + 1)


@pytest.mark.parametrize("first", [1, 0])
def test_a_store_may_have_a_predicate(first):
    """A first number that is not 0 overwrites the second, 1, which makes that turn short: one of the two is long."""
    guarded = KERNEL.replace("0x8   : > { }", "0x8   : > { %32 = sst [smem:[#allocation3 + $0x1]] (!%p9_p0), 0 }")
    made = bundles.timing(guarded, {0: [first, 1, 0]}, V5E)
    assert made.issued == 5 + 3 * 14 + 4 * 1 + 1


def test_a_guess_is_refused():
    with pytest.raises(Undecided, match="a jump after 12 bundles"):
        bundles.timing(KERNEL, {}, V5E)
    with pytest.raises(ValueError, match="holds none"):
        bundles.timing("nothing", {}, V5E)


@pytest.mark.parametrize(
    ("kind", "operands", "want"),
    [
        ("sadd.s32", (2**31 - 1, 1), -(2**31)),
        ("sshrl.u32", (-1, 28), 15),
        ("sshra.s32", (-16, 2), -4),
        ("smulhi.u32", (-1, -1), -2),
        ("scmp.lt.s32.totalorder", (-1, 1), True),
        ("scmp.lt.u32.totalorder", (-1, 1), False),
        ("smin.u32", (-1, 2), 2),
        ("smin.s32", (-1, 2), -1),
        ("smax.u32", (-1, 2), -1),
        ("pand", (False, None), False),
        ("pnand", (False, None), True),
        ("por", (None, True), True),
        ("por", (None, False), None),
        ("scalar_select", (True, 5, None), 5),
        ("sadd.s32", (None, 1), None),
        ("pxor", (True, True), False),
    ],
)
def test_scalar_arithmetic(kind, operands, want):
    assert function_of(kind)(*operands) == want


def test_floats_are_not_modelled():
    assert function_of("sadd.f32") is None and function_of("scmp.eq.f32.partialorder") is None


# -------------------------------------------------------------------------------------------------------- steering

T, CUT = 512, Sizes(256, 256, Tile(128, 128, 1), Tile(128, 128, 1), 512, 2**24)


def attend(q, k, v, segment_BT):
    mask = Mask(q_segment_BT=segment_BT, k_segment_BS=segment_BT)
    return flash_tpu(q, k, v, config.Causal(), mask, scale=1.0, cut=CUT)


def deep(x, segment_BT, remat):
    """Two layers in a scan."""
    block = lambda x: x + attend(x, x[:, :, :1], x[:, :, :1], segment_BT)
    block = jax.checkpoint(block) if remat else block
    return jax.lax.scan(lambda x, _: (block(x), None), x, None, length=2)[0]


def wanted(segments):
    """(queries, keys, codes) by hand, in blocks (0, 0), (1, 0), (1, 1) of 256; segments that part skip the second."""
    visits = schedule(config.Causal(), Shape(T, T, 256, 256, 128, 128, 128), Arrays(True, True, False)).visits
    assert visits.q.tolist() == [0, 1, 1]
    parted = segments[0] != segments[-1]
    codes = [4 * n + edge for n, edge in zip(visits.variant, visits.edge, strict=True)]
    codes[1] = visits.edge[1] + (0 if parted else 4)
    return (0, 1, 1), (0, 0, 1), tuple(map(int, codes))


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("parted", [True, False])
def test_scalars_of_kernels_in_a_scan_forward_and_backward(remat, parted):
    segments = np.where(np.arange(T) < 256, 1, 2 if parted else 1).astype(np.int32)[None]
    x, s = jax.ShapeDtypeStruct((1, T, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, T), jnp.int32)
    step = jax.jit(jax.grad(lambda x, s: deep(x, s, remat).sum().astype(jnp.float32)))
    calls = steering(step.trace(x, s).jaxpr, [None, segments])
    assert [call.name for call in calls] == ["flash_forward", *["flash_forward"] * remat, "flash_backward"]
    for call in calls:
        assert call.scalars[:3] == wanted(segments[0])
        assert call.shapes[:3] == ((3,), (3,), (3,))


def test_scalars_that_depend_on_the_unknown_are_unknown():
    x, s = jax.ShapeDtypeStruct((1, T, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, T), jnp.int32)
    (call,) = steering(jax.jit(partial(deep, remat=False)).trace(x, s).jaxpr, [None, None])
    assert call.scalars[:3] == ((0, 1, 1), None, None)


def test_a_shard_holds_its_own_rows():
    mesh = make_mesh(Layout(data=4, tensor=2))
    rows, heads = PartitionSpec("data"), PartitionSpec("data", None, "tensor")
    local = jax.shard_map(attend, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    x, s = jax.ShapeDtypeStruct((8, T, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8, T), jnp.int32)
    (call,) = steering(jax.jit(local).trace(x, x, x, s).jaxpr, [None] * 3 + [np.ones((8, T), np.int32)])
    assert call.shapes[2] == (2 * 3,) and (2 * 1, T, 128) in call.shapes
    assert call.scalars[2] == 2 * wanted(np.ones(T))[2]


def test_kernels_of_a_ring_are_steered_too():
    """Of both kinds of pairs (the diagonal, all), in the loop over steps and at the last one."""
    mesh, spec = make_mesh(Layout(data=4, sequence=2)), PartitionSpec("data", "sequence")
    ring = partial(ring_attention, Ring("sequence", 2, True, config.Causal(), 1.0, None, "tpu"))
    local = jax.shard_map(ring, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)
    x, s = jax.ShapeDtypeStruct((4, T, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4, T), jnp.int32)
    calls = steering(jax.jit(local).trace(x, x, x, s, s).jaxpr, [None] * 3 + [np.ones((4, T), np.int32)] * 2)
    assert [call.name for call in calls] == ["flash_forward"] * 4
    assert all(None not in call.scalars[:3] for call in calls)
    assert calls[:2] == calls[2:] and calls[0] != calls[1]


def test_first_turn_of_loops_and_both_branches():
    def body(i, x):
        return jax.lax.cond(i > 0, lambda x: attend(x, x, x, jnp.ones((1, T), jnp.int32)), lambda x: x, x)

    x = jax.ShapeDtypeStruct((1, T, 1, 128), jnp.bfloat16)
    calls = steering(jax.jit(lambda x, n: jax.lax.fori_loop(0, n, body, x)).trace(x, 3).jaxpr, [None, None])
    assert [call.scalars[2] for call in calls] == [wanted(np.ones(T))[2]]


# --------------------------------------------------------------------------------------------------------- matching


def kernel(name="jvp_three_.2", shapes=((3,),)):
    return Kernel(name, 4, shapes, None)


def test_kernels_are_matched_by_name_and_shapes():
    calls = [Call("three", ((4,),), ((1, 1, 1, 1),), KERNEL), Call("three", ((3,),), ((1, 0, 1),), KERNEL)]
    found = kernels.seconds([kernel()], [call_of(json.loads(json.dumps(asdict(call)))) for call in calls], V5E)
    assert found == {"jvp_three_.2": bundles.timing(KERNEL, {0: [1, 0, 1]}, V5E).cycles / 1.5e9}


@pytest.mark.parametrize(
    ("scalars", "reason"),
    [
        ([], "0 different Pallas calls"),
        ([((0, 0, 0),), ((1, 0, 0),)], "2 different Pallas calls could be jvp_three_.2"),
        ([(None,)], "three: bundles: a jump after 12 bundles"),
    ],
)
def test_what_cannot_be_timed_says_why(scalars, reason):
    with pytest.raises(Undecided, match=reason):
        kernels.seconds([kernel()], [Call("three", ((3,),), one, KERNEL) for one in scalars], V5E)


@pytest.mark.slow
def test_a_kernel_is_compiled_alone(tmp_path):
    """The TPU compiler's own bundles: a flash forward takes at least what the matrix unit needs for visible pairs."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path; from test_bundles import alone; alone(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    env = environment(libtpu_flags=bundles.flags(tmp_path))
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if "wrote no bundles" in done.stderr:
        pytest.skip("this libtpu writes no bundles")
    seconds, floor = json.loads(done.stdout.splitlines()[-1])
    assert floor < seconds < 4 * floor


def alone(folder):
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16)
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        traced = jax.jit(partial(flash_tpu, pattern=config.Causal(), mask=Mask(), scale=1.0)).trace(x, x, x)
    (call,) = kernels.compile_alone(steering(traced.jaxpr, [None] * 3), device, folder)
    visible = 2048 * 2049 / 2 * 4
    print(json.dumps([kernels.call_seconds(call, V5E), 4 * 128 * visible / V5E.peak]))
