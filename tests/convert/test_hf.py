"""Hugging Face folders: logits of the reference, both config styles, round trips, and every refusal."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.config import Full, Local, Stack
from jaxllm.convert.hf import eos_ids, load_folder, save_folder
from jaxllm.convert.safetensors_io import open_folder
from jaxllm.data.tokenizer import load as load_tokenizer
from jaxllm.data.train_tokenizer import train_tokenizer
from jaxllm.model import logits
from jaxllm.models.families import family_of_spec, spec_of_config
from jaxllm.models.rope import classic, modern
from tests.models.support import GOLDENS, config_of

NAMES = ["llama_gqa", "gpt2"]  # every family: tests/models


@pytest.fixture(params=NAMES)
def folder(request):
    return GOLDENS / request.param


@pytest.fixture
def copy(tmp_path):
    def make(name="llama_gqa", **changes):
        shutil.copytree(GOLDENS / name, tmp_path / "model")
        config = {k: v for k, v in (config_of(name) | changes).items() if v != "absent"}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        return tmp_path / "model"

    return make


# ---------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("style", ["classic", "modern"])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_import_then_export_gives_the_same_bits(folder, tmp_path, style, shard_bytes):
    spec, params, _ = load_folder(folder)
    save_folder(tmp_path / "out", spec, params, style=style, shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    before, after = open_folder(folder), open_folder(tmp_path / "out")
    assert after.shapes == before.shapes
    assert all(after.read(name).tobytes() == before.read(name).tobytes() for name in before.shapes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    given = json.loads((folder / ("config_v4.json" if style == "classic" else "config.json")).read_text())
    assert config["model_type"] == given["model_type"]
    assert spec_of_config(config) == spec_of_config(given) == spec
    assert ("torch_dtype" in config) == (style == "classic") != ("dtype" in config)


def test_bfloat16_round_trip(tmp_path):
    spec, params, _ = load_folder(GOLDENS / "qwen2", dtype="bfloat16")
    save_folder(tmp_path / "out", spec, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _, back, _ = load_folder(tmp_path / "out", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_names_without_the_base_models_prefix_and_with_buffers(tmp_path):
    """gpt2 as published: no `transformer.`, and the causal masks are in the file."""
    shutil.copytree(GOLDENS / "gpt2", tmp_path / "m")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "m" / "model.safetensors").items()}
    save_file(tensors | {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}, tmp_path / "m" / "model.safetensors")
    spec, params, _ = load_folder(tmp_path / "m")
    golden = np.load(GOLDENS / "gpt2" / "golden.npz")
    np.testing.assert_allclose(logits(spec, params, golden["input_ids"]), golden["logits"], rtol=0, atol=1e-4)


def test_tokenizer_and_eos_travel(tmp_path):
    spec, params, _ = load_folder(GOLDENS / "llama_gqa")
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 50, 300, "bpe")
    spec = replace(spec, vocab=tokenizer.vocab)
    for at, leaf in (("embed", "tokens"), ("head", "kernel")):
        params[at][leaf] = jnp.resize(params[at][leaf], (spec.vocab, spec.dim))
    save_folder(tmp_path / "out", spec, params, tokenizer)
    back_spec, _, back = load_folder(tmp_path / "out")
    assert back_spec == spec
    assert back == tokenizer == load_tokenizer(tmp_path / "out")
    assert eos_ids(tmp_path / "out", {"eos_token_id": 5}) == (5,)
    (tmp_path / "out" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert eos_ids(tmp_path / "out", {"eos_token_id": 5}) == (7, 9)


# --------------------------------------------------------------------------- every field that changes the math is read


CHANGES = [
    ("llama_gqa", {"attention_bias": True}, lambda s: (s.attn.qkv_bias, s.attn.out_bias), (True, True)),
    ("llama_gqa", {"mlp_bias": True}, lambda s: s.ffn.bias, True),
    ("llama_gqa", {"hidden_act": "gelu_pytorch_tanh"}, lambda s: s.ffn.act, "gelu_tanh"),
    ("llama_gqa", {"rms_norm_eps": 1e-3}, lambda s: s.norm.eps, 1e-3),
    ("llama_gqa", {"head_dim": 8}, lambda s: s.attn.head_dim, 8),
    (
        "llama_gqa",
        {"head_dim": None, "num_key_value_heads": None},
        lambda s: (s.attn.head_dim, s.attn.kv_heads),
        (16, 4),
    ),
    ("mistral_swa", {"sliding_window": None}, lambda s: s.attn.pattern, Full()),
    ("mistral_swa", {"sliding_window": "absent"}, lambda s: s.attn.pattern, Local(4096)),
    ("gpt2", {"n_inner": 100}, lambda s: s.ffn.hidden, 100),
    ("gpt2", {"scale_attn_weights": False}, lambda s: s.attn.scale, 1.0),
    ("gpt2", {"activation_function": "relu"}, lambda s: s.ffn.act, "relu"),
    ("gemma2", {"attn_logit_softcapping": None}, lambda s: s.attn.softcap, None),
    ("gemma2", {"query_pre_attn_scalar": 64}, lambda s: s.attn.scale, 1 / 8),
    ("gemma2", {"attention_bias": True}, lambda s: s.attn.qkv_bias, True),
    ("gemma2", {"sliding_window": 3}, lambda s: s.attn.pattern, Local(3)),
]


@pytest.mark.parametrize(("name", "change", "look", "value"), CHANGES, ids=lambda x: "" if callable(x) else str(x)[:40])
def test_a_field_changes_the_spec_and_comes_back(name, change, look, value):
    config = {k: v for k, v in (config_of(name) | change).items() if v != "absent"}
    spec = spec_of_config(config)
    assert look(spec.stacks[0].pattern[0]) == value
    assert spec_of_config(family_of_spec(spec)[1]) == spec


def test_model_wide_fields():
    assert spec_of_config(config_of("gemma2") | {"final_logit_softcapping": None}).head.softcap is None
    assert spec_of_config(config_of("gpt2") | {"tie_word_embeddings": False}).tied is False
    assert spec_of_config({k: v for k, v in config_of("gpt2").items() if k != "tie_word_embeddings"}).tied is True
    assert spec_of_config({k: v for k, v in config_of("llama_gqa").items() if k != "tie_word_embeddings"}).tied is False


def test_attention_scaled_by_layer():
    spec = spec_of_config(config_of("gpt2") | {"scale_attn_by_inverse_layer_idx": True})
    assert [s.pattern[0].attn.scale for s in spec.stacks] == pytest.approx([1 / 4, 1 / 8, 1 / 12])
    assert spec_of_config(family_of_spec(spec)[1]) == spec


def test_windows_on_upper_layers_make_two_stacks():
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config = {k: v for k, v in config_of("qwen2").items() if k != "layer_types"} | windowed
    spec = spec_of_config(config)
    assert [(s.pattern[0].attn.pattern, s.repeats) for s in spec.stacks] == [(Full(), 1), (Local(8), 2)]
    assert spec_of_config(family_of_spec(spec)[1]) == spec


def test_layer_types_win_over_the_default_alternation():
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    spec = spec_of_config(config_of("gemma2") | {"layer_types": types})
    assert [s.pattern[0].attn.pattern for s in spec.stacks for _ in range(s.repeats)] == [
        Full(), Full(), Local(8), Full(),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    ("llama_gqa", {"model_type": "mamba"}, "model_type 'mamba'.*known are"),
    ("llama_gqa", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("llama_gqa", {"surprise": 3}, "'surprise'.*might change the math"),
    ("llama_gqa", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama_gqa", {"hidden_act": "mish"}, "hidden_act.*mish"),
    ("llama_gqa", {"hidden_size": "64"}, "hidden_size must be int, found '64'"),
    ("llama_gqa", {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    ("llama_gqa", {"num_key_value_heads": 3}, "kv_heads=3"),
    ("llama_gqa", {"tie_word_embeddings": None}, "tie_word_embeddings must be bool"),
    ("llama_gqa", {"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, "rope_type.*'magic'"),
    ("llama_gqa", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "needs the keys.*factor"),
    ("llama_gqa", {"rope_parameters": {"rope_type": "default", "mystery": 1}}, "mystery"),
    ("llama_gqa", {"rope_theta": 5e5}, "rope_theta is 10000.0 in one place and 500000.0"),
    (
        "llama_gqa",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type is 'default' in one place and 'linear'",
    ),
    ("llama_gqa", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False, found True"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=lambda x: str(x)[:50])
def test_unsupported_config_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message):
        spec_of_config(config_of(name) | change)


def test_missing_extra_and_misshapen_tensors_are_named(copy):
    path = copy()
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(63, np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((112, 64), np.float32)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match="do not match its config") as error:
        load_folder(path)
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight [112, 64]",
        "misshapen: model.norm.weight must be [64], found [63]",
        "extra: model.layers.3.mlp.up_proj.weight [112, 64]",
    ):
        assert part in str(error.value)


def test_untied_head_that_is_absent(copy):
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \[256, 64\]"):
        load_folder(copy("qwen2", tie_word_embeddings=False))


def test_tied_head_that_differs(copy):
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        load_folder(copy("llama_gqa", tie_word_embeddings=True))


def test_tied_head_stored_twice_is_read(copy):
    path = copy("qwen2")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, path / "model.safetensors")
    assert load_folder(path)[0].tied


def test_config_that_is_absent_or_no_object(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load_folder(tmp_path)
    for text in ("[1]", "{", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="must hold a JSON object"):
            load_folder(tmp_path)


def test_a_tokenizer_too_large_for_the_model(copy):
    path = copy()
    train_tokenizer(["some words to learn from, and more of them"] * 50, 300, "bpe").save(path)
    with pytest.raises(ValueError, match="300 ids, the model's vocabulary 256"):
        load_folder(path)


def test_saving_refuses_a_used_folder_and_a_foreign_spec(tmp_path):
    spec, params, _ = load_folder(GOLDENS / "llama_gqa")
    with pytest.raises(FileExistsError, match="not empty"):
        save_folder(GOLDENS / "llama_gqa", spec, params)
    block = spec.stacks[0].pattern[0]
    odd = replace(spec, stacks=(Stack((replace(block, place="sandwich"),), 3),))
    with pytest.raises(ValueError, match="no known family"):
        save_folder(tmp_path / "out", odd, params)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing(tmp_path):
    spec, params, _ = load_folder(GOLDENS / "llama_gqa")
    params["norm"] = {"scale": params["norm"]["scale"][:5]}
    with pytest.raises(ValueError, match=r"model.norm.weight"):
        save_folder(tmp_path / "out", spec, params)
    assert list(tmp_path.iterdir()) == []


def test_styles_convert_into_each_other():
    for name in NAMES:
        config = config_of(name)
        assert spec_of_config(modern(classic(config))) == spec_of_config(config)
