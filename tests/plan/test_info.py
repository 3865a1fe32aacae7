"""Costs by formula against published figures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from jaxllm import cache
from jaxllm.convert.safetensors_io import open_folder
from jaxllm.experiment import Data, Experiment, Optimizer, Source, resolve
from jaxllm.models.presets import PRESETS, toy
from jaxllm.plan.info import info, training_bytes
from jaxllm.plan.report import find, info_command
from jaxllm.plan.zero import step_bytes
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout


def test_parts_add_up_for_every_preset():
    for name, preset in PRESETS.items():
        parts = dict(info(preset(), 1024).parameters)
        total = parts.pop("total")
        assert sum(parts.values()) == total, name


def test_llama3_8b():
    """8,030,261,248 parameters; the paper's 6 N per token (N without embeddings) plus causal attention."""
    cost = info(PRESETS["llama3_8b"](), 8192)
    assert cost.parameters["total"] == 8_030_261_248
    assert cost.matrix_parameters == 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    assert cost.forward_flops["attention"] == 4 * 32 * 4096 * (8192 + 1) / 2
    assert cost.train_flops == 6 * cost.matrix_parameters + 3 * cost.forward_flops["attention"]
    assert cost.kv_bytes == 2 * 32 * 8 * 128 * 2  # 128 KiB per token in bf16
    assert cost.kv_bytes_context == cost.kv_bytes * 8192


def test_a_tied_head_is_multiplied():
    """GPT-2 small: Kaplan's 12 L D^2 and the head."""
    cost = info(PRESETS["gpt2_small"]())
    assert cost.matrix_parameters == 12 * 12 * 768**2 + 50_257 * 768


def test_windows_bound_attention_and_cache():
    """Gemma 2: every other of 26 layers sees 4,096 tokens."""
    spec = PRESETS["gemma2_2b"]()
    short, long = info(spec, 4096), info(spec, 8192)
    assert long.kv_bytes == short.kv_bytes
    assert long.kv_bytes_context == short.kv_bytes_context * 3 // 2
    assert long.forward_flops["attention"] < 1.8 * short.forward_flops["attention"]


def test_cache_bytes_are_those_of_a_real_cache():
    spec = toy(PRESETS["gemma2_2b"]())
    real = cache.init(spec, 1, 64, "bfloat16")
    arrays = sum(kv.k.size + kv.v.size for stack in real for kv in stack) * 2
    assert info(spec, 64).kv_bytes_context == arrays


def experiment(**layout):
    runtime = Runtime("bfloat16", remat="full", layout=Layout(**layout))
    return Experiment(PRESETS["llama3_8b"](), Data((Source("x"),), 8192), 1, 256, "x", runtime=runtime)


def test_training_bytes():
    cost = training_bytes(experiment(), devices=256)
    masters = 8_030_261_248 * 4 / 256
    assert cost["parameters"] == pytest.approx(masters, rel=0.01)
    assert cost["optimiser"] == 2 * cost["parameters"]
    assert cost["saved"] == 32 * 8192 * 4096 * 2
    whole = training_bytes(experiment(zero=0), devices=256)
    assert whole["parameters"] == 4 * 8_030_261_248
    first = training_bytes(experiment(zero=1), devices=256)
    assert (first["parameters"], first["gradients"]) == (cost["parameters"], 4 * 8_030_261_248)


def test_state_of_few_bits():
    """Matrices of layers: 2 bytes, and two codes of a byte with a scale for 128 (heads), 256 (ffn) numbers each."""
    few = replace(experiment(), optimizer=Optimizer(masters="bfloat16", moments="int8"))
    cost, plain = training_bytes(few, devices=256), training_bytes(experiment(), devices=256)
    ffn, heads = 32 * 3 * 4096 * 14336 // 256, 32 * (2 * 4096 + 2 * 1024) * 4096 // 256
    assert plain["parameters"] - cost["parameters"] == 2 * (ffn + heads)
    assert plain["optimiser"] - cost["optimiser"] == 6 * (ffn + heads) - 8 * ffn // 256 - 8 * heads // 128
    arguments = step_bytes(resolve(few), 256)
    assert arguments.state == cost["parameters"] + cost["optimiser"]


def test_command(tmp_path, capsys):
    assert info_command("smollm2_135m", json_path=str(tmp_path / "info.json")) == 0
    assert "134,515,008" in capsys.readouterr().out
    assert '"total": 134515008' in (tmp_path / "info.json").read_text()
    with pytest.raises(ValueError, match=r"must be a config file .*smollm2_135m"):
        find("smollm")


@pytest.mark.parametrize("name", ["t5_v1_1", "clip", "qwen2_vl", "bert", "deepseek_v3"])
def test_any_model_folder(name, tmp_path, capsys):
    """Every kind of spec: the parameters are those of the file; an encoder has no cache."""
    folder = Path(__file__).parents[1] / "goldens" / name
    assert info_command(str(folder), json_path=str(tmp_path / "info.json")) == 0
    parameters = json.loads((tmp_path / "info.json").read_text())["parameters"]
    total = parameters.pop("total")
    assert sum(parameters.values()) == total
    shapes = open_folder(folder).shapes
    assert total == sum(math.prod(shape) for shape in shapes.values())
    assert ("KV cache" in capsys.readouterr().out) == (name != "bert")
