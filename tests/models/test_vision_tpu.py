"""One train step and one decoding program of models that see, through the real TPU compiler, at toy size.

CLIP's step is the contrastive one. The others' is the text's loss with respect to tower, adapter and text; windows,
2-D rotation, M-RoPE, Q-Former and resampler are all in it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import params as trees
from jaxllm import transformer, vision_language
from jaxllm.architectures import model_params
from jaxllm.decode import sample
from jaxllm.decode.rules import GREEDY
from jaxllm.models.families import spec_of_config
from jaxllm.nn.patch import cut
from jaxllm.objectives.contrastive import Pairs, contrastive_loss
from jaxllm.runtime import Runtime
from tests.tpu_aot import Job, compile_all

pytest.importorskip("libtpu")

RUNTIME = Runtime(compute_dtype="bfloat16", attention="tpu")
ROW = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 256}
TEXT = ROW | {"vocab_size": 512, "num_key_value_heads": 2}
TOWER = ROW | {"image_size": 64, "patch_size": 8}
QWEN = {"hidden_size": 256, "depth": 2, "num_heads": 2, "patch_size": 4}
MROPE = {"rope_parameters": {"mrope_section": [16, 24, 24]}}
CONFIGS = {
    "clip": {"model_type": "clip", "text_config": ROW, "vision_config": TOWER},
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "text_config": TEXT | MROPE,
        "vision_config": QWEN | {"embed_dim": 256, "mlp_ratio": 2},
        "image_token_id": 500,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": TEXT | MROPE,
        "vision_config": QWEN
        | {"out_hidden_size": 256, "intermediate_size": 256, "window_size": 16, "fullatt_block_indexes": [1]},
        "image_token_id": 500,
    },
    "llava": {
        "model_type": "llava",
        "text_config": TEXT,
        "vision_config": TOWER | {"model_type": "clip_vision_model"},
        "image_token_index": 500,
    },
    "blip2": {
        "model_type": "blip-2",
        "text_config": {k: v for k, v in ROW.items() if k != "intermediate_size"}
        | {"ffn_dim": 256, "vocab_size": 512, "word_embed_proj_dim": 256},
        "vision_config": TOWER,
        "qformer_config": ROW,
        "image_token_index": 500,
    },
    "qwen_vl": {
        "model_type": "qwen",
        "vocab_size": 600,
        "hidden_size": 256,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "visual": {"width": 128, "layers": 2, "heads": 2, "output_dim": 256, "patch_size": 8, "image_size": 64}
        | {"n_queries": 16, "image_start_id": 500},
    },
}


def spec_named(name):
    return spec_of_config(CONFIGS[name])


def pixels_of(name):
    if name.startswith("qwen2"):
        grid = np.array([[1, 16, 16], [1, 8, 16]])
        return {"pixel_values": np.zeros((384, 96), np.float32), "image_grid_thw": grid}
    return {"pixel_values": np.zeros((2, 3, 64, 64), np.float32)}


def pairs():
    spec = spec_named("clip")
    tokens = jnp.ones((2, 77), jnp.int32)
    return Pairs(tokens, tokens, cut(spec.vision, **pixels_of("clip")))


def contrastive_step(params, batch):
    return jax.grad(lambda p: contrastive_loss(p, spec_named("clip"), batch, RUNTIME)[0])(params)


def batch_of(name):
    """Two rows of 256 tokens that hold all vectors of the images."""
    spec, pixels = spec_named(name), pixels_of(name)
    images = cut(spec.vision, *pixels.values())
    ids = np.ones(512, np.int32)
    ids[10 : 10 + vision_language.vectors_of(spec, images)] = spec.image_token
    return vision_language.prepare(spec, ids.reshape(2, 256), None, pixels)


def step(name, params, given, media):
    """The gradient of next-token cross-entropy."""
    spec = spec_named(name)

    def loss(params):
        out = vision_language.forward(params, spec, given, media, RUNTIME)
        logits = transformer.logits(params["text"], spec.text, out.hidden_BTD, RUNTIME)
        return -jax.nn.log_softmax(logits)[..., 7].mean()

    return jax.grad(loss)(params)


def decode(params, *args):
    program = sample.Program(spec_named("qwen2_5_vl").text, RUNTIME, GREEDY, (1,), 512)
    return sample._generate(program, params, *args)


def decode_args(spec):
    """A prompt with an image in it, given as vectors and positions on three axes."""
    program = sample.Program(spec.text, RUNTIME, GREEDY, (1,), 512)
    feed, *rest = sample._start(program, [[1] * 200] * 2, 256, 0, 100)
    embeds, position = np.zeros((2, 256, 256), np.float32), np.zeros((3, 2, 256), np.int32)
    feed = feed.replace(embeds_BTD=embeds, position_ABT=position, shift_B=np.zeros(2, np.int32))
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, (feed, *rest)))


def abstract(spec):
    return trees.abstract(model_params(spec), jnp.float32)


@pytest.mark.slow
def test_steps_and_decoding_compile_for_a_tpu():
    names = [name for name in CONFIGS if name != "clip"]
    jobs = [Job(contrastive_step, (abstract(spec_named("clip")), jax.eval_shape(pairs)), "v5e:2x2")]
    for name in names:
        batch = jax.eval_shape(partial(batch_of, name))
        jobs.append(Job(partial(step, name), (abstract(spec_named(name)), *batch), "v5e:2x2"))
    qwen = spec_named("qwen2_5_vl")
    jobs.append(Job(decode, (abstract(qwen)["text"], *decode_args(qwen)), "v5e:2x2"))
    for name, report in zip(["clip", *names, "decode"], compile_all(jobs), strict=True):
        assert report.error is None, f"{name}: {report.error}"
        assert "tpu_custom_call" in report.text, f"{name} does not use the attention kernel"
