"""The formula for a step's memory: by hand, and against the TPU compiler."""

from dataclasses import replace

import pytest

from jaxllm.experiment import Data, Experiment, Source, resolve
from jaxllm.models.llama import llama
from jaxllm.models.presets import PRESETS
from jaxllm.plan.report import plan
from jaxllm.plan.topology import parse
from jaxllm.plan.zero import step_bytes
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

L, D, F, V, T = 6, 1024, 4096, 32_000, 4096  # T: tokens per chip and micro-batch
LAYERS = L * (4 * D * D + 3 * D * F)
MATRICES = LAYERS + 2 * V * D  # untied embedding and head
NORMS = (2 * L + 1) * D
V5E = parse("v5e:2x4")


def experiment(zero, accumulate=1, remat="full", **layout):
    runtime = Runtime("bfloat16", attention="tpu", remat=remat, layout=Layout(zero=zero, **layout))
    model = llama("small", (L, D, 8, 8, 128, V, F))
    data = Data((Source("corpus"),), T // 2)
    rows = 2 * V5E.devices * accumulate // layout.get("tensor", 1)
    return resolve(Experiment(model, data, 1000, rows, "run", accumulate=accumulate, runtime=runtime))


def test_the_state_is_12_bytes_per_parameter_a_chip_stores():
    assert step_bytes(experiment(0), 8).state == 12 * (MATRICES + NORMS)
    for zero in (1, 2, 3):
        assert step_bytes(experiment(zero), 8).state == 12 * (MATRICES // 8 + NORMS)
    assert step_bytes(experiment(3, accumulate=4), 8).batch == 4 * step_bytes(experiment(3), 8).batch == 4 * 6 * 4 * T


def test_weights_are_whole_below_stage_3_and_the_embedding_is_not_among_them():
    assert step_bytes(experiment(0), 8).weights == 2 * (MATRICES - V * D + NORMS)
    for zero in (1, 2):  # the head is gathered chunk by chunk
        assert step_bytes(experiment(zero), 8).weights == 2 * (MATRICES - 2 * V * D + V * D // 8 + NORMS)
    assert step_bytes(experiment(3), 8).weights == 2 * ((MATRICES - V * D) // 8 + NORMS)


def test_gradients_by_stage():
    """The heap beyond what every stage works with in a layer: bytes per parameter of the layers and the head."""
    layer = [step_bytes(experiment(zero), 8).layer for zero in range(4)]
    multiplied = MATRICES - V * D
    head = 2 * V * D // 8  # differentiated in fp32 from stage 1 on
    assert layer[0] - layer[1] == 4 * (multiplied + NORMS) - 2 * (multiplied // 8 + NORMS) - head
    assert layer[1] == layer[2]
    assert layer[3] - layer[2] == 2 * (multiplied // 8 + NORMS) - head


def test_accumulators_are_sharded_from_stage_1_on():
    first, second = (step_bytes(experiment(zero, accumulate=4), 8) for zero in (1, 2))
    assert first == second
    assert first.accumulators == 4 * (MATRICES // 8 + NORMS)
    assert step_bytes(experiment(0, accumulate=4), 8).accumulators == 4 * (MATRICES + NORMS)
    assert step_bytes(experiment(1), 8).accumulators == 0


def test_tensor_parallelism_cuts_what_is_multiplied():
    whole, half = step_bytes(experiment(0), 8), step_bytes(experiment(0, tensor=2), 8)
    assert half.weights - 2 * NORMS == (whole.weights - 2 * NORMS) // 2


def test_an_embedding_that_is_also_the_head_counts():
    exp = replace(experiment(2), model=PRESETS["smollm2_135m"]())
    assert step_bytes(exp, 8).weights == 2 * (134_515_008 - 49_152 * 576 * 7 // 8)


def test_less_recomputation_keeps_more():
    saved = [step_bytes(experiment(3, remat=remat), 8).saved for remat in ("full", "attention", "dots", "none")]
    assert saved == sorted(set(saved))


def test_moments_on_the_host_leave_a_third():
    here, there = step_bytes(experiment(3), 8), step_bytes(experiment(3, offload=True), 8)
    assert there.state == here.state // 3
    assert there.temporary - here.temporary == 8 * V * D // 8  # those of the embedding, as they pass


def test_a_pipeline_has_none():
    with pytest.raises(ValueError, match="no formula gives the memory of a pipeline, stage=2; ask the compiler"):
        step_bytes(experiment(1, stage=2), 8)


def test_mixtures_and_latents_have_a_formula():
    exp = replace(experiment(3), model=PRESETS["deepseek_v3"]())
    made = step_bytes(exp, 256)
    assert made.state > 12 * 671e9 / 256
    expert = 7168 * 2048 * 256
    assert made.layer > 2 * 2 * expert  # all experts of a layer, gathered, and their gradient


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "accumulate", "offload"), [(1, 4, False), (2, 1, False), (3, 1, False), (3, 1, True)])
def test_the_compiler_agrees(zero, accumulate, offload):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    exp = experiment(zero, accumulate, offload=offload)
    made, formula = plan(exp, V5E.name).memory, step_bytes(exp, V5E.devices)
    arguments = sum(made.by_part[part] for part in ("parameters", "optimiser", "counters", "inputs"))
    assert arguments == pytest.approx(formula.arguments, rel=0.01)
    assert made.total - arguments - made.by_part["code"] == pytest.approx(formula.temporary, rel=0.10)
