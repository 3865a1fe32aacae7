"""GPT-NeoX, Phi, Falcon, BLOOM, GPT-J, StableLM, StarCoder2, MPT, OPT: fields, refusals, names on the hub."""

import json
import shutil
from math import log, prod, sqrt

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.architectures import model_params
from jaxllm.config import Alibi, Full, LayerNorm, Linear, Local, LongRope, Rope
from jaxllm.models.families import family_of_spec, spec_of_config
from jaxllm.models.rope import classic
from jaxllm.params import count
from jaxllm.rules import wanted
from tests.models.support import GOLDENS, changed, comes_back, config_of, first

# ------------------------------------------------------------------------------------------------- published sizes


FALCON_40B = {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8}
STABLELM_12B = {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "vocab_size": 100_352}
PHI4_MINI = {"vocab_size": 200_064, "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True}
PUBLISHED = [
    ({"model_type": "falcon", "new_decoder_architecture": True} | FALCON_40B, 41_303_293_952),
    ({"model_type": "phi3", "sliding_window": 262_144, "partial_rotary_factor": 0.75} | PHI4_MINI, 3_836_021_760),
    ({"model_type": "phi"}, 1_418_270_720),
    (
        {"model_type": "stablelm", "num_key_value_heads": 8, "qk_layernorm": True, "use_parallel_residual": True}
        | STABLELM_12B,
        12_143_185_920,
    ),
]


@pytest.mark.parametrize(("config", "size"), PUBLISHED, ids=["falcon_40b", "phi4_mini", "phi_15", "stablelm2_12b"])
def test_other_published_sizes(config, size):
    """Computed from the published configs."""
    spec = spec_of_config(config)
    assert count(model_params(spec)) == size
    assert sum(map(prod, wanted(family_of_spec(spec)[0].names(spec), model_params(spec)).values())) == size


# --------------------------------------------------------------------------- every field that changes the math is read


biases = first(lambda b: (b.attn.qkv_bias, b.attn.out_bias, b.ffn.bias))
place, rope, heads = first(lambda b: b.place), first(lambda b: b.attn.position), first(lambda b: b.attn.kv_heads)
shape = first(lambda b: (b.attn.heads, b.attn.kv_heads, b.attn.head_dim))
act, hidden, window = first(lambda b: b.ffn.act), first(lambda b: b.ffn.hidden), first(lambda b: b.attn.pattern)
eps = first(lambda b: b.norm.eps)

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONG, ORIGINAL = {"type": "longrope"} | FACTORS, "original_max_position_embeddings"
OLD = {"new_decoder_architecture": False, "num_kv_heads": "absent", "num_ln_in_parallel_attn": None}


def long_rope(original, temperature):
    return Rope(scaling=LongRope((1.0,) * 8, (2.0,) * 8, original, temperature))


def attn_config(**change):
    return {"attn_config": config_of("mpt")["attn_config"] | change}


CHANGES = [
    ("gpt_neox", {"use_parallel_residual": False}, place, "pre"),
    ("gpt_neox", {"attention_bias": False}, biases, (False, False, True)),
    ("gpt_neox", {"hidden_act": "gelu_fast"}, act, "gelu_tanh"),
    ("gpt_neox", {"rope_parameters": None}, rope, Rope(fraction=0.25)),
    ("gpt_neox", {"rope_parameters": None, "rotary_pct": 1.0, "rotary_emb_base": 500}, rope, Rope(500.0)),
    (
        "gpt_neox",
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
        rope,
        Rope(fraction=0.25, scaling=Linear(2.0)),
    ),
    ("gpt_neox", {"tie_word_embeddings": True}, lambda s: s.tied, True),
    ("phi3", {"sliding_window": None}, window, Full()),
    ("phi3", {"num_key_value_heads": None, "head_dim": 8}, shape, (4, 4, 8)),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, rope, Rope(fraction=0.5)),
    ("phi3", {"rope_parameters": None, "rope_scaling": LONG}, rope, long_rope(128, 1.0)),
    (
        "phi3",
        {"rope_parameters": None, "rope_scaling": LONG | {"type": "su"}, ORIGINAL: 32},
        rope,
        long_rope(32, sqrt(1 + log(4) / log(32))),
    ),
    (
        "phi3",
        {"rope_parameters": None, "rope_scaling": LONG | {"type": "yarn"}, ORIGINAL: 128},
        rope,
        long_rope(128, 1.0),
    ),
    ("phi3", {"rope_parameters": None, "rope_scaling": LONG, ORIGINAL: "absent"}, rope, long_rope(4096, 1.0)),
    (
        "phi3",
        {"rope_parameters": None, "rope_scaling": LONG | {"attention_factor": 1.5}},
        rope,
        long_rope(128, 1.5),
    ),
    ("falcon_7b", {"multi_query": False}, heads, 4),
    ("falcon_7b", {"parallel_attn": False}, place, "pre"),
    ("falcon_7b", {"parallel_attn": False, "num_ln_in_parallel_attn": 2}, place, "pre"),
    ("falcon_7b", {"num_ln_in_parallel_attn": 1}, place, "shared"),
    ("falcon_7b", {"bias": True}, biases, (True, True, True)),
    ("falcon_7b", {"alibi": None, "bias": None, "activation": "relu"}, act, "relu"),
    ("falcon_7b", {"ffn_hidden_size": None}, hidden, 256),
    ("falcon_7b", {"hidden_size": "absent", "n_embed": 128}, lambda s: s.dim, 128),
    ("falcon_7b", {"alibi": True}, rope, Alibi(scale=0.5, rounded=True)),
    ("falcon_7b", {"alibi": True, "attn_implementation": "sdpa"}, rope, Alibi(scale=0.25, rounded=True)),
    ("falcon_new", {"num_ln_in_parallel_attn": 1}, place, "shared"),
    ("falcon_new", {"num_ln_in_parallel_attn": "absent"}, place, "parallel"),
    ("falcon_new", {"num_kv_heads": None}, heads, 4),
    ("falcon_new", OLD, lambda s: (place(s), heads(s)), ("shared", 1)),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, place, "normed"),
    ("bloom", {"n_head": "absent", "num_attention_heads": 3}, shape, (3, 3, 16)),
    ("bloom", {"n_layer": "absent", "num_hidden_layers": 5}, lambda s: s.layers, 5),
    ("bloom", {"seq_length": 77}, lambda s: s.context, 77),
    ("bloom", {"hidden_size": 96}, hidden, 384),
    ("bloom", {"layer_norm_epsilon": 1e-3}, lambda s: (eps(s), s.norm.eps, s.embed.norm.eps), (1e-3, 1e-3, 1e-3)),
    ("bloom", {"tie_word_embeddings": "absent"}, lambda s: s.tied, True),
    ("gptj", {"rotary_dim": 16}, rope, Rope(interleaved=True)),
    ("gptj", {"rotary_dim": "absent", "n_embd": 512}, rope, Rope(fraction=0.5, interleaved=True)),
    ("gptj", {"n_inner": None}, hidden, 256),
    ("gptj", {"activation_function": "relu"}, act, "relu"),
    ("gptj", {"n_positions": "absent", "max_position_embeddings": 99}, lambda s: s.context, 99),
    ("gptj", {"tie_word_embeddings": True}, lambda s: (s.tied, s.head.bias), (True, True)),
    ("phi", {"qk_layernorm": True, "layer_norm_eps": 1e-3}, first(lambda b: b.attn.qk_norm.norm), LayerNorm(1e-3)),
    ("phi", {"rope_parameters": None, "partial_rotary_factor": "absent"}, rope, Rope(fraction=0.5)),
    ("phi", {"rope_parameters": None, "rope_theta": 500.0, "partial_rotary_factor": 1.0}, rope, Rope(500.0)),
    ("phi", {"num_key_value_heads": "absent"}, heads, 4),
    ("stablelm", {"use_qkv_bias": False}, biases, (False, False, False)),
    ("stablelm", {"use_parallel_residual": True}, place, "shared"),
    ("stablelm", {"qk_layernorm": True}, first(lambda b: b.attn.qk_norm.norm), LayerNorm(bias=False)),
    ("stablelm", {"rope_parameters": None}, rope, Rope(fraction=0.25)),
    ("stablelm", {"num_key_value_heads": "absent", "num_attention_heads": 32, "hidden_size": 256}, heads, 32),
    ("starcoder2", {"use_bias": False}, biases, (False, False, False)),
    ("starcoder2", {"sliding_window": "absent"}, window, Full()),
    ("starcoder2", {"sliding_window": 5}, window, Local(5)),
    ("starcoder2", {"norm_epsilon": 1e-3, "layer_norm_epsilon": 1e-2}, eps, 1e-3),
    ("starcoder2", {"hidden_act": "relu", "activation_function": "gelu"}, act, "relu"),
    ("starcoder2", {"tie_word_embeddings": "absent"}, lambda s: s.tied, True),
    ("mpt", attn_config(clip_qkv=None), first(lambda b: b.attn.clip), None),
    ("mpt", attn_config(clip_qkv=0), first(lambda b: b.attn.clip), None),
    ("mpt", attn_config(softmax_scale=1), first(lambda b: b.attn.scale), 1.0),
    ("mpt", {"attn_config": None}, first(lambda b: b.attn.clip), None),
    ("mpt", {"expansion_ratio": 3}, hidden, 256),
    ("mpt", {"layer_norm_epsilon": 1e-3}, first(lambda b: b.norm), LayerNorm(1e-3, bias=False)),
    ("opt", {"do_layer_norm_before": False}, lambda s: (place(s), s.norm), ("post", None)),
    ("opt", {"_remove_final_layer_norm": True}, lambda s: (place(s), s.norm), ("pre", None)),
    ("opt", {"enable_bias": False}, biases, (False, False, False)),
    ("opt", {"layer_norm_elementwise_affine": False}, lambda s: s.norm, LayerNorm(bias=False, scale=False)),
    ("opt", {"word_embed_proj_dim": 32}, lambda s: s.embed.dim, 32),
    ("opt", {"word_embed_proj_dim": None}, lambda s: s.embed.dim, None),
    ("opt", {"activation_function": "gelu"}, act, "gelu"),
]


