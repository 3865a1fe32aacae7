"""Gemma, Cohere, GLM, Granite, SmolLM3, Yi, Baichuan, ChatGLM: hub configs, fields, lengths that rotations see."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxllm
from jaxllm.config import Alibi, DynamicNTK, Full, Linear, Llama3, Local, LongRope, RMSNorm, Rope, Yarn
from jaxllm.convert.hf import save_folder
from jaxllm.convert.safetensors_io import open_folder
from jaxllm.decode import sample
from jaxllm.models.common import layers_of
from jaxllm.models.families import spec_of_config
from jaxllm.models.presets import PRESETS
from tests.models import published
from tests.models.hub_configs import HUB
from tests.models.support import GOLDENS, comes_back, config_of, first

# ------------------------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize("name", HUB)
def test_published_config(name):
    assert spec_of_config(HUB[name]) == PRESETS[name]()


# --------------------------------------------------------------------------- every field that changes the math is read

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
BAICHUAN = {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "hidden_size": 48, "vocab_size": 64}
BAICHUAN |= {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "rms_norm_eps": 1e-6}
CHATGLM = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 32, "padded_vocab_size": 64}
CHATGLM |= {"num_layers": 2, "num_attention_heads": 4, "kv_channels": 8, "ffn_hidden_size": 40, "seq_length": 64}
CHATGLM |= {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "rmsnorm": True}
CHATGLM |= {"layernorm_epsilon": 1e-5, "post_layer_norm": True, "tie_word_embeddings": False}
MADE = {"baichuan": BAICHUAN, "chatglm": CHATGLM}


def base(name):
    return MADE[name] if name in MADE else config_of(name)


def patterns(spec):
    return [block.attn.pattern for block in layers_of(spec)]


def ropes(spec):
    return [block.attn.position for block in layers_of(spec)]


CHANGES = [
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, first(lambda b: b.ffn.act), "gelu_tanh"),
    ("gemma", {"hidden_act": "silu", "hidden_activation": "absent"}, first(lambda b: b.ffn.act), "silu"),
    ("gemma", {"attention_bias": True}, first(lambda b: (b.attn.qkv_bias, b.attn.out_bias)), (True, True)),
    ("gemma", {"tie_word_embeddings": "absent"}, lambda s: s.tied, True),
    ("gemma", {"tie_word_embeddings": False}, lambda s: s.tied, False),
    ("gemma3_text", {"sliding_window": 5}, patterns, [Local(5), Local(5), Full(), Local(5)]),
    ("gemma3_text", {"layer_types": "absent", "sliding_window_pattern": 2}, patterns, [Local(8), Full()] * 2),
    ("gemma3_text", {"layer_types": "absent", "sliding_window_pattern": "absent"}, patterns, [Local(8)] * 4),
    ("gemma3_text", {"final_logit_softcapping": 7.0}, lambda s: s.head.softcap, 7.0),
    ("gemma3_text", {"query_pre_attn_scalar": 64}, first(lambda b: b.attn.scale), 1 / 8),
    ("gemma3_text", {"attention_bias": True}, first(lambda b: b.attn.out_bias), True),
    ("gemma3_text", {"hidden_activation": "relu"}, first(lambda b: b.ffn.act), "relu"),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": YARN}},
        ropes,
        [Rope(), Rope(), Rope(scaling=Yarn(4.0, 32)), Rope()],
    ),
    (
        "gemma3_text",
        {"rope_parameters": "absent", "rope_theta": 5e5, "rope_local_base_freq": 100.0},
        ropes,
        [Rope(100.0), Rope(100.0), Rope(5e5), Rope(100.0)],
    ),
    ("gemma3_text", {"rope_parameters": "absent"}, ropes, [Rope(), Rope(), Rope(1e6), Rope()]),
    ("cohere", {"use_qk_norm": False}, first(lambda b: b.attn.qk_norm), None),
    ("cohere", {"use_qk_norm": "absent"}, first(lambda b: b.attn.qk_norm), None),
    ("cohere", {"logit_scale": 2}, lambda s: s.head.scale, 2.0),
    ("cohere", {"logit_scale": "absent"}, lambda s: s.head.scale, 1 / 16),
    ("cohere", {"layer_norm_eps": 1e-3}, first(lambda b: (b.norm.eps, b.attn.qk_norm.norm.eps)), (1e-3, 1e-3)),
    ("cohere", {"rope_parameters": "absent"}, first(lambda b: b.attn.position), Rope(5e5, interleaved=True)),
    ("cohere", {"attention_bias": True, "tie_word_embeddings": False}, first(lambda b: b.attn.qkv_bias), True),
    ("cohere2", {"sliding_window": 5}, patterns, [Local(5)] * 3 + [Full()]),
    ("cohere2", {"layer_types": "absent", "sliding_window_pattern": 2}, patterns, [Local(8), Full()] * 2),
    ("cohere2", {"layer_types": ["full_attention"] * 4, "sliding_window": None}, ropes, [None] * 4),
    ("cohere2", {"head_dim": 16}, first(lambda b: b.attn.head_dim), 16),
    ("glm", {"attention_bias": False}, first(lambda b: (b.attn.qkv_bias, b.attn.out_bias)), (False, False)),
    ("glm", {"rope_parameters": "absent"}, first(lambda b: b.attn.position), Rope(1e4, 0.5, True)),
    (
        "glm",
        {"rope_parameters": YARN | {"partial_rotary_factor": 1.0}},
        first(lambda b: b.attn.position),
        Rope(1e4, 1.0, True, Yarn(4.0, 32)),
    ),
    ("glm4", {"rms_norm_eps": 1e-3}, first(lambda b: (b.norm.eps, b.place)), (1e-3, "sandwich")),
    ("granite", {"embedding_multiplier": 1.0}, lambda s: s.embed.scale, None),
    ("granite", {"embedding_multiplier": 12}, lambda s: s.embed.scale, 12.0),
    ("granite", {"attention_multiplier": "absent"}, first(lambda b: b.attn.scale), 1.0),
    ("granite", {"residual_multiplier": 0.22}, first(lambda b: b.branch_scale), 0.22),
    ("granite", {"logits_scaling": 49}, lambda s: s.head.scale, 1 / 49),
    (
        "granite",
        {"attention_bias": True, "mlp_bias": True},
        first(lambda b: (b.attn.out_bias, b.ffn.bias)),
        (True, True),
    ),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0, 1]}, ropes, [None, Rope(2e6), Rope(2e6), None]),
    ("smollm3", {"no_rope_layers": "absent", "no_rope_layer_interval": 2}, ropes, [Rope(2e6), None] * 2),
    ("smollm3", {"no_rope_layers": [0] * 4}, ropes, [None] * 4),
    (
        "smollm3",
        {"layer_types": "absent", "use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 0, 1]},
        patterns,
        [Full(), Local(6), Local(6), Full()],
    ),
    ("smollm3", {"rope_parameters": "absent"}, ropes, [Rope(2e6), Rope(2e6), None, Rope(2e6)]),
    ("llama_rope_dynamic", {}, ropes, [Rope(scaling=DynamicNTK(3.0, 16))] * 2),
    (
        "llama_rope_longrope",
        {},
        first(lambda b: b.attn.position.scaling),
        LongRope((1.0, 1.05, 1.2, 1.5), (1.1, 1.9, 3.0, 3.9), 16, math.sqrt(1.5)),
    ),
    ("llama31_rope", {}, first(lambda b: b.attn.position.scaling), Llama3(8.0, 1.0, 4.0, 32)),
    ("llama_rope_linear", {}, first(lambda b: b.attn.position.scaling), Linear(4.0)),
    ("baichuan", {"max_position_embeddings": 32}, ropes, [Rope()] * 2),
    ("baichuan", {"model_max_length": 32}, ropes, [Alibi()] * 2),
    ("baichuan", {"z_loss_weight": 0}, lambda s: s.head.normalised, True),
    ("baichuan", {"vocab_size": 125_696}, lambda s: s.head.normalised, True),
    ("baichuan", {}, lambda s: s.head.normalised, False),
    ("chatglm", {"rope_ratio": 50}, first(lambda b: b.attn.position.theta), 5e5),
    ("chatglm", {"add_bias_linear": True}, first(lambda b: (b.attn.out_bias, b.ffn.bias)), (True, True)),
    ("chatglm", {"add_qkv_bias": False}, first(lambda b: b.attn.qkv_bias), False),
    ("chatglm", {"post_layer_norm": False}, lambda s: s.norm, None),
    ("chatglm", {"multi_query_attention": "absent"}, first(lambda b: b.attn.kv_heads), 4),
    ("chatglm", {"layernorm_epsilon": 1e-3}, lambda s: s.norm, RMSNorm(1e-3)),
]


def ids(x):
    return "" if callable(x) else str(x)[:50]


@pytest.mark.parametrize(("name", "change", "look", "value"), CHANGES, ids=ids)
def test_a_field_changes_the_spec_and_comes_back(name, change, look, value):
    comes_back({k: v for k, v in (base(name) | change).items() if v != "absent"}, look, value)


REFUSED = [
    ("gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window=None"),
    ("gemma3_text", {"rope_parameters": {"chunked_attention": {"rope_theta": 1.0}}}, "chunked_attention"),
    ("cohere", {"sliding_window": 8}, "'sliding_window'"),
    ("cohere", {"logit_scale": None}, "logit_scale must be float"),
    ("cohere2", {"use_qk_norm": True}, "'use_qk_norm'"),
    ("cohere2", {"sliding_window": None}, "sliding_window=None"),
    ("cohere2", {"position_embedding_type": "alibi"}, "position_embedding_type must be 'rope_gptj'"),
    ("glm", {"rope_parameters": {"partial_rotary_factor": 0.2, "rope_theta": 1e4}}, "= 3 must be even"),
    ("glm", {"mlp_bias": True}, "'mlp_bias'"),
    ("granite", {"logits_scaling": "8"}, "logits_scaling must be float"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "sliding_window=None"),
    ("baichuan", {"rope_theta": 5e5}, "rope_parameters"),
    ("baichuan", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("chatglm", {"position_encoding_2d": True}, "position_encoding_2d"),
    ("chatglm", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("chatglm", {"quantization_bit": 4}, "quantization_bit"),
    ("chatglm", {"multi_query_group_num": 4}, "multi_query_group_num=4 must be less"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=ids)
def test_unsupported_config_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message):
        spec_of_config(base(name) | change)


# -------------------------------------------------------------------------- Baichuan and ChatGLM, by their definitions


def random_folder(path, config, shapes):
    """A checkpoint folder of random weights; returns them by name."""
    rng = np.random.default_rng(5)
    weights = {
        name: (rng.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.2) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return weights


def compare(path, transcribed):
    """Two rows of different length, padded on the left: logits as transcribed; and the export has the same bits."""
    model, rng = jaxllm.load(path), np.random.default_rng(6)
    rows = [rng.integers(0, 64, n) for n in (13, 9)]
    tokens, mask = (np.stack([np.pad(x, (13 - len(x), 0)) for x in xs]) for xs in (rows, [r * 0 + 1 for r in rows]))
    got = np.asarray(jaxllm.logits(model.spec, model.params, tokens, mask))
    for row, logits in zip(rows, got, strict=True):
        np.testing.assert_allclose(logits[-len(row) :], transcribed(row), rtol=0, atol=1e-4)
    save_folder(path / "out", model.spec, model.params)
    before, after = open_folder(path), open_folder(path / "out")
    kept = [name for name in before.shapes if "inv_freq" not in name]
    assert sorted(after.shapes) == sorted(kept)
    assert all(after.read(name).tobytes() == before.read(name).tobytes() for name in kept)
    assert jaxllm.load(path / "out").spec == model.spec


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_baichuan(tmp_path, alibi, normalised):
    length = {"model_max_length": 64} if alibi else {"max_position_embeddings": 64}
    config = BAICHUAN | length | ({"z_loss_weight": 0} if normalised else {})
    shapes = {"model.embed_tokens.weight": (64, 48), "lm_head.weight": (64, 48), "model.norm.weight": (48,)}
    for i in range(2):
        layer = {"self_attn.W_pack": (144, 48), "self_attn.o_proj": (48, 48), "mlp.gate_proj": (40, 48)}
        layer |= {"mlp.up_proj": (40, 48), "mlp.down_proj": (48, 40), "input_layernorm": (48,)}
        layer |= {"post_attention_layernorm": (48,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = (4,)
    w = random_folder(tmp_path, config, shapes)
    compare(tmp_path, lambda row: published.baichuan(w, row, 6, 2, alibi=alibi, normalised=normalised))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_ratio": 50, "add_qkv_bias": False, "apply_query_key_layer_scaling": True},
        {"add_bias_linear": True, "rmsnorm": False},
        {"multi_query_attention": False, "post_layer_norm": False},
    ],
    ids=str,
)
def test_chatglm(tmp_path, change):
    config = CHATGLM | change
    everywhere, width = config.get("add_bias_linear", False), 64 if config["multi_query_attention"] else 96
    shapes = {"transformer.embedding.word_embeddings.weight": (64, 32), "transformer.output_layer.weight": (64, 32)}
    shapes["transformer.rotary_pos_emb.inv_freq"] = (2,)
    norms = ["transformer.encoder.final_layernorm"] if config["post_layer_norm"] else []
    for i in range(2):
        p = f"transformer.encoder.layers.{i}."
        norms += [p + "input_layernorm", p + "post_attention_layernorm"]
        linears = {"self_attention.query_key_value": (width, 32), "self_attention.dense": (32, 32)}
        linears |= {"mlp.dense_h_to_4h": (80, 32), "mlp.dense_4h_to_h": (32, 40)}
        for name, shape in linears.items():
            shapes[f"{p}{name}.weight"] = shape
            if everywhere or ("query" in name and config["add_qkv_bias"]):
                shapes[f"{p}{name}.bias"] = shape[:1]
    shapes |= {f"{name}.weight": (32,) for name in norms}
    shapes |= {} if config["rmsnorm"] else {f"{name}.bias": (32,) for name in norms}
    w = random_folder(tmp_path, config, shapes)
    compare(tmp_path, lambda row: published.chatglm(w, row, config))


# ------------------------------------------------------------------------------------- rotations that see the length


@pytest.mark.parametrize("name", ["llama_rope_dynamic", "llama_rope_longrope"])
def test_short_rows_keep_their_frequencies(name):
    """12 tokens, within the original context of 16: and other logits than as the beginning of 21."""
    model, golden = jaxllm.load(GOLDENS / name), np.load(GOLDENS / name / "golden.npz")
    short = np.asarray(jaxllm.logits(model.spec, model.params, golden["short.input_ids"]))
    np.testing.assert_allclose(short, golden["short.logits"], rtol=0, atol=1e-4)
    assert np.abs(golden["short.logits"] - golden["logits"][:, :12]).max() > 0.1


@pytest.mark.parametrize("name", ["llama_rope_dynamic", "llama_rope_longrope"])
def test_cached_generation_keeps_keys_of_their_own_time(name):
    """Greedy ids of the reference with its cache. With dynamic NTK another text than without."""
    model, golden = jaxllm.load(GOLDENS / name), np.load(GOLDENS / name / "golden.npz")
    prompts = golden["input_ids"].tolist()
    out = jaxllm.generate(model.spec, model.params, prompts, max_new_tokens=16)
    np.testing.assert_array_equal(out.ids(), golden["gen.greedy"])
    assert (golden["gen_nocache.greedy"] != golden["gen.greedy"]).any() == (name == "llama_rope_dynamic")


def test_a_prompt_in_chunks_is_rotated_by_its_whole_length(monkeypatch):
    """Chunks of 8 would begin with the short divisors; such prompts are fed in one piece."""
    monkeypatch.setattr(sample, "CHUNK", 8)
    model, golden = (f(GOLDENS / "llama_rope_longrope") for f in (jaxllm.load, lambda d: np.load(d / "golden.npz")))
    out = jaxllm.generate(model.spec, model.params, golden["input_ids"].tolist(), max_new_tokens=43)
    np.testing.assert_array_equal(np.array(out.ids())[:, :16], golden["gen.greedy"])


def test_dynamic_ntk_without_a_cache_goes_by_the_length_so_far():
    model, golden = (f(GOLDENS / "llama_rope_dynamic") for f in (jaxllm.load, lambda d: np.load(d / "golden.npz")))
    wanted = golden["gen_nocache.greedy"]
    for n in (0, 5, 15):
        tokens = np.concatenate([golden["input_ids"], wanted[:, :n]], 1)
        best = np.asarray(jaxllm.logits(model.spec, model.params, tokens))[:, -1].argmax(-1)
        np.testing.assert_array_equal(best, wanted[:, n])
