"""Sizes against transformers' rule, patches against what its NumPy processor made (tests/golden/processor.npz)."""

import functools
import json

import jax
import numpy as np
import pytest
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from longvid_jax.errors import OptionError
from longvid_jax.video import Video
from longvid_jax.video.preprocess import fill_invalid, long_side, patchify, smart_resize

CLIP = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
CASES = ["even_6x90x124", "odd_5x77x131", "shrink_4x200x320", "grow_2x40x52", "still_1x64x96"]


@pytest.mark.parity
def test_smart_resize_is_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    rng = np.random.default_rng(0)
    limits = [(56 * 56, 28 * 28 * 1280), (3136, 15680), (128 * 28 * 28, 768 * 28 * 28)]
    sides = [*rng.integers(1, 4000, (2000, 2)).tolist(), *[[14 * i, 28] for i in range(1, 40)], [1, 200], [5600, 28]]
    for height, width in sides:
        for factor in (28, 32):
            for least, most in limits:
                ours = theirs_ = None
                try:
                    theirs_ = theirs(height, width, factor, least, most)
                except ValueError:
                    with pytest.raises(OptionError, match=f"{width}x{height}"):
                        smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
                else:
                    ours = smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
                assert ours == theirs_, (height, width, factor, least, most)


def test_narrow_pictures_are_an_error():
    assert smart_resize(10, 2000)
    with pytest.raises(OptionError, match="2001x10"):
        smart_resize(10, 2001)


def test_long_side():
    assert long_side(720, 1280) == (252, 448)
    assert long_side(1280, 720, 448) == (448, 252)
    assert long_side(180, 320, 448) == (252, 448)  # small pictures grow
    assert long_side(480, 640, 448) == (336, 448)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_patches_are_transformers(golden_dir, case, library):
    data = np.load(golden_dir / "processor.npz")
    settings = json.loads((golden_dir / "processor.json").read_text())[case]
    pixels = data[f"{case}_frames"]
    video = Video(pixels)
    size = smart_resize(video.probe.height, video.probe.width, **settings)
    (frames,) = video.stream(len(pixels), size)
    cut = functools.partial(patchify, patch=14, **CLIP)
    patches = cut(frames.pixels) if library == "numpy" else np.asarray(jax.jit(cut)(frames.pixels))
    time, rows, columns = data[f"{case}_grid_thw"][0]
    assert patches.dtype == np.float32
    assert patches.shape == (1, time, rows * columns, 3 * 2 * 14 * 14)
    expected = data[f"{case}_pixel_values_videos"].reshape(patches.shape).astype(np.float32)
    # Half a unit in the last place of float16, and the float32 arithmetic under it.
    np.testing.assert_allclose(patches, expected, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_padding_a_window_changes_no_patch(golden_dir, case):
    pixels = np.load(golden_dir / "processor.npz")[f"{case}_frames"][:, :56, :84][None, :, :28, :28]
    alone = patchify(pixels, patch=14, **CLIP)
    padded = np.concatenate([pixels, np.full((1, 3, *pixels.shape[2:]), 7, np.uint8)], axis=1)
    valid = np.arange(padded.shape[1])[None] < pixels.shape[1]
    batch = patchify(np.concatenate([padded, padded]), patch=14, valid=np.concatenate([valid, valid]), **CLIP)
    np.testing.assert_array_equal(batch[:1, : alone.shape[1]], alone)
    np.testing.assert_array_equal(batch[1], batch[0])
    assert valid[:, ::2].sum() == alone.shape[1]


def test_fill_invalid_repeats_each_rows_last_valid_frame():
    pixels = np.arange(1, 13, dtype=np.uint8).reshape(3, 4, 1, 1, 1)
    valid = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]], bool)
    expected = [[1, 2, 3, 4], [5, 5, 5, 5], [9, 10, 11, 11]]
    assert fill_invalid(pixels, valid).reshape(3, 4).tolist() == expected
    assert jax.jit(fill_invalid)(pixels, valid).reshape(3, 4).tolist() == expected
