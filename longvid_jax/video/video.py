"""A video as a stream of windows: a file, a folder of images, or an array."""

from __future__ import annotations

import contextlib
import numbers
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property

import numpy as np

from longvid_jax.errors import OptionError, VideoError, VideoWarning
from longvid_jax.video import decode
from longvid_jax.video.frames import Frames, Probe, Report
from longvid_jax.video.prefetch import prefetch
from longvid_jax.video.sampling import check_options, sample
from longvid_jax.video.stills import Array, Folder


class File:
    """A video file, or the content of one; indexed when first asked."""

    def __init__(self, path: str | bytes):
        with decode.opened(path):
            pass
        self.path = path

    @cached_property
    def index(self) -> decode.Index:
        return decode.read_index(self.path)

    @property
    def probe(self) -> Probe:
        return self.index.probe

    @property
    def times(self) -> np.ndarray:
        return self.index.times

    def decode(self, wanted, size, tally):
        return decode.decode(self.path, self.index, wanted, size, tally)


class Video:
    """A video and the frames of it that will be looked at.

    Args:
      source: path of a video file or its content as bytes, path of a folder of images (ordered by the numbers in their
        names), or an array uint8 [T, H, W, 3].
      fps: sampled frames a second; 2 where the sampler needs it and it is not given. No frame is sampled twice.
      max_frames: upper limit on the sampled frames; the "fps" sampler spreads that many over the video where fps would
        give more.
      sampler: "fps" (by time), "linspace", "qwen", "retake", "vlmevalkit", "lvb", "mid" or "moviechat"; see `sampling`.
      native_fps: rate of a folder's images or an array's frames; files know theirs.
      long_side: pixels of the longer side at which a model looks at it (ReTaKe's rule); None leaves it to the model.

    Raises:
      VideoError: the source cannot be opened, holds no video, or (once frames are asked for) nothing in it decodes.
      OptionError: an option outside its range.
    """

    def __init__(
        self,
        source: str | os.PathLike | bytes | np.ndarray,
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        sampler: str = "fps",
        native_fps: float = 1.0,
        long_side: int | None = None,
    ):
        check_options(sampler, fps, max_frames)
        if long_side is not None and not (isinstance(long_side, numbers.Integral) and long_side >= 1):
            raise OptionError(f"long_side is {long_side!r}, expected a whole number of pixels of at least 1.")
        if not (isinstance(native_fps, numbers.Real) and 0 < native_fps < float("inf")):
            raise OptionError(f"native_fps is {native_fps!r}, expected a number of frames a second above 0.")
        self.fps, self.max_frames, self.sampler, self.long_side = fps, max_frames, sampler, long_side
        self.report: Report | None = None
        if isinstance(source, (str, os.PathLike)):
            self.name = os.fspath(source)
            self._source = Folder(self.name, native_fps) if os.path.isdir(self.name) else File(self.name)
        elif isinstance(source, bytes):
            self.name = decode.name_of(source)
            self._source = File(source)
        elif hasattr(source, "__array__"):
            self.name = "array"
            self._source = Array(np.asarray(source), native_fps)
        else:
            raise OptionError(
                f"the video is of type {type(source).__name__}, expected a path or an array uint8 [T, H, W, 3]."
            )

    def __repr__(self) -> str:
        return f"Video({self.name!r}, fps={self.fps}, max_frames={self.max_frames}, sampler={self.sampler!r})"

    def __len__(self) -> int:
        """Number of frames that are planned; a damaged file may give fewer."""
        return len(self.indices)

    @property
    def probe(self) -> Probe:
        """Size, rate, length and codec, from the file's packets."""
        return self._source.probe

    @cached_property
    def indices(self) -> np.ndarray:
        """int64 [T]: which frames of the source are planned."""
        return sample(
            self._source.times, self.probe.duration, sampler=self.sampler, fps=self.fps, max_frames=self.max_frames
        )

    @property
    def times(self) -> np.ndarray:
        """float64 [T]: the planned frames' times in seconds from the first frame of the source."""
        return self._source.times[self.indices]

    @property
    def num_decoded(self) -> int | None:
        """Sampled frames that the last complete stream gave; None before."""
        return self.report.samples if self.report else None

    def stream(self, window: int, size: tuple[int, int]) -> Iterator[Frames]:
        """Decode on a thread, at most two windows ahead.

        Args:
          window: frames in each window; the last one is padded with frames that are not valid.
          size: (H, W') in pixels, upright.

        Yields:
          Frames with B = 1. Planned frames that do not decode are left out; one VideoWarning at the end counts them.

        Raises:
          VideoError: nothing decodes.
        """
        return self._stream(window, _checked(window, size))

    def _stream(self, window: int, size: tuple[int, int]) -> Generator[Frames, None, None]:
        tally, given = decode.Tally(), 0
        len(self)  # plans on this thread what the other one and the caller both read
        with contextlib.closing(prefetch(self._windows(window, size, tally))) as windows:
            for frames in windows:
                given += int(frames.valid.sum())
                yield frames
        self._finish(tally, given)

    def _windows(self, window: int, size: tuple[int, int], tally: decode.Tally) -> Generator[Frames, None, None]:
        filled, frames = 0, None
        for i, pixels in self._source.decode(self.indices.tolist(), size, tally):
            frames = frames or Frames.empty(1, window, size)
            frames.pixels[0, filled] = pixels
            frames.times[0, filled] = self._source.times[i]
            frames.valid[0, filled] = True
            filled += 1
            if filled == window:
                yield frames
                filled, frames = 0, None
        if frames is not None:
            yield frames

    def _finish(self, tally: decode.Tally, samples: int) -> None:
        self.report = Report(samples, len(self), tally.frames, tally.expected, tally.damaged)
        if not samples:
            raise VideoError(f"{self.name}: none of the {len(self)} sampled frames can be decoded.")
        if tally.damaged:
            warnings.warn(f"{self.name}: {self.report}.", VideoWarning, stacklevel=3)

    def read(self, times: Sequence[float], size: tuple[int, int]) -> np.ndarray:
        """The frames nearest to some times, for a picture of the video: sparse, seeking.

        Args:
          times: [n] seconds, in any order.
          size: (H, W') in pixels, upright.

        Returns:
          uint8 [n, H, W', 3]. In place of a frame that does not decode stands the nearest that does.
        """
        size = _checked(1, size)
        every = self._source.times
        nearest = np.array([np.abs(every - time).argmin() for time in times])
        found = dict(self._source.decode(np.unique(nearest).tolist(), size, decode.Tally()))
        if not found:
            raise VideoError(f"{self.name}: none of the {len(nearest)} frames asked for can be decoded.")
        have = np.array(list(found))
        return np.stack([found[have[np.abs(every[have] - every[i]).argmin()]] for i in nearest])


def stream_batch(videos: Sequence[Video], window: int, size: tuple[int, int]) -> Iterator[Frames]:
    """Stream several videos as the rows of a batch, until the longest ends; ended rows are zeros and not valid.

    Args and errors: as `Video.stream`.

    Yields:
      Frames with B = len(videos).
    """
    return _stream_batch(videos, window, _checked(window, size))


def _stream_batch(videos, window, size):
    blank = Frames.empty(1, window, size)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(contextlib.closing(video.stream(window, size))) for video in videos]
        while True:
            rows = [next(stream, None) for stream in streams]
            if all(row is None for row in rows):
                return
            rows = [row or blank for row in rows]
            fields = ([getattr(row, field) for row in rows] for field in ("pixels", "times", "valid"))
            yield Frames(*map(np.concatenate, fields))


def _checked(window: int, size: tuple[int, int]) -> tuple[int, int]:
    if window < 1:
        raise OptionError(f"window is {window}, expected at least 1 frame.")
    if len(size) != 2 or min(size) < 1:
        raise OptionError(f"size is {tuple(size)}, expected (height, width) in pixels, each at least 1.")
    return int(size[0]), int(size[1])
