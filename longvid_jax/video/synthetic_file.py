"""A made-up world as a real video file, with what happens in it beside."""

from __future__ import annotations

import json
import math
import numbers
import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from longvid_jax.errors import OptionError

if TYPE_CHECKING:
    from longvid_jax.video.synthetic import World

AT_ONCE = 1 << 22  # pixels rendered at a time
SEEK = 5  # seconds between two frames that decoding can start at, at most


def write_video(
    world: World,
    path: str | os.PathLike,
    *,
    size: tuple[int, int] = (224, 224),
    fps: float | Fraction = 10,
    crf: int = 20,
    questions: int | None = None,
) -> Path:
    """Streams a world to H.264, hours of it in constant memory, and `World.describe` to the same name with .json.

    Neither name exists before its file is complete.

    Args:
      world: what is to be seen.
      path: of the file, ending in .mp4, in a folder that exists.
      size: (H, W) in pixels, even numbers.
      fps: frames a second; frame i is the world at i / fps seconds.
      crf: quality, from 0 (lossless) to 51.
      questions: how many go into the JSON; None is one of each family.

    Returns:
      The path of the video.

    Raises:
      OptionError: an option outside its range, or no such folder.
    """
    path = Path(path)
    _check(path, size, fps, crf)
    rate = Fraction(fps).limit_denominator(1001)
    about = world.describe(questions)
    about["video"] = {"file": path.name, "size": [int(length) for length in size], "fps": float(rate), "crf": int(crf)}
    partial = [path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("json", "mp4")]
    try:
        partial[0].write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        _encode(world, partial[1], size, rate, crf)
        for done, name in zip(partial, (path.with_suffix(".json"), path), strict=True):
            os.replace(done, name)
    finally:
        for left in partial:
            left.unlink(missing_ok=True)
    return path


def _encode(world: World, path: Path, size: tuple[int, int], rate: Fraction, crf: int) -> None:
    height, width = size
    count = math.ceil(round(world.seconds * rate, 6))
    step = max(1, AT_ONCE // (height * width))
    with av.open(str(path), "w", format="mp4") as container:
        options = {"preset": "veryfast", "crf": str(crf), "g": str(max(1, round(SEEK * rate)))}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for first in range(0, count, step):
            times = np.arange(first, min(first + step, count)) * rate.denominator / rate.numerator
            for i, pixels in enumerate(world.render(times, size), first):
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.pts, frame.time_base = i, 1 / rate
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _check(path: Path, size: tuple[int, int], fps: float | Fraction, crf: int) -> None:
    if path.suffix != ".mp4":
        raise OptionError(f"the video's name is {path.name}, expected one that ends in .mp4.")
    if not path.parent.is_dir():
        raise OptionError(f"there is no folder {path.parent} for {path.name}; make it or name another one.")
    if any(length % 2 for length in size):
        raise OptionError(f"size is {tuple(size)}, expected even numbers of pixels, as H.264 needs.")
    if not (isinstance(fps, numbers.Real) and 0.1 <= fps <= 240):
        raise OptionError(f"fps is {fps!r}, expected 0.1 to 240 frames a second.")
    if not (isinstance(crf, numbers.Integral) and 0 <= crf <= 51):
        raise OptionError(f"crf is {crf!r}, expected a whole number from 0 (lossless) to 51.")
