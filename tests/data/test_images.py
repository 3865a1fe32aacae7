"""Pixels of towers against the reference's processors (Pillow backends), on two noisy images, one with transparency."""

from pathlib import Path

import numpy as np
import pytest

from jaxllm.data.images import Smart, cut_patches, patched_pixels, smart_size, square_pixels, video_pixels

Image = pytest.importorskip("PIL.Image")
GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "images.npz")
SMALL = Smart(patch=4, least=16 * 16, most=40 * 40)


def pictures():
    return [Image.fromarray(GOLDEN["image0"]), Image.fromarray(GOLDEN["image1"], "RGBA")]


def test_shorter_edge_and_centre_crop():
    np.testing.assert_allclose(square_pixels(pictures(), 20), GOLDEN["clip"], rtol=0, atol=1e-6)


def test_stretched_to_a_square():
    np.testing.assert_allclose(square_pixels(pictures(), 20, stretch=True), GOLDEN["blip"], rtol=0, atol=1e-6)


def test_patches_of_any_size():
    pixels, grid = patched_pixels(pictures(), SMALL)
    np.testing.assert_array_equal(grid, GOLDEN["qwen_grid"])
    np.testing.assert_allclose(pixels, GOLDEN["qwen"], rtol=0, atol=1e-6)


def test_smart_sizes():
    """60 sizes from 8 to 3,000 pixels a side: kept, enlarged and shrunk ones among them."""
    got = [smart_size(int(h), int(w)) for h, w in GOLDEN["sizes"]]
    np.testing.assert_array_equal(got, GOLDEN["smart"])
    with pytest.raises(ValueError, match="200 times"):
        smart_size(10, 2001)


def test_a_video_is_cut_like_its_frames():
    """A patch holds two frames; the last one stands in for a missing one."""
    frames = np.random.default_rng(0).normal(size=(3, 3, 8, 16)).astype(np.float32)
    pixels, grid = video_pixels([frames], SMALL)
    np.testing.assert_array_equal(grid, [[2, 2, 4]])
    for step, pair in enumerate([(0, 1), (2, 2)]):
        for half, frame in enumerate(pair):
            alone, _ = cut_patches(np.repeat(frames[frame][None], 2, 0), SMALL)
            own = pixels.reshape(2, 8, 3, 2, 16)[step, :, :, half]
            np.testing.assert_array_equal(own, alone.reshape(8, 3, 2, 16)[:, :, 0])


def test_frames_that_do_not_fit():
    with pytest.raises(ValueError, match="3 frames of 8 x 12"):
        cut_patches(np.zeros((3, 3, 8, 12), np.float32), SMALL)
