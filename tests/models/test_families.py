"""What holds for every family file, found as the library finds them: sizes, tables, foreign specs; a new one loads."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.architectures import model_params
from jaxllm.config import GLU, GQA, MLP, NTK, Alibi, LayerNorm, RMSNorm, Rope
from jaxllm.models import deepseek_v3, falcon, gpt_neox, llama, mixtral, opt, phi3
from jaxllm.models.common import layers_of, with_blocks
from jaxllm.models.families import (
    FAMILIES,
    expressed,
    family_of_module,
    family_of_spec,
    modules,
    settled,
    spec_of_config,
)
from jaxllm.models.presets import EVERY
from jaxllm.models.rope import classic
from jaxllm.params import count
from jaxllm.rules import wanted
from tests.models.support import GOLDENS

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
OF_FAMILIES = {make.__name__: make for family in FAMILIES.values() for make in family.PRESETS}


# ------------------------------------------------------------------------------------------------------- what is found


@every_family
def test_every_family_has_a_preset(family):
    assert family.PRESETS
    assert all(isinstance(make(), family.SPEC) for make in family.PRESETS)


def test_names_are_unique():
    classes = Counter(chain.from_iterable(family.ARCHITECTURES for family in FAMILIES.values()))
    assert [name for name, n in classes.items() if n > 1] == []
    presets = Counter(make.__name__ for module in modules() for make in getattr(module, "PRESETS", ()))
    assert [name for name, n in presets.items() if n > 1] == []
    assert OF_FAMILIES.items() <= EVERY.items()


@pytest.mark.parametrize("name", EVERY)
def test_published_size(name):
    """The docstring's number of parameters."""
    assert f"{count(model_params(EVERY[name]())):,} parameters" in EVERY[name].__doc__


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_published_table_and_config(name):
    """Names and shapes carry every parameter once, both styles of config give the spec back; no array is made."""
    spec = OF_FAMILIES[name]()
    family, config = family_of_spec(spec)
    shapes = wanted(family.names(spec), model_params(spec))
    assert sum(map(prod, shapes.values())) == count(model_params(spec))
    assert FAMILIES[config["model_type"]] is family
    for style in (config, classic(config)):
        assert settled(family, spec_of_config(style), shapes) == spec


TENSORS = [
    ("baichuan2_13b", "model.layers.39.self_attn.W_pack.weight", (15_360, 5120)),
    ("bloom_560m", "transformer.word_embeddings_layernorm.bias", (1024,)),
    ("chatglm3_6b", "transformer.encoder.layers.27.self_attention.query_key_value.weight", (4608, 4096)),
    ("chatglm3_6b", "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight", (27_392, 4096)),
    ("deepseek_v2_lite", "model.layers.26.self_attn.kv_a_proj_with_mqa.weight", (576, 2048)),
    ("deepseek_v2_lite", "model.layers.1.mlp.shared_experts.up_proj.weight", (2816, 2048)),
    ("deepseek_v3", "model.layers.60.self_attn.kv_b_proj.weight", (32_768, 512)),
    ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias", (256,)),
    ("deepseek_v3", "model.layers.2.mlp.gate_proj.weight", (18_432, 7168)),
    ("falcon_7b", "transformer.h.31.self_attention.query_key_value.weight", (4672, 4544)),
    ("glm4_9b_0414", "model.layers.39.mlp.gate_up_proj.weight", (27_392, 4096)),
    ("glm4_9b_0414", "model.layers.0.post_mlp_layernorm.weight", (4096,)),
    ("gpt_oss_20b", "model.layers.23.mlp.experts.gate_up_proj", (32, 2880, 5760)),
    ("gptj_6b", "lm_head.bias", (50_400,)),
    ("mixtral_8x7b", "model.layers.31.block_sparse_moe.experts.7.w2.weight", (4096, 14_336)),
    ("mpt_7b", "transformer.blocks.31.attn.Wqkv.weight", (12_288, 4096)),
    ("olmo2_7b", "model.layers.0.self_attn.k_norm.weight", (4096,)),
    ("olmoe_1b_7b", "model.layers.15.mlp.experts.63.gate_proj.weight", (1024, 2048)),
    ("opt_125m", "model.decoder.embed_positions.weight", (2050, 768)),
    ("opt_350m", "model.decoder.project_in.weight", (1024, 512)),
    ("opt_350m", "model.decoder.project_out.weight", (512, 1024)),
    ("phi2", "model.layers.31.self_attn.dense.bias", (2560,)),
    ("pythia_160m", "gpt_neox.layers.11.attention.query_key_value.weight", (2304, 768)),
    ("qwen15_moe_a27b", "model.layers.0.mlp.shared_expert_gate.weight", (1, 2048)),
    ("qwen3_30b_a3b", "model.layers.47.mlp.experts.127.down_proj.weight", (2048, 768)),
    ("starcoder2_3b", "model.layers.29.mlp.c_fc.weight", (12_288, 3072)),
]


