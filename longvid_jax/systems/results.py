"""What a system gives back: answers, raw outputs, and an account of what the memory did."""

import dataclasses
from functools import cached_property
from typing import Protocol

import jax
import numpy as np

from longvid_jax.memory.frame_selection import Chosen, Selection
from longvid_jax.memory.state import Chunk


class Account(Protocol):
    """What the trace of every system, a frozen dataclass, says of a memory. B batch."""

    frames: np.ndarray  # int [B] frames watched
    cache_bytes: int  # what the memory takes when the answer began, all layers and rows together
    seconds: dict[str, float] | None  # a stage, where asked for with profile=True


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a memory of ReTaKe saw and kept. Arrays stay on the device until they are read. L layers, B batch."""

    frames: np.ndarray  # int [B] frames watched
    tokens: np.ndarray  # int [B] video tokens they became
    grid: tuple[int, int]  # rows and columns of tokens in a temporal patch
    cache_length: np.ndarray  # int [B] tokens of text and video in each layer's cache when the answer began
    cache_bytes: int  # what the keys and values of those tokens take, all layers and rows together
    cache_bytes_uncompressed: int  # the same had nothing been dropped
    cache_capacity: int  # tokens a row that are allocated
    chunks: tuple[Chunk, ...]
    source: jax.Array | tuple[jax.Array, ...]  # the cache's record of which tokens of a chunk it holds
    seconds: dict[str, float] | None = None  # a stage, where asked for with profile=True

    @cached_property
    def kept(self) -> list[list[np.ndarray]]:
        """kept[layer][chunk] int [B, kept]: sorted indices within the chunk; a row with fewer ends in -1."""
        layers = [np.asarray(layer)[..., 0] for layer in self.source]
        spans = [(int(chunk.offset), int(chunk.offset) + int(chunk.kept.max())) for chunk in self.chunks]
        return [[layer[:, start:end] for start, end in spans] for layer in layers]

    @property
    def kept_count(self) -> np.ndarray:
        """kept_count[layer][chunk] int [B]: how many of kept[layer][chunk] are real."""
        return (
            np.stack([np.stack([chunk.kept for chunk in self.chunks])] * len(self.source))
            if self.chunks
            else np.zeros(0)
        )

    @cached_property
    def times(self) -> np.ndarray:
        """float [B, T] seconds: when each temporal patch the decoder read begins; NaN behind a shorter row's end."""
        return self._along_video("times")

    @cached_property
    def keyframes(self) -> np.ndarray | None:
        """float [B, T]: the share of each temporal patch that DPSelect marked as a peak; None where it did not run."""
        return self._along_video("peaks")

    @cached_property
    def change(self) -> np.ndarray | None:
        """float [B, T]: DPSelect's distance of each temporal patch to its predecessor; None where it did not run."""
        return self._along_video("change")

    def _along_video(self, field: str) -> np.ndarray | None:
        """A field of the chunks side by side, without the padding that no row uses."""
        if any(getattr(chunk, field) is None for chunk in self.chunks):
            return None
        parts = [np.zeros((len(self.frames), 0))]
        for chunk in self.chunks:
            part = np.asarray(getattr(chunk, field))
            real = np.arange(part.shape[1]) < chunk.patches[:, None]
            parts.append(np.where(real, part, np.nan)[:, : int(chunk.patches.max())])
        return np.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class AdaCM2Trace:
    """What a memory of AdaCM2 saw and holds. Arrays stay on the device until they are read. L layers that hold it."""

    frames: np.ndarray  # int [B] frames watched
    grid: tuple[int, int]  # rows and columns of patches in a frame
    capacity: int  # tokens a layer and row that are allocated
    cache_bytes: int  # of keys and values, all layers and rows together, as allocated
    cache_bytes_uncompressed: int  # of those tokens had nothing been dropped
    length: jax.Array  # int32 [L, B] tokens held
    source: jax.Array  # int32 [L, B, R] which token of the video each is; -1: none
    times: np.ndarray  # float32 [B or 1, T] seconds of the frames; NaN behind a shorter row's end
    seconds: dict[str, float] | None = None  # a stage, where asked for with profile=True

    @property
    def tokens(self) -> int:
        """Of a frame: its patches and the class token, which comes first."""
        return int(np.prod(self.grid)) + 1

    @cached_property
    def kept(self) -> list[list[np.ndarray]]:
        """kept[layer][row] int [n, 2]: frame and token (0: class, then patches row by row) of each that is held."""
        source, length = np.asarray(self.source), np.asarray(self.length)
        return [
            [np.stack(divmod(row[:n], self.tokens), axis=1) for row, n in zip(layer, counts, strict=True)]
            for layer, counts in zip(source, length, strict=True)
        ]

    def row(self, index: int) -> "AdaCM2Trace":
        """That of one row of the batch."""
        here = slice(index, index + 1)
        times = self.times if len(self.times) == 1 else self.times[here]
        rows = len(self.frames)
        return dataclasses.replace(
            self,
            frames=self.frames[here],
            cache_bytes=self.cache_bytes // rows,
            cache_bytes_uncompressed=self.cache_bytes_uncompressed * int(self.frames[index]) // int(self.frames.sum()),
            length=self.length[:, here],
            source=self.source[:, here],
            times=times,
        )


