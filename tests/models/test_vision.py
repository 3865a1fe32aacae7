"""Models that see, against the reference: CLIP, Qwen2-VL, Qwen2.5-VL, LLaVA, BLIP-2; Qwen-VL against its definition."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_qwen_vl import qwen_vl as written_out

import jaxllm
from jaxllm.architectures import model_params
from jaxllm.config import Transformer, TwoTower
from jaxllm.convert.hf import load_folder, save_folder
from jaxllm.convert.safetensors_io import open_folder
from jaxllm.models import blip2, clip, llava, qwen2_5_vl, qwen2_vl, qwen_vl
from jaxllm.models.families import FAMILIES, family_of_spec, spec_of_config
from jaxllm.nn.patch import bicubic, cut
from jaxllm.objectives.contrastive import Pairs, contrastive_loss
from jaxllm.params import is_param, path_name
from jaxllm.runtime import Runtime
from jaxllm.two_tower import place_of_text
from jaxllm.vision_language import image_vectors, positions
from tests.models.support import GOLDENS, close, config_of, load

QWENS = ("qwen2_vl", "qwen2_5_vl")
PIXELS = ("pixel_values", "image_grid_thw")
SEEING = (*QWENS, "llava", "llava_layers", "blip2")
every_qwen = pytest.mark.parametrize("name", QWENS)
every_seeing = pytest.mark.parametrize("name", SEEING)


vectors = jax.jit(image_vectors, static_argnums=(1, 3))


def pixels_of(golden):
    return {name: golden[name] for name in PIXELS if name in golden.files}


# -------------------------------------------------------------------------------------------------------------- CLIP


def test_clip():
    model, golden = load("clip")
    mask = golden["attention_mask"]
    pixels = golden["pixel_values"]
    got = jaxllm.similarity(model.spec, model.params, golden["input_ids"], mask, pixel_values=pixels)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        close(getattr(got, name), golden[name])
    close(got.text_hidden[mask == 1], golden["text_last_hidden_state"][mask == 1])
    close(got.vision_hidden, golden["vision_last_hidden_state"])


def test_clip_loss_and_its_gradient():
    """The symmetric loss of two pairs; the temperature is learned with the rest."""
    model, golden = load("clip")
    ids, mask = (jnp.asarray(golden[name][:2]) for name in ("input_ids", "attention_mask"))
    batch = Pairs(ids, mask, cut(model.spec.vision, golden["pixel_values"]))
    loss = jax.jit(jax.value_and_grad(lambda p: contrastive_loss(p, model.spec, batch, Runtime()), has_aux=True))
    (value, aux), grad = loss(model.params)
    close(value, golden["loss_first2"], 1e-5)
    assert aux["weight"] == 2
    assert 0 <= aux["right"] <= 2
    reached = jax.tree.leaves([grad[name] for name in ("log_scale", "vision", "text", "text_projection")])
    assert all(jnp.abs(g).max() > 0 for g in reached)


def test_where_a_text_is_read():
    """At its first eos, though padding has the same id; by the first release's rule at its largest id."""
    ids = jnp.array([[5, 9, 7, 7], [7, 3, 8, 1]])
    np.testing.assert_array_equal(place_of_text(ids, 7), [2, 0])
    np.testing.assert_array_equal(place_of_text(ids, None), [1, 2])
    config = json.loads((GOLDENS / "clip" / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    assert spec_of_config(config) == replace(load("clip")[0].spec, eos=None)
    assert clip.to_hf(spec_of_config(config))["text_config"]["eos_token_id"] == 2


# --------------------------------------------------------------------------------------------- vision-language models


@every_qwen
def test_positions_and_features(name):
    model, golden = load(name)
    pixels = pixels_of(golden)
    found, delta = positions(model.spec, golden["input_ids"], golden["attention_mask"], pixels)
    np.testing.assert_array_equal(found, golden["position_ids"])
    np.testing.assert_array_equal(delta, golden["rope_deltas"])
    images = cut(model.spec.vision, *pixels.values())
    close(vectors(model.params, model.spec, images, Runtime()), golden["image_features"], 1e-5)


@every_seeing
def test_logits(name):
    model, golden = load(name)
    mask = golden["attention_mask"]
    got = jaxllm.logits(model.spec, model.params, golden["input_ids"], mask, **pixels_of(golden))
    close(got[mask == 1], golden["logits"][mask == 1])


@every_qwen
def test_left_padding_and_text_alone(name):
    model, golden = load(name)
    own = "gen_leftpad."
    mask = golden[own + "attention_mask"]
    got = jaxllm.logits(model.spec, model.params, golden[own + "input_ids"], mask, **pixels_of(golden))
    close(got[mask == 1], golden[own + "logits"][mask == 1])
    text = golden["text_only.input_ids"]
    close(jaxllm.logits(model.spec, model.params, text), golden["text_only.logits"])


@every_seeing
def test_greedy_with_the_cache(name):
    """Prompts of different lengths where the golden has them."""
    model, golden = load(name)
    own = "gen_leftpad." if "gen_leftpad.input_ids" in golden.files else ""
    rows = zip(golden[own + "input_ids"], golden[own + "attention_mask"], strict=True)
    prompts = [ids[mask == 1].tolist() for ids, mask in rows]
    wanted = golden[f"{own or 'gen.'}greedy"]
    out = jaxllm.generate(model.spec, model.params, prompts, max_new_tokens=wanted.shape[1], **pixels_of(golden))
    np.testing.assert_array_equal(out.ids(), wanted)


@every_qwen
def test_videos(name):
    """Several frames in time, an image behind one; Qwen2.5-VL's temporal positions follow the seconds."""
    model, video = load(name)[0], np.load(GOLDENS / name / "video.npz")
    wave = [np.sin(np.arange(n * 96) * 0.37).astype(np.float32).reshape(n, 96) for n in (16, 160)]
    pixels = {"pixel_values": wave[0], "pixel_values_videos": wave[1]}
    pixels |= {k: video[k] for k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if k in video.files}
    ids, mask = video["input_ids"], video["attention_mask"]
    found, delta = positions(model.spec, ids, mask, pixels)
    np.testing.assert_array_equal(found, video["position_ids"])
    np.testing.assert_array_equal(delta, video["rope_deltas"])
    got = jaxllm.logits(model.spec, model.params, ids, mask, **pixels)[:, ::5]
    real = mask[:, ::5] == 1
    close(got[real], video["logits"][real])


def test_images_do_not_see_each_other():
    """Features of two images in one call are those of each alone."""
    model, golden = load("qwen2_5_vl")
    tower, pixels, grid = model.spec.vision, golden["pixel_values"], golden["image_grid_thw"]
    first = int(grid[0].prod())
    alone = [cut(tower, pixels[:first], grid[:1]), cut(tower, pixels[first:], grid[1:])]
    both = vectors(model.params, model.spec, cut(tower, pixels, grid), Runtime())
    close(both, np.concatenate([vectors(model.params, model.spec, one, Runtime()) for one in alone]), 1e-5)


def test_gradient_of_every_part():
    model, golden = load("qwen2_5_vl")

    def loss(params):
        images = cut(model.spec.vision, *pixels_of(golden).values())
        return jnp.square(image_vectors(params, model.spec, images, Runtime())).mean()

    grad = jax.jit(jax.grad(loss))(model.params)
    flat = jax.tree_util.tree_flatten_with_path({k: grad[k] for k in ("vision", "adapter")})[0]
    zero = [str(path) for path, g in flat if jnp.abs(g).max() == 0]
    assert zero == [], "every weight of the tower and the adapter reaches the features"


# ---------------------------------------------------------------------------------------------------------- Qwen-VL

TINY = {
    "model_type": "qwen",
    "vocab_size": 80,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 64,
    "intermediate_size": 96,
    "seq_length": 32,
    "layer_norm_epsilon": 1e-6,
    "visual": {
        "image_size": 72,
        "patch_size": 4,
        "width": 24,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 1.7,
        "output_dim": 128,
        "n_queries": 9,
        "image_start_id": 70,
    },
}


def test_qwen_vl_is_what_was_published(tmp_path):
    """Names and math against numpy: table of 16 x 16 resized to 18 x 18, keys' sinusoids resized from 3 x 3."""
    spec = spec_of_config(TINY)
    rng = np.random.default_rng(3)

    def noise(path, p):
        return jnp.asarray(rng.normal(path_name(path).endswith("scale"), 0.15, p.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(noise, model_params(spec), is_leaf=is_param)
    save_folder(tmp_path / "out", spec, params)
    folder = open_folder(tmp_path / "out")
    ids = np.array([5, 9, 70, *[72] * 9, 71, 11, 60, 3])
    pixels = np.random.default_rng(0).normal(size=(3, 72, 72)).astype(np.float32)
    wanted = written_out({name: folder.read(name) for name in folder.shapes}, ids, pixels, TINY)
    back, loaded, _ = load_folder(tmp_path / "out")
    assert back == spec
    close(jaxllm.logits(back, loaded, ids[None], pixel_values=pixels[None])[0], wanted)
    with pytest.raises(ValueError, match="33 tokens, the model a context of 32"):
        jaxllm.logits(back, loaded, np.ones((1, 33), int))


def test_bicubic_weights():
    """They sum to one, mirror each other, and keep a table of the same size."""
    np.testing.assert_allclose(bicubic(16, 32).sum(1), 1)
    np.testing.assert_allclose(bicubic(16, 24), bicubic(16, 24)[::-1, ::-1], atol=1e-12)
    np.testing.assert_allclose(bicubic(5, 5), np.eye(5), atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- configs


def changed(config, path, value):
    *parts, last = path.split(".")
    for part in parts:
        config = config[part]
    config[last] = value


CHANGES = [
    ("clip", "text_config.hidden_act", "gelu", lambda s: s.text.stacks[0].pattern[0].ffn.act == "gelu"),
    ("clip", "vision_config.layer_norm_eps", 1e-6, lambda s: s.vision.norm.eps == 1e-6),
    ("clip", "logit_scale_init_value", 1.5, lambda s: s.log_scale == 1.5),
    ("clip", "text_config_dict", {"vocab_size": 99}, lambda s: s.vocab == 99 and s.text.dim == 512),
    ("qwen2_vl", "text_config.rope_parameters.rope_theta", 5e5, lambda s: rope(s).theta == 5e5),
    ("qwen2_vl", "text_config.rope_parameters.mrope_section", [4, 2, 2], lambda s: rope(s).sections == (4, 2, 2)),
    ("qwen2_vl", "text_config.tie_word_embeddings", True, lambda s: s.text.tied),
    ("qwen2_vl", "vision_config.mlp_ratio", 4, lambda s: s.vision.stacks[0].pattern[0].ffn.hidden == 128),
    ("qwen2_vl", "vision_config.rope_parameters.rope_theta", 9.0, lambda s: tower_rope(s).theta == 9.0),
    ("qwen2_5_vl", "vision_config.tokens_per_second", 25, lambda s: s.tokens_per_second == 25),
    ("qwen2_5_vl", "vision_config.window_size", 24, lambda s: s.vision.window == 3),
    ("qwen2_5_vl", "vision_config.fullatt_block_indexes", [0, 2], lambda s: windowed(s) == [False, True, False]),
    ("qwen2_5_vl", "image_token_id", 77, lambda s: s.image_token == 77),
    ("llava", "vision_feature_layer", -1, lambda s: s.vision.features == (1,) and len(s.vision.stacks) == 1),
    ("llava", "vision_feature_layer", [0, 3], lambda s: s.vision.features == (0, 1)),
    ("llava", "vision_feature_select_strategy", "full", lambda s: s.vision.keep_class),
    ("llava", "projector_hidden_act", "gelu_pytorch_tanh", lambda s: s.adapter.act == "gelu_tanh"),
    ("llava", "tie_word_embeddings", True, lambda s: s.text.tied),
    ("blip2", "qformer_config.cross_attention_frequency", 1, lambda s: len(s.adapter.stacks) == 1),
    ("blip2", "vision_config.qkv_bias", False, lambda s: not s.vision.stacks[0].pattern[0].attn.qkv_bias),
    ("blip2", "num_query_tokens", 7, lambda s: s.adapter.queries == 7),
]


def rope(spec):
    return spec.text.stacks[0].pattern[0].attn.position


def tower_rope(spec):
    return spec.vision.stacks[0].pattern[0].attn.position


def windowed(spec):
    return [b.attn.windowed for s in spec.vision.stacks for _ in range(s.repeats) for b in s.pattern]


def config_with(name, path, value):
    config = config_of(name)
    changed(config, path, value)
    return config


@pytest.mark.parametrize(("name", "path", "value", "holds"), CHANGES, ids=[f"{c[0]}-{c[1]}" for c in CHANGES])
def test_fields_that_change_the_math(name, path, value, holds):
    spec = spec_of_config(config_with(name, path, value))
    assert holds(spec)
    assert spec != load(name)[0].spec
    assert spec_of_config(family_of_spec(spec)[1]) == spec


REFUSED = [
    ("clip", "text_config.surprise", 1, "surprise"),
    ("clip", "vision_config.image_size", 33, "image_size"),
    ("clip", "vision_config.patch_size", [8, 8], "patch_size"),
    ("clip", "text_config.eos_token_id", [2, 3], "eos_token_id"),
    ("clip", "vision_config.num_attention_heads", 5, "hidden_size"),
    ("qwen2_vl", "text_config.rope_parameters.mrope_section", [2, 2, 2], "mrope_section"),
    ("qwen2_vl", "text_config.head_dim", 8, "head_dim"),
    ("qwen2_vl", "vision_config.hidden_size", 32, "hidden_size"),
    ("qwen2_vl", "vision_config.rope_parameters.rope_type", "default", "rope_parameters"),
    ("qwen2_vl", "vision_config.window_size", 8, "window_size"),
    ("qwen2_vl", "num_attention_heads", 8, "num_attention_heads"),
    ("qwen2_5_vl", "vision_config.window_size", 7, "window_size"),
    ("qwen2_5_vl", "vision_config.hidden_act", "mish", "hidden_act"),
    ("llava", "vision_feature_layer", 4, "vision_feature_layer"),
    ("llava", "vision_feature_select_strategy", "mean", "vision_feature_select_strategy"),
    ("llava", "text_config.model_type", "gpt2", "model_type"),
    ("llava", "vision_config.model_type", "siglip_vision_model", "model_type"),
    ("blip2", "image_token_index", None, "image_token_index"),
    ("blip2", "qformer_config.use_qformer_text_input", True, "use_qformer_text_input"),
    ("blip2", "use_decoder_only_language_model", False, "use_decoder_only_language_model"),
]


@pytest.mark.parametrize(("name", "path", "value", "named"), REFUSED, ids=[f"{c[0]}-{c[1]}" for c in REFUSED])
def test_fields_that_are_refused_by_name(name, path, value, named):
    with pytest.raises(ValueError, match=named):
        spec_of_config(config_with(name, path, value))


def test_a_foreign_spec_is_refused():
    text = load("llava")[0].spec.text
    for family in (clip, qwen2_vl, qwen2_5_vl, llava, blip2, qwen_vl):
        for spec in (text, load("clip")[0].spec, load("blip2")[0].spec, load("qwen2_vl")[0].spec):
            if not isinstance(spec, family.SPEC) or spec.name != family.MODEL_TYPE:
                with pytest.raises(ValueError, match="family"):
                    family.to_hf(spec)
    for family in FAMILIES.values():
        if family.SPEC is Transformer:
            with pytest.raises(ValueError, match=r"TwoTower|cannot express"):
                family.to_hf(load("clip")[0].spec)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_newer_files_name_their_tensors_otherwise(name, tmp_path):
    """transformers 5 may write its own module names; they are read all the same."""
    model = load(name)[0]
    family = FAMILIES[model.spec.name]
    source = open_folder(GOLDENS / name)
    back = [(ours, theirs) for theirs, ours in reversed(family.RENAMED)]

    def newer(tensor):
        for ours, theirs in back:
            tensor = theirs + tensor.removeprefix(ours) if tensor.startswith(ours) else tensor
        return tensor

    from safetensors.numpy import save_file

    renamed = {newer(tensor): source.read(tensor) for tensor in source.shapes}
    assert renamed.keys() != source.shapes.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDENS / name / "config.json").read_text())
    params = load_folder(tmp_path)[1]
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(model.params)))


# --------------------------------------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_refused():
    model, golden = load("qwen2_vl")
    spec, params, ids, pixels = model.spec, model.params, golden["input_ids"], pixels_of(golden)
    cases = [
        ({"pixel_values": pixels["pixel_values"]}, "image_grid_thw must be"),
        ({"image_grid_thw": pixels["image_grid_thw"]}, "without pixel_values"),
        (pixels | {"pixel_values": pixels["pixel_values"][:-4]}, "pixel_values must be"),
        (pixels | {"image_grid_thw": np.array([[1, 3, 6]])}, "multiples of 2"),
        (pixels | {"mm_token_type_ids": np.zeros_like(ids)}, "mm_token_type_ids"),
        ({}, "more runs of token 253 than there are grids"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            jaxllm.logits(spec, params, ids, **given)
    fewer = np.where(np.cumsum(ids == 253, 1) == 1, 5, ids)
    with pytest.raises(ValueError, match="image tokens"):
        jaxllm.logits(spec, params, fewer, **pixels)
    with pytest.raises(ValueError, match="does not see"):
        jaxllm.logits(*text_only("llama_gqa"), ids[:, :4], **pixels)
    with pytest.raises(ValueError, match="does not see"):
        jaxllm.generate(*text_only("llama_gqa"), [[1, 2]], max_new_tokens=4, **pixels)
    two = load("clip")[0]
    assert isinstance(two.spec, TwoTower)
    with pytest.raises(ValueError, match="similarity"):
        jaxllm.logits(two.spec, two.params, ids[:, :4])
    with pytest.raises(ValueError, match="pixel_values must be"):
        jaxllm.similarity(two.spec, two.params, ids[:, :4], pixel_values=np.zeros((1, 3, 16, 16), np.float32))


def text_only(name):
    model = jaxllm.load(GOLDENS / name)
    return model.spec, model.params
