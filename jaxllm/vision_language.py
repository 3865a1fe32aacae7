"""Vision-language models: a text model whose image tokens are replaced by adapted features of images.

What depends on the sizes of images (how many features, where each token stands) is worked out on the host by `prepare`;
the forward itself sees arrays only. Videos are images with more frames, and a token id of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, TypedDict, assert_never

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import Caches
from jaxllm.config import Merger, Projector, QFormer, Resampler, VisionLanguage
from jaxllm.nn.embedding import token_vectors
from jaxllm.nn.patch import Patched, cut, grid_array
from jaxllm.params import ParamTree
from jaxllm.records import Inputs, Output, inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward as text_forward
from jaxllm.transformer import transformer_params
from jaxllm.vision import adapt, adapter_params, vision, vision_params


class Pixels(TypedDict, total=False):
    """Images and videos as the reference's processors give them; see `jaxllm.nn.patch.cut` for their shapes.

    second_per_grid_ts: float [videos], the seconds between two steps of frames (Qwen2.5-VL); 1 each when left out.
    mm_token_type_ids: int [B, T], 1 at image tokens, 2 at video tokens; not needed, and checked.
    """

    pixel_values: ArrayLike | None
    image_grid_thw: ArrayLike | None
    pixel_values_videos: ArrayLike | None
    video_grid_thw: ArrayLike | None
    second_per_grid_ts: ArrayLike | None
    mm_token_type_ids: ArrayLike | None


@struct.dataclass
class Media:
    """The images and videos of a batch, cut into patches; None: none."""

    images: Patched | None = None
    videos: Patched | None = None


def vision_language_params(spec: VisionLanguage) -> ParamTree:
    """text/..., vision/..., adapter/..."""
    return {
        "text": transformer_params(spec.text),
        "vision": vision_params(spec.vision),
        "adapter": adapter_params(spec.adapter, spec.vision, spec.text.dim),
    }


# ----------------------------------------------------------------------------------------------------------- forward


def image_vectors(params: Any, spec: VisionLanguage, images: Patched, runtime: Runtime) -> Float[Array, "F D"]:
    """The vectors that take the places of the images' tokens, in order, of all images after one another."""
    features = vision(params["vision"], spec.vision, images, runtime)
    vectors = adapt(params["adapter"], spec.adapter, spec.vision, spec.text.dim, features, runtime)
    flat = vectors.reshape(-1, vectors.shape[-1])
    return flat if images.order_U is None else flat[images.order_U]


def embed_media(
    params: Any, spec: VisionLanguage, tokens_BT: Int[Array, "B T"], media: Media, runtime: Runtime
) -> Float[Array, "B T D"]:
    """Token vectors, with those of image and video tokens replaced; positions are not in it yet."""
    ids, x = tokens_BT, None
    found = ((spec.image_token, media.images), (spec.video_token, media.videos))
    for token, images in found:
        if images is not None:
            ids = jnp.where(ids == token, 0, ids)  # such ids need not be in the vocabulary
    x = token_vectors(params["text"], spec.text, ids, runtime)
    for token, images in found:
        if images is not None:
            x = splice(x, tokens_BT == token, image_vectors(params, spec, images, runtime))
    return x


def splice(
    x_BTD: Float[Array, "B T D"], here_BT: Bool[Array, "B T"], vector_FD: Float[Array, "F D"]
) -> Float[Array, "B T D"]:
    """x with its n-th place of `here` (in order of rows) replaced by the n-th vector."""
    nth = jnp.cumsum(here_BT.reshape(-1)).reshape(here_BT.shape) - 1
    return jnp.where(here_BT[..., None], vector_FD.astype(x_BTD.dtype)[nth], x_BTD)


def forward(
    params: Any,
    spec: VisionLanguage,
    inputs: Inputs,
    media: Media,
    runtime: Runtime,
    caches: Caches | None = None,
    key: Array | None = None,
) -> Output:
    """The text model's forward over tokens and features. `inputs.position_BT` is [3, B, T] for M-RoPE (`positions`)."""
    assert inputs.tokens_BT is not None, "forward: image tokens are found by id, so inputs need tokens_BT"
    x = embed_media(params, spec, inputs.tokens_BT, media, runtime)
    embedded = replace(inputs, tokens_BT=None, embeds_BTD=x)
    return text_forward(params["text"], spec.text, embedded, runtime, caches, key)


# --------------------------------------------------------------------------------------------------------- positions


def prepare(
    spec: VisionLanguage, input_ids: ArrayLike, attention_mask: ArrayLike | None, pixels: Pixels
) -> tuple[Inputs, Media]:
    """Inputs of a batch [B, T] padded on either side, and its images. All on the host but for the pixels themselves.

    Raises ValueError when image tokens and features are not as many, or shapes do not fit.
    """
    ids = np.asarray(input_ids)
    mask = None if attention_mask is None else np.asarray(attention_mask) > 0
    images = _patched(spec, pixels, "pixel_values", "image_grid_thw")
    videos = _patched(spec, pixels, "pixel_values_videos", "video_grid_thw")
    for token, patched, name in ((spec.image_token, images, "image"), (spec.video_token, videos, "video")):
        _check_count(spec, ids, token, patched, name)
    kinds, stated = (ids == spec.image_token) + 2 * (ids == spec.video_token), pixels.get("mm_token_type_ids")
    if stated is not None and not np.array_equal(np.asarray(stated), kinds):
        raise ValueError("mm_token_type_ids differ from where input_ids has images (1) and videos (2); leave it out")
    plain = inputs(jnp.asarray(ids, jnp.int32), None if mask is None else jnp.asarray(mask, jnp.int32))
    if not spec.mrope:
        return plain, Media(images, videos)
    position, _ = positions(spec, ids, mask, pixels)
    return replace(plain, position_BT=jnp.asarray(position, jnp.int32)), Media(images, videos)


