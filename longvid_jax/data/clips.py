"""Clips of annotated videos as examples: what training and evaluation see of them, the same at every call.

A video is a file (NAME.mp4, ...) or a folder NAME of frames, taken 10 a second (`fps`), which is MA-LMM's layout; the
same frames are taken from either.

Training (`train=True`) draws one frame in each of num_frames equal segments, crops all frames of a clip alike, and
mirrors half of the clips; evaluation spreads the frames evenly and only resizes them. The random numbers of example i
are a function of (seed, i), so every epoch sees the same crops, unless the examples go through grain's `random_map`
with augment.redrawn: then each epoch has its own.
"""

import abc
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longvid_jax.data import augment
from longvid_jax.data.batches import Example
from longvid_jax.data.conversations import find
from longvid_jax.errors import DataError, OptionError, VideoError
from longvid_jax.video import Video

FPS = 10.0


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames `first` to `last` of a video, counted at `fps`, of which it gives `count` when called.

    pick: which rule of augment.PICKS chooses them. seed: of the random numbers; None: no augmentation.
    """

    folder: Path
    name: str
    count: int
    size: tuple[int, int]
    first: int = 0
    last: int | None = None  # None: of the video
    fps: float = FPS
    pick: str = "spread"
    seed: tuple[int, ...] | None = None

    def __call__(self) -> np.ndarray:
        """uint8 [count, H, W, 3]; VideoError if there is no such video, it ends before, or nothing decodes."""
        video = Video(find(self.folder, self.name), native_fps=self.fps)
        total = max(1, round(video.probe.duration * self.fps))
        if self.first >= total:
            raise VideoError(
                f"{video.name} is {total / self.fps:g} seconds long, but the clip begins at {self.first / self.fps:g}."
            )
        last = total - 1 if self.last is None else min(self.last, total - 1)
        rng = None if self.seed is None else np.random.default_rng(self.seed)
        times = augment.PICKS[self.pick](self.first, last, self.count, rng) / self.fps
        if rng is None:
            return video.read(times, self.size)
        frames = video.read(times, augment.stored_size(video.probe.height, video.probe.width))
        return augment.augmented(frames, self.size, rng)

    def redrawn(self, rng: np.random.Generator) -> "Clip":
        """With other random numbers, if it takes any."""
        return self if self.seed is None else dataclasses.replace(self, seed=(int(rng.integers(1 << 63)),))


@dataclasses.dataclass(frozen=True)
class Entry:
    """An annotated clip; frames `first` to `last` (None: of the video) count at the source's fps."""

    id: str
    video: str
    conversations: tuple[tuple[str, str], ...]  # (question, answer) of each
    tag: str
    first: int = 0
    last: int | None = None
    segment: bool = False  # a part of the video that the annotation cuts out


@dataclasses.dataclass(frozen=True)
class ClipSource(abc.ABC):
    """Annotated clips: `file` says which videos of `folder` are asked what; a data set is a subclass.

    num_frames: of every example; shorter videos repeat theirs. size: (H, W) in pixels.

    Raises DataError if the file is not there, holds no entry, or an entry is of no known layout, and OptionError for
    an option outside its range. A video that is not there or does not decode is found out when its frames are asked
    for (VideoError).
    """

    file: str | Path
    folder: str | Path
    num_frames: int = 100
    size: tuple[int, int] = (224, 224)
    train: bool = False
    fps: float = FPS
    seed: int = 42

    jitters = True  # draws frames at random in training

    def __post_init__(self):
        if self.num_frames < 1:
            raise OptionError(f"num_frames is {self.num_frames}, but must be at least 1.")
        if len(self.size) != 2 or min(self.size) < 1:
            raise OptionError(f"size is {tuple(self.size)}, but must be (height, width) in pixels, each at least 1.")
        if not self.fps > 0:
            raise OptionError(f"fps is {self.fps}, but must be above 0.")
        entries = list(self._entries(Path(self.file)))
        if not entries:
            raise DataError(f"{self.file} has no entry {self._wanted()}; give another file.")
        object.__setattr__(self, "_read", entries)

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, i: int) -> Example:
        entry, size = self._read[i], tuple(self.size)
        pick = "drawn" if self.train and self.jitters else "truncated" if entry.segment else "spread"
        clip = Clip(
            folder=Path(self.folder),
            name=entry.video,
            count=self.num_frames,
            size=size,
            first=entry.first,
            last=entry.last,
            fps=self.fps,
            pick=pick,
            seed=(self.seed, i) if self.train else None,
        )
        turns = tuple((turn,) for turn in entry.conversations)
        return Example(entry.id, turns, self.num_frames, size, clip, tags=(entry.tag,) * len(turns))

    @abc.abstractmethod
    def _entries(self, file: Path) -> Iterator[Entry]:
        """What the file holds."""

    def _wanted(self) -> str:
        """Which entries of the file are taken, for the error that there are none."""
        return "of this data set"
