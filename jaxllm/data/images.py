"""Images as the arrays that towers read: resized, cropped and normalised as the reference's processors do, in numpy.

    pixel_values = square_pixels([Image.open("cat.jpg")], side=224)                     # CLIP, LLaVA, BLIP-2
    pixel_values, image_grid_thw = patched_pixels([Image.open("cat.jpg")], Smart())     # Qwen2-VL, Qwen2.5-VL

Needs Pillow (the extra `images`). Sizes are in pixels, height before width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Smart:
    """How Qwen2-VL's processor sizes and cuts images; defaults are those of the published checkpoints.

    Height and width become multiples of patch * merge, their product is kept within `least` and `most` pixels.
    """

    patch: int = 14
    merge: int = 2
    frames: int = 2
    least: int = 56 * 56
    most: int = 28 * 28 * 1280


def square_pixels(
    images: Sequence[Image],
    side: int,
    *,
    stretch: bool = False,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Float[np.ndarray, "N 3 H W"]:
    """float32 [N, 3, side, side]: the shorter edge to `side` (bicubic), the centre cut out, normalised.

    stretch: both edges to `side` instead, nothing is cut (BLIP-2).
    """
    return np.stack([_normalised(_square(image, side, stretch), mean, std) for image in images])


def patched_pixels(
    images: Sequence[Image],
    how: Smart = Smart(),
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> tuple[Float[np.ndarray, "P X"], Int[np.ndarray, "N 3"]]:
    """(flat patches of all images after one another, patches of each in time, height and width).

    A still picture stands in all `frames` of its only step in time. Raises ValueError for one that is too oblong.
    """
    flat, grids = [], []
    for image in images:
        height, width = smart_size(image.height, image.width, how)
        pixels = _normalised(_array(_rgb(image), (height, width)), mean, std)
        patches, grid = cut_patches(np.broadcast_to(pixels[None], (how.frames, *pixels.shape)), how)
        flat.append(patches)
        grids.append(grid)
    return np.concatenate(flat), np.array(grids, np.int64)


def video_pixels(
    videos: Sequence[Float[np.ndarray, "F 3 H W"]], how: Smart = Smart()
) -> tuple[Float[np.ndarray, "P X"], Int[np.ndarray, "N 3"]]:
    """As `patched_pixels`, of normalised frames whose sizes fit already; the last frame fills up the last step."""
    cut = [cut_patches(np.concatenate([v, np.repeat(v[-1:], -len(v) % how.frames, 0)]), how) for v in videos]
    return np.concatenate([patches for patches, _ in cut]), np.array([grid for _, grid in cut], np.int64)


def smart_size(height: int, width: int, how: Smart = Smart()) -> tuple[int, int]:
    """The size that an image is given: multiples of patch * merge, nearly its shape, neither too large nor too small.

    Raises ValueError when one side is more than 200 times the other.
    """
    unit = how.patch * how.merge
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"image of {height} x {width}: sides may differ 200 times at most; crop it")
    sized = [round(n / unit) * unit for n in (height, width)]
    shrink, grow = math.sqrt(height * width / how.most), math.sqrt(how.least / (height * width))
    if math.prod(sized) > how.most:
        sized = [max(unit, math.floor(n / shrink / unit) * unit) for n in (height, width)]
    elif math.prod(sized) < how.least:
        sized = [math.ceil(n * grow / unit) * unit for n in (height, width)]
    return sized[0], sized[1]


def cut_patches(
    frames_FCHW: Float[np.ndarray, "F C H W"], how: Smart
) -> tuple[Float[np.ndarray, "P X"], tuple[int, int, int]]:
    """(flat patches, their number in time, height and width); blocks of merge x merge patches after one another."""
    F, C, H, W = frames_FCHW.shape
    if F % how.frames or H % (how.patch * how.merge) or W % (how.patch * how.merge):
        raise ValueError(f"{F} frames of {H} x {W} do not fit {how}; resize them (`smart_size`)")
    t, h, w, m, p = F // how.frames, H // how.patch, W // how.patch, how.merge, how.patch
    cells = frames_FCHW.reshape(t, how.frames, C, h // m, m, p, w // m, m, p)
    ordered = cells.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)  # step, block row and column, row and column in it, pixels
    return np.ascontiguousarray(ordered.reshape(t * h * w, C * how.frames * p * p)), (t, h, w)


# ------------------------------------------------------------------------------------------------------------ pixels


def _rgb(image: Image) -> Image:
    """Three channels; what is transparent is white."""
    from PIL import Image as pillow

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", seen.size, (255, 255, 255, 255)), seen).convert("RGB")


def _array(image: Image, size: tuple[int, int]) -> Any:
    """uint8 [height, width, 3] at this size, bicubic."""
    from PIL.Image import Resampling

    return np.asarray(image.resize((size[1], size[0]), Resampling.BICUBIC))


def _square(image: Image, side: int, stretch: bool) -> Any:
    image = _rgb(image)
    if stretch:
        return _array(image, (side, side))
    short = min(image.height, image.width)
    sized = _array(image, (int(side * image.height / short), int(side * image.width / short)))
    top, left = (sized.shape[0] - side) // 2, (sized.shape[1] - side) // 2
    return sized[top : top + side, left : left + side]


def _normalised(pixels: Any, mean: Sequence[float], std: Sequence[float]) -> Float[np.ndarray, "3 H W"]:
    """float32 [3, height, width]: bytes / 255, less `mean`, divided by `std`."""
    unit = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((unit - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).transpose(2, 0, 1)
