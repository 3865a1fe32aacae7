"""Qwen3, mixtures, OLMo, DeepSeek, GPT-OSS: options of their configs, refusals, names on the hub."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.architectures import model_params
from jaxllm.config import Full, Local, MoE, Yarn
from jaxllm.models.common import layers_of
from jaxllm.models.families import FAMILIES, family_of_spec, spec_of_config
from jaxllm.nn.attention import scale_of
from jaxllm.rules import wanted
from tests.models.support import GOLDENS, changed, comes_back, config_of

# --------------------------------------------------------------------------- every field that changes the math is read


def first(spec):
    return layers_of(spec)[0]


def last(spec):
    return layers_of(spec)[-1]


def sparse_layers(spec):
    return [i for i, block in enumerate(layers_of(spec)) if isinstance(block.ffn, MoE)]


def windows(spec):
    return [block.attn.pattern for block in layers_of(spec)]


def biases(spec):
    return first(spec).attn.qkv_bias, first(spec).attn.out_bias


def widths(spec):
    return first(spec).attn.head_dim, first(spec).attn.kv_heads


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
CHANGES = [
    ("qwen3", {"attention_bias": True}, biases, (True, True)),
    ("qwen3", {"head_dim": "absent", "num_key_value_heads": "absent", "num_attention_heads": 32}, widths, (128, 32)),
    ("qwen3", {"rms_norm_eps": 1e-3}, lambda s: first(s).attn.qk_norm.norm.eps, 1e-3),
    ("qwen3", WINDOW | {"layer_types": None, "max_window_layers": 2}, windows, [Full(), Full(), Local(5)]),
    ("qwen3", {"sliding_window": 5}, windows, [Full()] * 3),
    ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [1]}, sparse_layers, [0, 2]),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": None}, sparse_layers, [1]),
    ("qwen3_moe", {"decoder_sparse_step": 1, "norm_topk_prob": False}, lambda s: last(s).ffn.router.renormalise, False),
    (
        "qwen3_moe",
        {"decoder_sparse_step": 1, "norm_topk_prob": "absent"},
        lambda s: last(s).ffn.router.renormalise,
        False,
    ),
    ("qwen3_moe", {"decoder_sparse_step": 1, "num_local_experts": "absent"}, lambda s: last(s).ffn.experts, 128),
    ("qwen3_moe", {"head_dim": "absent"}, widths, (16, 2)),
    ("qwen3_moe", WINDOW, windows, [Local(5)] * 3),
    ("qwen2_moe", {"qkv_bias": False}, biases, (False, False)),
    ("qwen2_moe", {"shared_expert_intermediate_size": 20}, lambda s: last(s).ffn.shared.hidden, 20),
    ("qwen2_moe", WINDOW | {"layer_types": None, "max_window_layers": 2}, windows, [Local(5), Full(), Full()]),
    ("mixtral", {"sliding_window": 5}, windows, [Local(5)] * 2),
    ("mixtral", {"rope_parameters": None}, lambda s: first(s).attn.position.theta, 1e6),
    ("mixtral", {"num_local_experts": "absent", "num_experts": 5}, lambda s: first(s).ffn.experts, 5),
    ("mixtral", {"head_dim": 8}, widths, (8, 2)),
    ("olmo", {"clip_qkv": None}, lambda s: first(s).attn.clip, None),
    ("olmo", {"clip_qkv": 3}, lambda s: first(s).attn.clip, 3.0),
    ("olmo", {"attention_bias": True}, biases, (True, True)),
    ("olmo2", {"attention_bias": True}, biases, (True, True)),
    ("olmo2", {"rms_norm_eps": 1e-3}, lambda s: (first(s).attn.qk_norm.norm.eps, s.norm.eps), (1e-3, 1e-3)),
    ("olmoe", {"norm_topk_prob": True}, lambda s: first(s).ffn.router.renormalise, True),
    ("olmoe", {"clip_qkv": "absent"}, lambda s: first(s).attn.clip, None),
    ("deepseek_v2_lite", {"first_k_dense_replace": 0}, sparse_layers, [0, 1, 2]),
    ("deepseek_v2_lite", {"first_k_dense_replace": 0, "moe_layer_freq": 2}, sparse_layers, [0, 2]),
    ("deepseek_v2_lite", {"q_lora_rank": "absent"}, lambda s: first(s).attn.q_rank, 1536),
    ("deepseek_v2_lite", {"rms_norm_eps": 1e-3}, lambda s: (s.norm.eps, first(s).attn.norm.eps), (1e-3, 1e-6)),
    ("deepseek_v2_lite", {"mlp_bias": True}, lambda s: (first(s).ffn.bias, last(s).ffn.shared.bias), (True, True)),
    ("deepseek_v2_lite", {"n_group": 4, "topk_group": 2}, lambda s: last(s).ffn.router.groups, 1),
    (
        "deepseek_v2_lite",
        {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
        lambda s: (last(s).ffn.router.groups, last(s).ffn.router.top_groups, last(s).ffn.router.group_score),
        (4, 2, "best"),
    ),
    ("deepseek_v2_lite", {"n_shared_experts": None}, lambda s: last(s).ffn.shared, None),
    ("deepseek_v2_lite", {"routed_scaling_factor": 16}, lambda s: last(s).ffn.router.scale, 16.0),
    ("deepseek_v2_lite", {"rope_parameters": YARN}, lambda s: first(s).attn.scale, None),
    ("deepseek_v3", {"rope_interleave": False}, lambda s: first(s).attn.position.interleaved, False),
    ("deepseek_v3", {"rope_interleave": "absent"}, lambda s: first(s).attn.position.interleaved, True),
    ("deepseek_v3", {"norm_topk_prob": False}, lambda s: last(s).ffn.router.renormalise, False),
    ("deepseek_v3", {"attention_bias": True}, lambda s: first(s).attn.bias, True),
    ("deepseek_v3", {"q_lora_rank": None}, lambda s: first(s).attn.q_rank, None),
    ("gpt_oss", {"layer_types": None}, windows, [Local(8), Full()]),
    ("gpt_oss", {"attention_bias": False}, biases, (False, False)),
    ("gpt_oss", {"swiglu_alpha": 1.5}, lambda s: first(s).ffn.expert.beta, 1.5),
    ("gpt_oss", {"swiglu_alpha": "absent"}, lambda s: first(s).ffn.expert.beta, 1.702),
    ("gpt_oss", {"swiglu_limit": 3}, lambda s: first(s).ffn.expert.limit, 3.0),
    ("gpt_oss", {"experts_per_token": 2}, lambda s: first(s).ffn.router.top_k, 2),
    (
        "gpt_oss",
        {"rope_parameters": None},
        lambda s: (first(s).attn.position.theta, first(s).attn.position.scaling),
        (150_000.0, Yarn(32.0, 4096, truncate=False)),
    ),
    ("gpt_oss", {"rope_parameters": {"rope_theta": 1e4}}, lambda s: first(s).attn.position.scaling, None),
    (
        "gpt_oss",
        {"rope_parameters": "absent", "rope_theta": 1e4},
        lambda s: first(s).attn.position.scaling,
        Yarn(32.0, 4096, truncate=False),
    ),
]


@pytest.mark.parametrize(("name", "change", "look", "value"), CHANGES, ids=lambda x: "" if callable(x) else str(x)[:50])
def test_a_field_changes_the_spec_and_comes_back(name, change, look, value):
    comes_back(changed(name, change), look, value)


UNTIED = [
    "qwen3",
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "olmo",
    "olmo2",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
]


@pytest.mark.parametrize("name", UNTIED)
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied(name, tied):
    """The head is a tensor of its own unless the config says otherwise."""
    family = FAMILIES[name]
    config = family.to_hf(family.PRESETS[0]())
    spec = family.from_hf(config | {"tie_word_embeddings": tied})
    assert spec.tied is tied
    assert ("lm_head.weight" in wanted(family.names(spec), model_params(spec))) is not tied
    assert family.from_hf({k: v for k, v in config.items() if k != "tie_word_embeddings"}).tied is False


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, (0.1 * np.log(4) + 1) ** 2),
        ({"mscale_all_dim": 0.5}, (0.05 * np.log(4) + 1) ** 2),
        ({"mscale": 0.7, "mscale_all_dim": 0.9}, (0.09 * np.log(4) + 1) ** 2),
        ({"mscale": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 1.0),
    ],
)
def test_the_second_mscale_is_a_temperature_of_the_scores(given, factor):
    spec = spec_of_config(config_of("deepseek_v3") | {"rope_parameters": YARN | given})
    assert scale_of(first(spec).attn) == pytest.approx(24**-0.5 * factor, rel=1e-12)
    assert spec_of_config(family_of_spec(spec)[1]) == spec


# --------------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_attention.*sliding_window=None"),
    ("qwen3_moe", {"num_experts": 9}, "num_experts is 9 and num_local_experts, its other name, 8"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "top_k=9 must be in 1..8"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
    ("mixtral", {"attention_bias": True}, "attention_bias"),
    ("olmo", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ("olmoe", {"sliding_window": 5}, "sliding_window"),
    ("deepseek_v2_lite", {"norm_topk_prob": True}, "norm_topk_prob must be False"),
    ("deepseek_v2_lite", {"topk_method": "noaux_tc"}, "topk_method must be 'greedy' or 'group_limited_greedy'"),
    ("deepseek_v2_lite", {"scoring_func": "sigmoid"}, "scoring_func must be 'softmax'"),
    ("deepseek_v2_lite", {"num_key_value_heads": 2}, "num_key_value_heads must be num_attention_heads=4, found 2"),
    ("deepseek_v2_lite", {"rope_interleave": True}, "rope_interleave"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method must be 'noaux_tc'"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
    ("deepseek_v3", {"n_group": 3}, "experts=8 must split into groups=3"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be None"),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config must be None"),
    ("gpt_oss", {"experts_per_token": 3}, "num_experts_per_tok is 2 and experts_per_token, its other name, 3"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window=None"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=lambda x: str(x)[:50])
def test_unsupported_config_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message):
        spec_of_config(config_of(name) | change)


# ------------------------------------------------------------------------------------------------------ hub checkpoints


def test_layers_of_multi_token_prediction_are_left_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("deepseek_v3") | {"num_nextn_predict_layers": 1}))
    tensors = load_file(GOLDENS / "deepseek_v3" / "model.safetensors")
    extra = {"model.layers.3.eh_proj.weight": np.zeros((64, 128), np.float32)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    model, golden = jaxllm.load(tmp_path), np.load(GOLDENS / "deepseek_v3" / "golden.npz")
    logits = jaxllm.logits(model.spec, model.params, golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_a_missing_expert_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("mixtral")))
    tensors = load_file(GOLDENS / "mixtral" / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model.layers.1.block_sparse_moe.experts.2.w3.weight \[64, 64\]"):
        jaxllm.load(tmp_path)
