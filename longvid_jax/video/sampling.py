"""Which frames of a video are looked at.

Published systems disagree on this, and their scores depend on it, so the rule is an option with a name. What comes out
is ascending frame indices, none twice.
"""

from __future__ import annotations

import math
import numbers

import numpy as np

from longvid_jax.errors import OptionError

DEFAULT_FPS = 2.0


def sample(
    times: np.ndarray, duration: float, *, sampler: str = "fps", fps: float | None = None, max_frames: int | None = None
):
    """Choose frames.

    Args:
      times: float64 [T], the time of every frame in seconds, ascending, the first one 0.
      duration: length of the video in seconds.
      sampler: a name in `SAMPLERS`.
      fps: frames a second to aim at, 2 by default; but samplers by count ("linspace", "vlmevalkit", "lvb", "mid",
        "moviechat") aim at max_frames frames where only that is given.
      max_frames: upper limit on the number of frames; None is no limit.

    Returns:
      int64 [n] ascending frame indices, n >= 1.

    Raises:
      OptionError: unknown sampler, fps not above 0, max_frames not a whole number of at least 1.
    """
    check_options(sampler, fps, max_frames)
    rule, by_count = SAMPLERS[sampler]
    total = len(times)
    limit = total if max_frames is None else max_frames
    if rule is by_fps:
        indices = by_fps(times, duration, fps or DEFAULT_FPS, limit)
    elif by_count:
        count = min(total, limit)
        if fps is not None or max_frames is None:
            count = min(count, math.floor(duration * (fps or DEFAULT_FPS) + 1e-6))
        indices = rule(total, max(1, count))
    else:
        indices = rule(total, duration, fps or DEFAULT_FPS, limit)
    return np.unique(np.asarray(indices, np.int64))


def check_options(sampler: str, fps: float | None, max_frames: int | None) -> None:
    """Raise OptionError for values that no video could be sampled with."""
    if sampler not in SAMPLERS:
        raise OptionError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}.")
    if fps is not None and not (isinstance(fps, numbers.Real) and 0 < fps < math.inf):
        raise OptionError(f"fps is {fps!r}, expected a number of frames a second above 0.")
    if max_frames is not None and not (isinstance(max_frames, numbers.Integral) and max_frames >= 1):
        raise OptionError(f"max_frames is {max_frames!r}, expected a whole number of at least 1.")


def by_fps(times: np.ndarray, duration: float, fps: float, limit: int) -> np.ndarray:
    """The frames shown at 0, 1/fps, 2/fps ... seconds; at `limit` times, evenly spread, where that is more frames."""
    # A frame counts as shown a little early, as Matroska and WebM round to a millisecond.
    early = min(1.001e-3, np.median(np.diff(times)) / 4) if len(times) > 1 else 0.0
    grid = np.arange(max(1, math.ceil((duration - early) * fps))) / fps
    indices = np.unique(np.searchsorted(times, grid + early, side="right") - 1)
    if len(indices) > limit:
        grid = np.linspace(0.0, times[-1], limit)
        indices = np.searchsorted(times, grid + early, side="right") - 1
    return indices


def linspace(total: int, count: int) -> np.ndarray:
    """First to last frame, truncated (LLaVA, lmms-eval, MA-LMM)."""
    return np.linspace(0, total - 1, count).astype(np.int64)


def vlmevalkit(total: int, count: int) -> np.ndarray:
    """VLMEvalKit: count inner points, neither end."""
    return (np.arange(1, count + 1) * (total / (count + 1))).astype(np.int64)


def lvb(total: int, count: int) -> np.ndarray:
    """LongVideoBench: a whole-number stride from the first frame."""
    return np.arange(count) * (total // count)


def mid(total: int, count: int) -> np.ndarray:
    """MVBench and MLVU: the middle of each of count segments."""
    segment = (total - 1) / count
    return (segment / 2 + np.round(segment * np.arange(count))).astype(np.int64)


def moviechat(total: int, count: int) -> np.ndarray:
    """MovieChat: the start of each of count segments."""
    return (np.arange(count) * (total / count)).astype(np.int64)


def retake(total: int, duration: float, fps: float, limit: int) -> np.ndarray:
    """ReTaKe (2412.20504, released code): floor(min(total, limit, duration * fps)) made even, then as `linspace`."""
    count = math.floor(min(total, limit, duration * fps + 1e-6))
    return linspace(total, max(count - count % 2, min(2, limit)))


def qwen(total: int, duration: float, fps: float, limit: int) -> np.ndarray:
    """qwen-vl-utils: duration * fps within [4, limit] and what there is, made even, first to last frame, rounded."""
    most = max(limit - limit % 2, 1)
    count = math.floor(min(max(duration * fps + 1e-6, min(4, most)), most, total))
    return np.round(np.linspace(0, total - 1, max(count - count % 2, 1)))


# name -> (rule, whether it is told a number of frames)
SAMPLERS = {
    "fps": (by_fps, False),
    "linspace": (linspace, True),
    "qwen": (qwen, False),
    "retake": (retake, False),
    "vlmevalkit": (vlmevalkit, True),
    "lvb": (lvb, True),
    "mid": (mid, True),
    "moviechat": (moviechat, True),
}
