"""Images as rows of patches: how they are cut, where each patch stands, and its vector.

Unusual: a convolution whose stride is its kernel is one matrix product of flat patches, so that images of one size
[N, C, height, width] and images of any size (already cut by the processor, as Qwen2-VL's) are the same thing here.
What depends on the images' sizes (places, frames, windows) is worked out on the host, in numpy.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxllm.config import Vision
from jaxllm.nn.ffn import linear, linear_params
from jaxllm.params import Normal, Param, ParamTree


@struct.dataclass
class Patched:
    """Images cut into patches; P of them in each of B rows.

    pixels_BPX: float, X = channels * frames * size**2.
    place_2BP: int32, row and column of each patch in its image.
    segment_BP: int32, the frame that a patch is of, from 1; None: one image per row.
    window_BP: int32, the window that it is in, from 1; None: there are none.
    order_U: where block u (merge x merge patches) of the images has gone, since patches are sorted by window; None:
        nowhere.
    """

    pixels_BPX: Float[Array, "B P X"]
    place_2BP: Int[Array, "2 B P"]
    segment_BP: Int[Array, "B P"] | None = None
    window_BP: Int[Array, "B P"] | None = None
    order_U: Int[Array, " U"] | None = None


def cut(cfg: Vision, pixel_values: ArrayLike, grid_thw: ArrayLike | None = None) -> Patched:
    """Pixels as the reference's processors give them, as patches.

    Images of one size: pixel_values float [N, channels, height, width].  Of any size: flat patches [P, X] of all images
    after one another, and grid_thw int [n, 3], the number of patches of each in time, height and width.
    Raises ValueError when shapes do not fit the tower or each other.
    """
    return _squares(cfg, pixel_values) if cfg.side is not None else _grids(cfg, pixel_values, grid_thw)


def _squares(cfg: Vision, pixel_values: ArrayLike) -> Patched:
    pixels, side, size = jnp.asarray(pixel_values), cfg.side or 0, cfg.patches.size
    wanted = (cfg.patches.channels, side * size, side * size)
    if pixels.ndim != 4 or pixels.shape[1:] != wanted:
        raise ValueError(f"pixel_values must be [N, {', '.join(map(str, wanted))}], found {list(pixels.shape)}; resize")
    N, C = pixels.shape[:2]
    cells = pixels.reshape(N, C, side, size, side, size).transpose(0, 2, 4, 1, 3, 5)
    place = np.indices((side, side)).reshape(2, 1, -1)
    return Patched(
        cells.reshape(N, side * side, -1), jnp.asarray(np.broadcast_to(place, (2, N, side * side)), jnp.int32)
    )


def _grids(cfg: Vision, pixel_values: ArrayLike, grid_thw: ArrayLike | None) -> Patched:
    pixels, m = jnp.asarray(pixel_values), cfg.merge
    grids = grid_array(grid_thw, "image_grid_thw")
    if (grids[:, 1:] % m).any():
        raise ValueError(f"image_grid_thw: height and width must be multiples of {m}, found {grids.tolist()}; resize")
    if pixels.shape != (grids.prod(1).sum(), cfg.patches.width):
        raise ValueError(
            f"pixel_values must be [{grids.prod(1).sum()}, {cfg.patches.width}] for image_grid_thw {grids.tolist()} "
            f"and {cfg.patches}, found {list(pixels.shape)}; use the processor of this model"
        )
    place_2P = np.concatenate([_places(grid, m) for grid in grids], 1)
    frames = np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0])
    segment_P = np.repeat(np.arange(1, len(frames) + 1), frames)
    if cfg.window is None:
        return Patched(pixels[None], _row(place_2P), _row(segment_P))
    window_U = _windows(grids, m, cfg.window)
    sorted_U = np.argsort(window_U, kind="stable")
    patch_P = (sorted_U[:, None] * m * m + np.arange(m * m)[None]).reshape(-1)
    return Patched(
        pixels[None, patch_P],
        _row(place_2P[:, patch_P]),
        _row(segment_P[patch_P]),
        _row(np.repeat(window_U[sorted_U], m * m)),
        jnp.asarray(np.argsort(sorted_U), jnp.int32),
    )


def grid_array(grid_thw: ArrayLike | None, name: str) -> Int[np.ndarray, "n 3"]:
    """The grids of some images. Raises ValueError when they are missing or not [n, 3]."""
    grids = None if grid_thw is None else np.asarray(grid_thw)
    if grids is None or grids.ndim != 2 or grids.shape[1] != 3:
        found = None if grids is None else list(grids.shape)
        raise ValueError(f"{name} must be [images, 3] (patches in time, height, width), found {found}; give it")
    return grids.astype(np.int64)


def _row(x: np.ndarray) -> Int[Array, "*axes B P"]:
    """Of all patches [..., P], as the only row of a batch."""
    return jnp.asarray(x[..., None, :], jnp.int32)


def _places(grid: Int[np.ndarray, " 3"], m: int) -> Int[np.ndarray, "2 P"]:
    """Row and column of every patch of an image, block of m x m patches after block, for each of its frames."""
    t, h, w = grid
    blocks = np.indices((h, w)).reshape(2, h // m, m, w // m, m).swapaxes(2, 3)
    return np.tile(blocks.reshape(2, -1), t)


def _windows(grids: Int[np.ndarray, "n 3"], m: int, side: int) -> Int[np.ndarray, " U"]:
    """The window of every block of m x m patches, from 1: side x side blocks of one frame, less at the far edges."""
    out, first = [], 1
    for t, h, w in grids // np.array([1, m, m]):
        across = -(-w // side)
        row, column = np.indices((h, w)).reshape(2, -1) // side
        per_frame = -(-h // side) * across
        frame = np.arange(t)[:, None] * per_frame
        out.append((first + frame + (row * across + column)[None]).reshape(-1))
        first += t * per_frame
    return np.concatenate(out)


# ---------------------------------------------------------------------------------------------------------- vectors


def patch_params(cfg: Vision) -> ParamTree:
    """map/kernel [X, D], map/bias [D]; positions [places, D] of one-size images; class [D]."""
    tree: ParamTree = {"map": linear_params({"pixels": cfg.patches.width}, {"embed": cfg.dim}, cfg.patches.bias)}
    if cfg.side is not None:
        rows = (cfg.table or cfg.side) ** 2 + cfg.class_token
        tree["positions"] = Param((rows, cfg.dim), ("positions", "embed"), Normal(0.02))
    if cfg.class_token:
        tree["class"] = Param((cfg.dim,), ("embed",), Normal(cfg.dim**-0.5))
    return tree


def patch_embed(p: Any, cfg: Vision, images: Patched) -> Float[Array, "B P D"]:
    """A vector per patch, after the class token's if there is one, plus what is learned about its place."""
    x = linear(p["map"], images.pixels_BPX.astype(p["map"]["kernel"].dtype), "BPX,XD->BPD")
    if cfg.class_token:
        x = jnp.concatenate([jnp.broadcast_to(p["class"], (len(x), 1, cfg.dim)).astype(x.dtype), x], 1)
    if cfg.side is None:
        return x
    table = p["positions"].astype(x.dtype)
    if cfg.table is not None:
        table = resized(table, cfg.table, cfg.side)
    return x + table[None]


def resized(table_PD: Float[Array, "P D"], old: int, new: int) -> Float[Array, "p D"]:
    """A square table of vectors at another size, bicubic (Keys 1981 with a = -0.75, centres of cells aligned)."""
    weight = jnp.asarray(bicubic(old, new), table_PD.dtype)
    square = table_PD.reshape(old, old, -1)
    return jnp.einsum("io,jp,opD->ijD", weight, weight, square).reshape(new * new, -1)


def bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of `old` samples in each of `new` ones; past the ends the end's sample counts."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    low, a = np.floor(at), -0.75
    out = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        d = np.abs(at - low - offset)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        tap = np.clip(low + offset, 0, old - 1).astype(int)
        np.add.at(out, (np.arange(new), tap), np.where(d <= 1, near, far))
    return out


def sinusoid_2d(side: int, dim: int) -> Float[np.ndarray, "P D"]:
    """sin and cos of the column in the first half of `dim`, of the row in the second (MAE, He et al. 2022). float32."""
    row, column = np.indices((side, side)).reshape(2, -1)
    inv = 10_000.0 ** (-np.arange(dim // 4) / (dim // 4))
    angles = [at[:, None] * inv[None] for at in (column, row)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], 1).astype(np.float32)