def _patched(spec: VisionLanguage, pixels: Pixels, values: str, grid: str) -> Patched | None:
    given: dict[str, Any] = dict(pixels)
    if given.get(values) is None:
        if given.get(grid) is not None:
            raise ValueError(f"{grid} is given without {values}; give both")
        return None
    if spec.vision.side is not None and given.get(grid) is not None:
        raise ValueError(f"{grid}: images of this model are all of one size; leave it out")
    return cut(spec.vision, given[values], given.get(grid))


def vectors_of(spec: VisionLanguage, images: Patched) -> int:
    """How many vectors the adapter makes of these images."""
    n, places = images.pixels_BPX.shape[:2]
    match spec.adapter:
        case Projector():
            return n * (places + (spec.vision.class_token and spec.vision.keep_class))
        case Merger():
            return n * places // spec.vision.merge**2
        case QFormer(queries=queries):
            return n * queries
        case Resampler(side=side):
            return n * side * side
        case other:
            assert_never(other)


def _check_count(spec: VisionLanguage, ids: np.ndarray, token: int | None, images: Patched | None, name: str) -> None:
    if images is None:
        return
    if token is None:
        raise ValueError(f"{name}s: this model has no {name} token, so it cannot place them; leave them out")
    found, wanted = int((ids == token).sum()), vectors_of(spec, images)
    if found != wanted:
        raise ValueError(
            f"input_ids has {found} {name} tokens (id {token}), the {name}s make {wanted} vectors; repeat the token "
            "once per vector, as the model's processor does"
        )


def positions(
    spec: VisionLanguage, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, pixels: Pixels = Pixels()
) -> tuple[Int[np.ndarray, "3 B T"], Int[np.ndarray, "B 1"]]:
    """M-RoPE positions (time, row, column) of every token, 0 at padding, and each row's delta (Qwen2-VL, §2.1).

    Text counts on along all axes. The vectors of an image stand at (time, row, column) of their place in it, and what
    follows goes on behind its larger side. Time is counted in steps of frames; in videos it is steps * seconds per step
    * `tokens_per_second`, cut to whole numbers, as the reference implementation has it. delta: the next token's
    position less the number of tokens before it.
    """
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) > 0
    images, videos = _image_grids(pixels), _video_grids(spec, pixels)
    out, delta = np.zeros((3, *ids.shape), np.int64), np.zeros((len(ids), 1), np.int64)
    for b, (row, real) in enumerate(zip(ids, mask, strict=True)):
        place = _row_positions(spec, row[real], images, videos)
        out[:, b, real] = place
        delta[b] = place.max(initial=-1) + 1 - real.sum()
    return out, delta


Grid = tuple[Int[np.ndarray, " 3"], float]  # patches in time, height, width; temporal positions per step


def _image_grids(pixels: Pixels) -> Iterator[Grid]:
    grid = pixels.get("image_grid_thw")
    return iter([] if grid is None else [(one, 1.0) for one in grid_array(grid, "image_grid_thw")])


def _video_grids(spec: VisionLanguage, pixels: Pixels) -> Iterator[Grid]:
    grid, seconds = pixels.get("video_grid_thw"), pixels.get("second_per_grid_ts")
    if grid is None:
        return iter([])
    grids = grid_array(grid, "video_grid_thw")
    steps = np.ones(len(grids)) if seconds is None else np.asarray(seconds, np.float64).reshape(-1)
    if len(steps) != len(grids):
        raise ValueError(f"second_per_grid_ts has {len(steps)} values for {len(grids)} videos; give one each")
    rate = spec.tokens_per_second
    return iter([(g, 1.0 if rate is None else rate * s) for g, s in zip(grids, steps, strict=True)])


def _row_positions(
    spec: VisionLanguage, row: Int[np.ndarray, " T"], images: Iterator[Grid], videos: Iterator[Grid]
) -> Int[np.ndarray, "3 T"]:
    kinds = {spec.image_token: images, spec.video_token: videos}
    parts, at = [np.zeros((3, 0), np.int64)], 0
    for token, run in groupby(row.tolist(), lambda i: i if i in kinds else None):
        left = len(list(run))
        if token is None:
            parts.append(np.tile(np.arange(at, at + left), (3, 1)))
            at += left
            continue
        while left > 0:
            grid = next(kinds[token], None)
            if grid is None:
                raise ValueError(f"input_ids has more runs of token {token} than there are grids; give one per image")
            place = _grid_positions(grid, spec.vision.merge)
            parts.append(place + at)
            at += int(max(grid[0][1:])) // spec.vision.merge
            left -= place.shape[1]
    found = np.concatenate(parts, 1)
    if found.shape[1] != len(row):
        raise ValueError(
            f"input_ids: a run of image tokens is cut short; its grid makes {found.shape[1] - len(row)} more"
        )
    return found


def _grid_positions(grid: Grid, merge: int) -> Int[np.ndarray, "3 n"]:
    (t, h, w), step = grid
    place = np.indices((t, h // merge, w // merge)).reshape(3, -1)
    place[0] = (place[0].astype(np.float32) * np.float32(step)).astype(np.int64)
    return place
