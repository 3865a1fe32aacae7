"""Two towers: texts and images as unit vectors of one space (CLIP, Radford et al. 2021, figure 3)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxllm.config import TwoTower
from jaxllm.nn.ffn import linear, linear_params
from jaxllm.nn.norm import norm
from jaxllm.nn.patch import Patched
from jaxllm.params import Constant, Param, ParamTree
from jaxllm.records import Inputs
from jaxllm.runtime import Runtime
from jaxllm.sharding import use
from jaxllm.transformer import forward, transformer_params
from jaxllm.vision import vision_layers, vision_params


@struct.dataclass
class Similarity:
    """What `compare` gives, float32; n texts, N images.

    logits_per_image [N, n]: exp(log scale) * cosine; logits_per_text [n, N], its transpose.
    text_embeds [n, D], image_embeds [N, D]: unit vectors.
    text_hidden [n, T, D'] after the last norm; vision_hidden [N, P, D''] before it.
    """

    logits_per_image: Float[Array, "N n"]
    logits_per_text: Float[Array, "n N"]
    text_embeds: Float[Array, "n D"]
    image_embeds: Float[Array, "N D"]
    text_hidden: Float[Array, "n T E"]
    vision_hidden: Float[Array, "N P F"]


def two_tower_params(spec: TwoTower) -> ParamTree:
    """text/..., vision/..., text_projection and image_projection [D, dim], log_scale []."""
    towers = {"text": transformer_params(spec.text), "vision": vision_params(spec.vision)}
    return towers | _joint_params(spec)


def _joint_params(spec: TwoTower) -> ParamTree:
    return {
        "text_projection": linear_params({"embed": spec.text.dim}, {"out": spec.dim}, False),
        "image_projection": linear_params({"embed": spec.vision.dim}, {"out": spec.dim}, False),
        "log_scale": Param((), (), Constant(spec.log_scale)),
    }


def text_features(
    params: Any, spec: TwoTower, inputs: Inputs, runtime: Runtime, key: Array | None = None
) -> tuple[Float[Array, "n D"], Float[Array, "n T E"]]:
    """Projected vectors of the texts, and all hidden states. A text without `spec.eos` is read at its first token."""
    assert inputs.tokens_BT is not None, "text_features: texts are read at a token id, so they need tokens_BT"
    hidden = forward(params["text"], spec.text, inputs, runtime, key=key).hidden_BTD
    at_B = place_of_text(inputs.tokens_BT, spec.eos)
    pooled = jnp.take_along_axis(hidden, at_B[:, None, None], 1)[:, 0]
    return linear(_joint(params, spec, runtime)["text_projection"], pooled, "BE,ED->BD"), hidden


def place_of_text(tokens_BT: Int[Array, "B T"], eos: int | None) -> Int[Array, " B"]:
    """Slot of the first `eos` of each row; of the largest id when it is None."""
    return jnp.argmax(tokens_BT if eos is None else tokens_BT == eos, 1)


def image_features(
    params: Any, spec: TwoTower, images: Patched, runtime: Runtime, key: Array | None = None
) -> tuple[Float[Array, "N D"], Float[Array, "N P F"]]:
    """Projected vectors of the images, and the last layer's hidden states, which no norm has seen."""
    hidden = vision_layers(params["vision"], spec.vision, images, runtime, key)[-1]
    pooled = hidden[:, 0]
    pooled = pooled if spec.vision.norm is None else norm(params["vision"]["norm"], spec.vision.norm, pooled)
    return linear(_joint(params, spec, runtime)["image_projection"], pooled, "BE,ED->BD"), hidden


def _joint(params: Any, spec: TwoTower, runtime: Runtime) -> Any:
    declared = _joint_params(spec)
    return use(declared, {name: params[name] for name in declared}, runtime.layout, runtime.compute_dtype)


def compare(
    params: Any, spec: TwoTower, inputs: Inputs, images: Patched, runtime: Runtime, key: Array | None = None
) -> Similarity:
    """Every text with every image."""
    text, text_hidden = text_features(params, spec, inputs, runtime, key)
    image, vision_hidden = image_features(params, spec, images, runtime, key)
    text, image = unit(text), unit(image)
    logits = jnp.exp(params["log_scale"].astype(jnp.float32)) * (image @ text.T)
    return Similarity(logits, logits.T, text, image, text_hidden, vision_hidden)


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x divided by its Euclidean norm, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
