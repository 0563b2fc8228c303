"""Frames that are not in a video file: a folder of images, or an array.

Resized by PIL, bicubic, as Hugging Face's image processors do: the pixels are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from longvid_jax.errors import VideoError
from longvid_jax.video.decode import Tally
from longvid_jax.video.frames import Probe

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Array:
    """Frames in an array, uint8 [T, H, W, 3]."""

    def __init__(self, pixels: np.ndarray, fps: float):
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise VideoError(
                f"the array of frames is {pixels.dtype} {list(pixels.shape)}, expected uint8 [T, H, W, 3] with T >= 1."
            )
        self.pixels = pixels
        total, height, width = pixels.shape[:3]
        self.times = np.arange(total) / fps
        self.probe = Probe(width, height, fps, total / fps, total, "array", 0)

    def decode(self, wanted: Sequence[int], size: tuple[int, int], tally: Tally) -> Iterator[tuple[int, np.ndarray]]:
        for i in wanted:
            tally.frames, tally.expected = tally.frames + 1, tally.expected + 1
            yield i, _resize(Image.fromarray(self.pixels[i]), size)


class Folder:
    """Images in a folder, ordered by the numbers in their names, turned upright as their EXIF data say."""

    def __init__(self, path: str, fps: float):
        files = [
            file for file in Path(path).iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        ]
        self.files = sorted(files, key=_natural)
        if not files:
            raise VideoError(f"{path}: a folder without images ({' '.join(sorted(SUFFIXES))}).")
        first = next(filter(None, map(_read, self.files)), None)
        if first is None:
            raise VideoError(f"{path}: none of the {len(files)} images in it can be read.")
        self.times = np.arange(len(files)) / fps
        self.probe = Probe(first.width, first.height, fps, len(files) / fps, len(files), "images", 0)

    def decode(self, wanted: Sequence[int], size: tuple[int, int], tally: Tally) -> Iterator[tuple[int, np.ndarray]]:
        for i in wanted:
            image = _read(self.files[i])
            tally.expected += 1
            if image is None:
                tally.damaged = True
                continue
            tally.frames += 1
            yield i, _resize(image, size)


def _natural(file: Path) -> list[str | int]:
    """Sorting by this puts frame2 before frame10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", file.name))]


def _read(file: Path) -> Image.Image | None:
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError):  # PIL's errors for unreadable and broken files
        return None


def _resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))
