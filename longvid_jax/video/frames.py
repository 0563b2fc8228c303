"""The plain data that video code hands out. B batch, W frames of a window, H x W' pixels."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Frames:
    """A window of frames as host arrays.

    Rows of a batch run at their own pace: a frame that is not `valid` is zeros at time 0, and the valid frames of a row
    form a prefix of that row's whole stream.
    """

    pixels: np.ndarray  # uint8 [B, W, H, W', 3]
    times: np.ndarray  # float32 [B, W], seconds from the first frame of the video
    valid: np.ndarray  # bool [B, W]

    @classmethod
    def empty(cls, batch: int, window: int, size: tuple[int, int]) -> Frames:
        """A window without a valid frame."""
        return cls(
            pixels=np.zeros((batch, window, *size, 3), np.uint8),
            times=np.zeros((batch, window), np.float32),
            valid=np.zeros((batch, window), bool),
        )


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a video is, counted from its packets where it is a file: headers are often empty or wrong."""

    width: int  # pixels, upright (after rotation)
    height: int
    fps: float  # mean over the whole video
    duration: float  # seconds, the last frame's own duration included
    num_frames: int
    codec: str  # FFmpeg's name; "images" for a folder, "array" for an array
    rotation: int  # degrees (0, 90, 180, 270) by which stored pictures are turned counter-clockwise to stand upright


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of one pass over a video."""

    samples: int  # sampled frames that were given out
    planned: int  # sampled frames that were wanted
    frames: int  # frames of the video that were decoded on the way
    expected: int  # frames of the video that lay on the way, or that its header promises beyond where it breaks off
    damaged: bool

    def __str__(self) -> str:
        text = f"decoded {self.frames} of {self.expected} frames"
        if self.damaged:
            text += ", the rest is damaged or missing"
        if self.samples < self.planned:
            text += f"; {self.planned - self.samples} of the {self.planned} sampled frames are left out"
        return text