@pytest.mark.parametrize(("preset", "name", "shape"), TENSORS)
def test_published_names_and_shapes(preset, name, shape):
    spec = EVERY[preset]()
    table = FAMILIES[sys.modules[EVERY[preset].__module__].MODEL_TYPE].names(spec)
    assert wanted(table, model_params(spec))[name] == shape


PREFERRED = {"baichuan_7b": "llama", "chatglm3_6b": "glm", "phi3_mini": "mistral", "mt5_small": "t5", "yi_6b": "llama"}


@pytest.mark.parametrize("name", PREFERRED)
def test_of_several_families_the_preferred_is_written(name):
    """Unless the spec has the name of one."""
    spec = EVERY[name]()
    assert PREFERRED[name] == family_of_spec(spec)[0].MODEL_TYPE
    own = sys.modules[EVERY[name].__module__].MODEL_TYPE
    assert own == family_of_spec(replace(spec, name=own))[0].MODEL_TYPE


# ------------------------------------------------------------------------------------------------------- foreign specs


def odd_specs():
    """Near the families, but no config.json of theirs says it."""
    neox, rw, small, wide = gpt_neox.pythia_160m(), falcon.falcon_rw_1b(), opt.opt_125m(), phi3.phi3_mini()
    yield replace(neox, norm=None)
    yield replace(neox, head=None)
    yield with_blocks(neox, lambda i, b: replace(b, norm=RMSNorm()))
    yield with_blocks(neox, lambda i, b: replace(b, ffn=GLU(64)))
    yield with_blocks(neox, lambda i, b: replace(b, ffn=MLP(64 + i)))
    yield with_blocks(neox, lambda i, b: replace(b, attn=replace(b.attn, position=None)))
    yield with_blocks(neox, lambda i, b: replace(b, attn=replace(b.attn, position=Rope(scaling=NTK(2.0)))))
    yield with_blocks(rw, lambda i, b: replace(b, attn=replace(b.attn, position=Alibi(scale=0.7, rounded=True))))
    yield with_blocks(small, lambda i, b: replace(b, place="parallel"))
    yield with_blocks(wide, lambda i, b: replace(b, attn=replace(b.attn, scale=0.123)))
    plain, sparse, latent = llama.llama32_1b(), mixtral.mixtral_8x7b(), deepseek_v3.deepseek_v3()
    ffn = layers_of(sparse)[0].ffn
    yield replace(latent, norm=LayerNorm())
    yield replace(sparse, norm=None)
    yield with_blocks(sparse, lambda i, b: replace(b, ffn=replace(ffn, capacity=2.0)))
    yield with_blocks(sparse, lambda i, b: replace(b, ffn=replace(ffn, shared=GLU(64))))
    yield with_blocks(sparse, lambda i, b: replace(b, ffn=replace(ffn, router=replace(ffn.router, scale=2.0))))
    yield with_blocks(sparse, lambda i, b: replace(b, ffn=replace(ffn, expert=MLP(64))))
    yield with_blocks(plain, lambda i, b: replace(b, attn=GQA(32, 8, 64, Alibi())))
    yield with_blocks(latent, lambda i, b: replace(b, attn=replace(b.attn, scale=0.123)))
    yield with_blocks(latent, lambda i, b: replace(b, attn=replace(b.attn, norm=LayerNorm())))


