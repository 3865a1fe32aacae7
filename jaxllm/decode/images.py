"""Prompts with images in them: what stands in the tokens' places, and how positions run on behind."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import VisionLanguage
from jaxllm.records import Params
from jaxllm.runtime import Runtime
from jaxllm.vision_language import Media, Pixels, embed_media, positions, prepare


class Seen(NamedTuple):
    """The fields of a `Feed` that images decide; see there."""

    embeds_BTD: Float[Array, "B T D"]
    position_ABT: Int[Array, "A B T"] | None
    shift_B: Any


def see(spec: VisionLanguage, params: Params, runtime: Runtime, tokens_BT: Any, count_B: Any, pixels: Pixels) -> Seen:
    """The first count_B[b] of each row of tokens with their images. Raises ValueError when these do not fit."""
    real_BT = np.arange(tokens_BT.shape[1])[None] < np.asarray(count_B)[:, None]
    given, media = prepare(spec, tokens_BT, real_BT, pixels)
    embeds_BTD = _embed(spec, runtime, params, given.tokens_BT, media)
    if not spec.mrope:
        return Seen(embeds_BTD, None, None)
    _, delta = positions(spec, tokens_BT, real_BT, pixels)
    return Seen(embeds_BTD, given.position_BT, delta[:, 0].astype(np.int32))


@partial(jax.jit, static_argnums=(0, 1))
def _embed(
    spec: VisionLanguage, runtime: Runtime, params: Params, tokens_BT: Int[Array, "B T"], media: Media
) -> Float[Array, "B T D"]:
    return embed_media(params, spec, tokens_BT, media, runtime)