@dataclasses.dataclass(frozen=True)
class RewindTrace:
    """What a memory of ReWind holds, and where it looked back. Arrays stay on the device until they are read."""

    frames: np.ndarray  # int [B] frames watched
    grid: tuple[int, int]  # rows and columns of patches in a frame
    tokens: int  # that are written of a frame
    capacity: int  # frames a row that are allocated
    cache_bytes: int  # of tokens, keys and values, all rows together, as allocated
    detail_bytes: int  # of the features kept to look back at, on the device or the host
    scores: jax.Array  # float32 [B, R] attention of the instruction to each frame
    selection: Selection  # indices of frames
    times: np.ndarray  # float32 [B or 1, T] seconds of the frames; NaN behind a shorter row's end
    thumbnails: np.ndarray  # uint8 [B or 1, T, h, w, 3]
    seconds: dict[str, float] | None = None  # a stage, where asked for with profile=True

    @property
    def cache_bytes_uncompressed(self) -> int:
        """The same with a token for each patch of the frames watched."""
        held = self.cache_bytes // (self.capacity * len(self.frames) * self.tokens)
        return held * int(self.frames.sum()) * int(np.prod(self.grid))

    @cached_property
    def relevance(self) -> list[np.ndarray]:
        """relevance[row] float32 [frames]."""
        return [row[:n] for row, n in zip(np.asarray(self.scores), self.frames, strict=True)]

    @cached_property
    def candidates(self) -> list[np.ndarray]:
        """candidates[row] int [n]: the most relevant frames, in time order."""
        return _chosen(self.selection.candidates)

    @cached_property
    def selected(self) -> list[np.ndarray]:
        """selected[row] int [n]: the frames that were looked at in detail, in time order."""
        return _chosen(self.selection.selected)

    def row(self, index: int) -> "RewindTrace":
        """That of one row of the batch."""
        here, rows = slice(index, index + 1), len(self.frames)
        once = {} if len(self.times) == 1 else {"times": self.times[here], "thumbnails": self.thumbnails[here]}
        return dataclasses.replace(
            self,
            frames=self.frames[here],
            cache_bytes=self.cache_bytes // rows,
            detail_bytes=self.detail_bytes // rows if once else self.detail_bytes,
            scores=self.scores[here],
            selection=jax.tree.map(lambda x: x[here], self.selection),
            **once,
        )


def _chosen(chosen: Chosen) -> list[np.ndarray]:
    return [row[real] for row, real in zip(np.asarray(chosen.indices), np.asarray(chosen.valid), strict=True)]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer in words; lists for a batch."""

    text: str | list[str]
    tokens: np.ndarray  # int [B, n] new tokens; behind a row's stop token 0
    trace: Account


@dataclasses.dataclass(frozen=True)
class Output:
    """What `generate` gives. The cache is there if asked for."""

    tokens: np.ndarray  # int [B, n] new tokens; behind a row's stop token 0
    logits: jax.Array  # float32 [B, n, V] from which they were chosen
    trace: Account
    cache: object | None = None
