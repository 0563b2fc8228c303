"""Which frames of a clip are looked at in fine-tuning, and cropped how: the rules of MA-LMM (2404.05726), AdaCM2's too.

All randomness comes from a generator that is given. n frames, H x W pixels; frames are counted at MA-LMM's 10 a second.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

SCALE = (0.5, 1.0)  # of a frame's area
RATIO = (3 / 4, 4 / 3)  # width over height
SHORT_SIDE = 256  # pixels of the frames that MA-LMM stores, before any crop


def spread(first: int, last: int, count: int, rng=None) -> np.ndarray:
    """int64 [count] from the first to the last frame, rounded: evaluations, and LVU in training."""
    return np.rint(np.linspace(first, last, count)).astype(np.int64)


def truncated(first: int, last: int, count: int, rng=None) -> np.ndarray:
    """int64 [count] from the first to the last frame, rounded down: evaluations on segments (YouCook2)."""
    return np.linspace(first, last, count).astype(np.int64)


def drawn(first: int, last: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [count], a random frame in each of `count` equal segments; where those hold less than one, it repeats."""
    edges = np.linspace(first, last + 1, count + 1, dtype=np.int64)
    return rng.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))


PICKS = {"spread": spread, "truncated": truncated, "drawn": drawn}


def stored_size(height: int, width: int) -> tuple[int, int]:
    """(H, W) of a frame as it is kept: the shorter side at most SHORT_SIDE pixels."""
    shrink = min(1.0, SHORT_SIDE / min(height, width))
    return round(height * shrink), round(width * shrink)


def random_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, as torchvision's RandomResizedCrop draws it.

    Its share of the area is uniform in SCALE and its ratio log-uniform in RATIO. If ten of those do not fit in the
    frame, it is the largest central one whose ratio is in RATIO.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(*np.log(RATIO)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def augmented(frames: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The same random crop of all frames of a clip, and in half of the cases mirrored.

    Resized by PIL, bicubic, as InstructBLIP's images are; MA-LMM does it without anti-aliasing.

    Args:
      frames: uint8 [n, H, W, 3].
      size: (H', W') in pixels.

    Returns:
      uint8 [n, H', W', 3].
    """
    top, left, height, width = random_box(*frames.shape[1:3], rng)
    crops = frames[:, top : top + height, left : left + width]
    bicubic = Image.Resampling.BICUBIC
    pixels = np.stack([np.asarray(Image.fromarray(crop).resize(size[::-1], bicubic)) for crop in crops])
    return pixels[:, :, ::-1] if rng.random() < 0.5 else pixels


def redrawn(example, rng: np.random.Generator):
    """A data.batches.Example with other random numbers, where its frames take any: for grain's `random_map`.

    Behind `repeat`, its generator depends on the seed and on the place in all epochs, so each epoch sees other crops,
    and batch b is still a function of (seed, b).
    """
    again = getattr(example.frames, "redrawn", None)
    return example if again is None else dataclasses.replace(example, frames=again(rng))