@pytest.mark.parametrize("spec", list(odd_specs()), ids=lambda s: s.name)
def test_what_no_config_can_say_is_refused(spec):
    with pytest.raises(ValueError, match=f"no known family's config.json expresses spec '{spec.name}'"):
        family_of_spec(spec)


@every_family
def test_a_foreign_spec_gives_no_other_error_than_its_own(family):
    """For anything of its kind: ValueError, or a config of its own. Other kinds are not asked."""
    for spec in (*(make() for make in EVERY.values()), *odd_specs()):
        if not isinstance(spec, family.SPEC):
            assert expressed(family, spec) is None
            continue
        with contextlib.suppress(ValueError):
            config = family.to_hf(spec)
            assert config["model_type"] == family.MODEL_TYPE
            family.from_hf(config)


# ------------------------------------------------------------------------------------------------ a family of one's own

NOVA = '''
"""LLaMA under other names."""
from dataclasses import replace
from jaxllm.models import llama
from jaxllm.models.common import within

def nova_tiny():
    return replace(llama.llama("nova_tiny", (2, 16, 2, 1, 8, 100, 32)), context=64)

MODEL_TYPE = "nova"
ARCHITECTURES = ("NovaForCausalLM",)
PREFIX = "nova."
PRESETS = (nova_tiny,)
from_hf = llama.from_hf

def to_hf(spec):
    return llama.to_hf(spec) | {"model_type": MODEL_TYPE, "architectures": list(ARCHITECTURES)}

def names(spec):
    return within(llama.names(spec), "", lambda name: name.replace("model.", PREFIX))
'''
USE = """
import sys
import numpy as np
import jaxllm
from jaxllm.cli import main
from jaxllm.convert.hf import save_folder
model, golden = jaxllm.load(sys.argv[1]), np.load(sys.argv[2])
got = jaxllm.logits(model.spec, model.params, golden["input_ids"])
np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=1e-4)
save_folder(sys.argv[3], model.spec, model.params)
sys.exit(main(["info", "nova_tiny"]))
"""


def test_a_file_dropped_into_the_package_is_a_family(tmp_path):
    """Nothing else is touched: its folder loads with the reference's logits, is written again, and `info` knows it."""
    shutil.copytree(Path(jaxllm.__file__).parent, tmp_path / "jaxllm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "jaxllm" / "models" / "nova.py").write_text(NOVA)
    own, source, out = tmp_path / "own", GOLDENS / "llama_gqa", tmp_path / "out"
    own.mkdir()
    config = json.loads((source / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_type": "nova", "architectures": ["NovaForCausalLM"]}))
    tensors = {k.replace("model.", "nova."): x for k, x in load_file(source / "model.safetensors").items()}
    save_file(tensors, own / "model.safetensors")
    command = [sys.executable, "-c", USE, *map(str, (own, source / "golden.npz", out))]
    env = os.environ | {"PYTHONPATH": "."}
    done = subprocess.run(command, check=False, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nova_tiny" in done.stdout
    assert json.loads((out / "config.json").read_text())["model_type"] == "nova"
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], x) for name, x in tensors.items())


def test_a_family_file_that_lacks_something_says_what(tmp_path):
    half = type(sys)("half")
    half.__file__, half.MODEL_TYPE, half.PREFIX = "half.py", "half", ""
    with pytest.raises(ValueError, match=r"half.py: a family's file must define \['ARCHITECTURES', 'from_hf', 'to_hf'"):
        family_of_module(half)
