"""From a frame's size to the size a model looks at, and from pixels to patches.

Letters: B batch, F sampled frames, H x W pixels, T temporal patches, P patches of one temporal patch.
"""

from __future__ import annotations

import math

import numpy as np
from einops import rearrange

from longvid_jax.errors import OptionError

MIN_PIXELS = 56 * 56
MAX_PIXELS = 28 * 28 * 1280


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Qwen2-VL's size of an image: sides divisible by `factor` (patch x merge), area within limits, aspect nearly kept.

    Returns:
      (height, width) in pixels.

    Raises:
      OptionError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise OptionError(
            f"a picture of {width}x{height} is too narrow, expected one side at most 200 times the other."
        )
    sides = height, width
    # Halves go to the even multiple, as Python rounds.
    new = [round(side / factor) * factor for side in sides]
    if new[0] * new[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
    elif new[0] * new[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new = [math.ceil(side * grow / factor) * factor for side in sides]
    return new[0], new[1]


def long_side(
    height: int,
    width: int,
    long_side: int = 448,
    *,
    factor: int = 28,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """ReTaKe's size (2412.20504, released code): the longer side becomes `long_side`, then `smart_resize` applies.

    Returns:
      (height, width) in pixels; 1280x720 with 448 gives (252, 448).
    """
    longer = max(height, width)
    height, width = (max(1, side * long_side // longer) for side in (height, width))
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


def fill_invalid(pixels, valid):
    """Replace each row's frames that are not valid by its last valid one: a temporal patch is completed by repetition.

    Args:
      pixels: [B, F, ...], NumPy or JAX.
      valid: bool [B, F], a prefix of each row; rows without a valid frame repeat their first, whatever it is.
    """
    xp = pixels.__array_namespace__()
    last = xp.maximum(valid.sum(axis=1) - 1, 0)[:, None]
    take = xp.minimum(xp.arange(pixels.shape[1])[None], last)
    return xp.take_along_axis(pixels, take.reshape(take.shape + (1,) * (pixels.ndim - 2)), axis=1)


def normalise(pixels, mean, std):
    """float32 [..., 3] of pixels [..., 3] in 0..255; mean and std are three numbers each, for pixels in 0..1."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / std


def patchify(pixels, *, patch: int, temporal: int = 2, merge: int = 2, mean, std, valid=None):
    """Normalise frames and cut them into patches, in the layout of Hugging Face's Qwen2VLImageProcessor.

    Args:
      pixels: [B, F, H, W, 3] in 0..255, uint8 or float, NumPy or JAX (also inside jit); H and W divisible by
        patch * merge. A last frame without a partner is repeated.
      patch, temporal, merge: pixels a side, frames a patch, patches a side that the model merges into one token.
      mean, std: three numbers each, for pixels in 0..1.
      valid: bool [B, F], see `fill_invalid`; None if all frames are.

    Returns:
      float32 [B, T, P, 3 * temporal * patch * patch], T = ceil(F / temporal). Patches that merge stand together; within
      a patch the order is colour, time, row, column. A temporal patch is real where `valid[:, ::temporal]` is.
    """
    xp = pixels.__array_namespace__()
    if valid is not None:
        pixels = fill_invalid(pixels, valid)
    lone = -pixels.shape[1] % temporal
    if lone:
        pixels = xp.concatenate([pixels] + [pixels[:, -1:]] * lone, axis=1)
    return rearrange(
        normalise(pixels, mean, std),
        "b (t f) (h mh p) (w mw q) c -> b t (h w mh mw) (c f p q)",
        f=temporal,
        mh=merge,
        mw=merge,
        p=patch,
        q=patch,
    )