@pytest.mark.parametrize(("name", "change", "look", "value"), CHANGES, ids=lambda x: "" if callable(x) else str(x)[:50])
def test_a_field_changes_the_spec_and_comes_back(name, change, look, value):
    comes_back(changed(name, change), look, value)


def test_gpt_neox_writes_rotary_fields_that_its_reference_reads():
    given = {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 500}
    config = classic(family_of_spec(spec_of_config(config_of("gpt_neox") | given))[1])
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.5, 500.0)


def test_phi3_writes_what_older_and_newer_references_read():
    """Version 4 wants three keys, by the older name of the type; the original length stands outside."""
    config = classic(family_of_spec(spec_of_config(config_of("phi3_longrope")))[1])
    assert sorted(config["rope_scaling"]) == ["long_factor", "short_factor", "type"]
    assert (config[ORIGINAL], config["partial_rotary_factor"]) == (16, 0.75)


# --------------------------------------------------------------------------------------------------------- refusals

NEW = {"new_decoder_architecture": True}
REFUSED = [
    ("gpt_neox", {"hidden_size": 66}, "width 66 must be a multiple of the 4 attention heads"),
    ("gpt_neox", {"hidden_act": "mish"}, "hidden_act.*mish"),
    ("gpt_neox", {"rotary_pct": 0.5}, "partial_rotary_factor is 0.25 in one place and 0.5"),
    ("gpt_neox", {"rope_parameters": None, "rotary_pct": 1.5}, "rotated width 16 \\* 1.5 = 24"),
    ("gpt_neox", {"head_dim": 8}, "head_dim"),
    ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type.*'linear'"),
    ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "needs the keys.*long_factor"),
    ("phi3", {"attention_bias": True}, "attention_bias must be False"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias must be False"),
    ("phi3", {"full_attn_mod": 2}, "full_attn_mod must be 1"),
    ("falcon_new", {"parallel_attn": False}, "parallel_attn=False is no model"),
    ("falcon_new", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn=3"),
    ("falcon_new", {"num_kv_heads": 3}, "kv_heads=3"),
    ("falcon_7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
    ("falcon_7b", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads must be 4"),
    ("falcon_7b", {"alibi": True, "attn_implementation": "mine"}, "attn_implementation must be one of.*'mine'"),
    ("falcon_7b", {"n_embed": 128}, "hidden_size is 64, but n_embed, another name of it, 128"),
    ("falcon_7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
    ("falcon_7b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("bloom", {"slow_but_exact": True}, "slow_but_exact must be False"),
    ("bloom", {"n_inner": 100}, "n_inner must be None"),
    ("bloom", {"rope_theta": 1e4}, "rope_parameters"),
    ("gptj", {"rotary_dim": 7}, "rotated width 16.*must be even"),
    ("gptj", {"rotary_dim": None}, "rotary_dim must be int"),
    ("gptj", {"rotary": False}, "rotary must be True"),
    ("gptj", {"scale_attn_weights": False}, "scale_attn_weights must be True"),
    ("phi", {"tie_word_embeddings": None}, "tie_word_embeddings must be bool"),
    ("stablelm", {"num_key_value_heads": None}, "num_key_value_heads must be int"),
    ("starcoder2", {"mlp_type": "gated"}, "mlp_type must be 'default'"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type must be 'layer_norm'"),
    ("starcoder2", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
    ("mpt", {"no_bias": False}, "no_bias must be True"),
    ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale must be None"),
    ("mpt", {"norm_type": "rmsnorm"}, "norm_type"),
    ("mpt", attn_config(alibi=False), "alibi must be True"),
    ("mpt", attn_config(alibi_bias_max=16), "alibi_bias_max must be 8"),
    ("mpt", attn_config(qk_ln=True), "qk_ln must be False"),
    ("mpt", attn_config(prefix_lm=True), "prefix_lm must be False"),
    ("mpt", attn_config(attn_type="multiquery_attention"), "attn_type"),
    ("mpt", attn_config(rope=True), "'rope'"),
    ("mpt", {"attn_config": [1]}, "attn_config"),
    ("opt", {"word_embed_proj_dim": 0}, "word_embed_proj_dim"),
    ("opt", {"activation_function": "xielu"}, "activation_function.*xielu"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=lambda x: str(x)[:50])
def test_unsupported_config_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message):
        spec_of_config(config_of(name) | change)


# ------------------------------------------------------------------------------------------------------ hub checkpoints

HUB = [  # as published: without the prefix, with buffers, with a tied head twice, under another class's name
    ("bloom", "transformer.", {}, {"model_type": "bloom", "n_embed": 48, "hidden_size": "absent"}),
    ("opt", "model.", {}, {"prefix": "</s>", "activation_dropout": 0.0}),
    (
        "gpt_neox",
        "",
        {"gpt_neox.layers.0.attention.bias": (1, 1, 8, 8), "gpt_neox.layers.0.attention.masked_bias": ()},
        {},
    ),
    ("gpt_neox", "", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,)}, {}),
    ("gptj", "", {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.0.attn.masked_bias": ()}, {"n_ctx": 128}),
    ("stablelm", "", {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}, {}),
    ("mpt", "", {}, {"architectures": ["MPTForCausalLM"], "init_config": {"name": "kaiming"}, "verbose": 0}),
]


@pytest.mark.parametrize(("name", "prefix", "buffers", "change"), HUB, ids=lambda x: x if isinstance(x, str) else "")
def test_checkpoints_as_they_are_published(name, prefix, buffers, change, tmp_path):
    tensors = load_file(GOLDENS / name / "model.safetensors")
    assert all(k.startswith(prefix) for k in tensors)
    named = {k.removeprefix(prefix): v for k, v in tensors.items()}
    save_file(named | {k: np.ones(s, np.float32) for k, s in buffers.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(changed(name, change)))
    model, golden = jaxllm.load(tmp_path), np.load(GOLDENS / name / "golden.npz")
    got = jaxllm.logits(model.spec, model.params, golden["input_ids"])
    np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "head", "embedding"),
    [
        ("falcon_new", "lm_head.weight", "transformer.word_embeddings.weight"),
        ("mpt", "lm_head.weight", "transformer.wte.weight"),
        ("opt", "lm_head.weight", "model.decoder.embed_tokens.weight"),
    ],
)
def test_a_tied_head_may_be_stored_twice_but_not_differ(name, head, embedding, tmp_path):
    tensors = load_file(GOLDENS / name / "model.safetensors")
    shutil.copy(GOLDENS / name / "config.json", tmp_path)
    save_file(tensors | {head: tensors[embedding].copy()}, tmp_path / "model.safetensors")
    assert jaxllm.load(tmp_path).spec.tied
    save_file(tensors | {head: tensors[embedding] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{head} differs from {embedding}"):
        jaxllm.load(tmp_path)


def test_a_norm_of_one_head_that_is_missing_is_named(tmp_path):
    tensors = load_file(GOLDENS / "stablelm_parallel" / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_layernorm.norms.1.weight"]
    shutil.copy(GOLDENS / "stablelm_parallel" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model.layers.1.self_attn.k_layernorm.norms.1.weight \[8\]"):
        jaxllm.load(tmp_path)


def test_slopes_count_once_outside_of_eager_attention(tmp_path):
    """Falcon's ALiBi: twice the slopes in the reference's eager code, so that once is half of them."""
    model = jaxllm.load(GOLDENS / "falcon_alibi")
    golden = np.load(GOLDENS / "falcon_alibi" / "golden.npz")
    shutil.copy(GOLDENS / "falcon_alibi" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of("falcon_alibi") | {"attn_implementation": "sdpa"}))
    once = jaxllm.load(tmp_path)
    assert rope(model.spec).scale == 2 * rope(once.spec).scale
    got = np.asarray(jaxllm.logits(once.spec, once.params, golden["input_ids"]))
    np.testing.assert_allclose(got, golden["sdpa.logits"], rtol=0, atol=1e-4)
    assert np.abs(got - golden["logits"]).max() > 0.1
