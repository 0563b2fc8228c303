"""The pytrees that memories are made of. Leaves are arrays only: jax arrays on the device, NumPy arrays on the host."""

import dataclasses

import jax
import numpy as np

from longvid_jax.memory.adacm2 import VideoCache
from longvid_jax.memory.dpselect import Lookback
from longvid_jax.memory.rewind import TokenMemory
from longvid_jax.ops import kv_cache
from longvid_jax.ops.kv_cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is known of one chunk of video that the decoder has read: T temporal patches, `patches` of them real."""

    offset: np.ndarray  # int [] where its tokens start in the cache
    patches: np.ndarray  # int [B]
    kept: np.ndarray  # int [B] tokens that were kept of it
    times: jax.Array | np.ndarray  # float32 [B, T] seconds
    peaks: jax.Array | None  # float32 [B, T] share of a temporal patch that DPSelect marked
    change: jax.Array | None  # float32 [B, T] mean distance to the predecessor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Waiting:
    """Frames on the host that do not fill a chunk yet."""

    pixels: np.ndarray  # uint8 [B, n, H, W, 3]
    times: np.ndarray  # float32 [B, n]
    valid: np.ndarray  # bool [B, n]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pending:
    """Features of a chunk that the decoder reads once the next temporal patch, or the end, is known."""

    features: jax.Array  # [B, Cp, N, D]
    patches: np.ndarray  # int [B]
    times: np.ndarray  # float32 [B, Cp]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetakeMemory:
    """ReTaKe between two windows of a video."""

    cache: KVCache
    lookback: Lookback | None  # batched; None before the first chunk and without DPSelect
    waiting: Waiting | None
    pending: Pending | None
    grid: np.ndarray  # int [2] rows and columns of tokens in a temporal patch; 0 before the first frame
    start: np.ndarray  # int [B] tokens of text before the video, and so the position of the first video token
    prompt: np.ndarray  # int32 [B, S] the text behind the video, then -1
    expected: np.ndarray  # int [B] temporal patches that the video will have; 0 if not known
    frames: np.ndarray  # int [B] frames watched
    read: np.ndarray  # int [B] temporal patches that the decoder has read
    dropped: np.ndarray  # int [B] temporal patches that DPSelect did not let through
    chunks: tuple[Chunk, ...]

    @property
    def stored(self) -> np.ndarray:
        """int [B] tokens that each row has in the cache, from what the host knows."""
        return self.start + sum((chunk.kept for chunk in self.chunks), np.zeros_like(self.start))

    @property
    def offset(self) -> int:
        """Where the next block goes in the cache, from what the host knows."""
        last = self.chunks[-1] if self.chunks else None
        return int(self.start.max()) if last is None else int(last.offset + last.kept.max())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaCM2Memory:
    """AdaCM2 between two windows of a video."""

    cache: VideoCache | None  # None before the first frame
    outputs: jax.Array | None  # [B, Q, width] of the Q-Former after the last frame
    waiting: Waiting | None
    instruction: np.ndarray | None  # int32 [B, S] tokens of the Q-Former's, then -1; None: it takes none
    ids: np.ndarray  # int32 [B, N] the decoder's prompt, 0 where queries stand, then -1
    places: np.ndarray  # int32 [B, N] which query stands here; -1: none
    grid: np.ndarray  # int [2] rows and columns of patches in a frame; 0 before the first frame
    frames: np.ndarray  # int [B] frames watched
    read: np.ndarray  # int [B] frames that the cache has taken in
    times: np.ndarray  # float32 [B or 1, T] seconds of those frames


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewindMemory:
    """ReWind between two windows of a video."""

    written: TokenMemory | None  # None before the first frame
    details: jax.Array | np.ndarray | None  # bfloat16 [B or 1, R, m, W] of each frame; None: they are decoded again
    waiting: Waiting | None
    instruction: np.ndarray  # int32 [B, S] tokens of the BERT's, then -1
    ids: np.ndarray  # int32 [B, N] the decoder's prompt, 0 where the video stands, then -1
    places: np.ndarray  # int32 [B, N] 0 where the video stands; -1 elsewhere
    grid: np.ndarray  # int [2] rows and columns of patches in a frame; 0 before the first frame
    frames: np.ndarray  # int [B] frames watched
    read: np.ndarray  # int [B] frames that have been written
    times: np.ndarray  # float32 [B or 1, T] seconds of those frames
    thumbnails: np.ndarray  # uint8 [B or 1, T, h, w, 3] of those frames, every so manieth pixel


def fork(memory):
    """A copy of a memory (or of any pytree of arrays) that lives on when the other is consumed."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array | np.ndarray) else x, memory)


def rows(memory: RetakeMemory, indices) -> RetakeMemory:
    """A memory of its own of these rows int [n] of the batch, in this order, any of them several times.

    So several questions about each of several videos are answered together, one a row.
    """
    indices = np.asarray(indices)
    rest = dataclasses.replace(memory, cache=None, grid=None)
    taken = jax.tree.map(lambda x: x[indices] if x.ndim else x.copy(), rest)
    cache = kv_cache.take_rows(memory.cache, indices, taken.offset)
    return dataclasses.replace(taken, cache=cache, grid=memory.grid.copy())
