"""ReWind's memory (arXiv 2411.15556, section 3.2): read, perceive, write, clip after clip; then look back.

Before a clip the memory is read, with that in mind its frames are perceived, and of each frame a few tokens are
appended. What is written stays as it is, so its keys and values are made once. The networks are callables.

Letters: B batch, C clips, F frames of a clip, P patches of a frame and W their width, R capacity of the memory in
frames, N tokens written a frame and D their width, Q queries, H heads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from longvid_jax.errors import OptionError
from longvid_jax.memory.frame_selection import Selection, relevance, select_frames
from longvid_jax.ops.layers import rematerialised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMemory:
    """What has been written, oldest first; the first `length` frames of R are real."""

    tokens: jax.Array  # [B, R, N, D]
    keys: jax.Array  # [B, H, R, N, D / H] what READ projects the tokens to, once, and how it looks at them
    values: jax.Array  # [B, H, R, N, D / H]
    length: jax.Array  # int32 [B] frames, and so the number of the next one

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    @property
    def valid(self) -> jax.Array:
        """bool [B, R]: which frames are real."""
        return jnp.arange(self.capacity) < self.length[:, None]

    @property
    def by_token(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What READ takes: keys and values [B, H, R * N, D / H], and which of them are real, bool [B, R * N]."""
        keys, values = (rearrange(x, "b h r n d -> b h (r n) d") for x in (self.keys, self.values))
        return keys, values, jnp.repeat(self.valid, self.tokens.shape[2], axis=1)


def empty(batch: int, capacity: int, tokens: int, width: int, heads: int, dtype) -> TokenMemory:
    """A memory in which nothing is written: room for `capacity` frames of N `tokens` of D `width`."""

    def by_head():  # an array of its own each, so that all can be donated
        return jnp.zeros((batch, heads, capacity, tokens, width // heads), dtype)

    written = jnp.zeros((batch, capacity, tokens, width), dtype)
    return TokenMemory(written, by_head(), by_head(), jnp.zeros((batch,), jnp.int32))


def grow(memory: TokenMemory, capacity: int) -> TokenMemory:
    """The same with room for `capacity` frames."""
    frames = [(0, capacity - memory.capacity), (0, 0), (0, 0)]
    keys, values = (jnp.pad(x, [(0, 0), (0, 0), *frames]) for x in (memory.keys, memory.values))
    return TokenMemory(jnp.pad(memory.tokens, [(0, 0), *frames]), keys, values, memory.length)


def room(frames: int, capacity: int = 64) -> int:
    """The capacity, doubled until it holds this many frames."""
    return capacity << max(0, math.ceil(math.log2(max(frames, 1) / capacity)))


class Clips(NamedTuple):
    """Clips that are watched one after the other."""

    features: jax.Array  # [C, B, F, P, W], or [C, 1, F, P, W]: all rows watch the same
    valid: jax.Array  # bool [C, B, F]


def in_clips(features: jax.Array, valid: jax.Array, frames: int) -> Clips:
    """Features [B or 1, T, P, W] and valid [B, T] in clips of so many frames, the last one filled up."""
    short = -valid.shape[1] % frames
    features = jnp.pad(features, [(0, 0), (0, short), (0, 0), (0, 0)])
    valid = jnp.pad(valid, [(0, 0), (0, short)])
    return Clips(
        rearrange(features, "b (c f) p w -> c b f p w", f=frames), rearrange(valid, "b (c f) -> c b f", f=frames)
    )


Read = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""read(keys [B, H, R * N, D / H], values like them, valid [B, R * N]) -> queries [B, Q, D]."""
Perceive = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""perceive(queries [B, Q, D], features [B, F, P, W], numbers [B, F], valid [B, F]) -> [B, F, Q, D]."""
Write = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""write(perceived [B, F, Q, D], numbers [B, F]) -> tokens [B, F, N, D], keys and values [B, H, F, N, D / H]."""


@jax.named_scope("rewind")
def watch(
    memory: TokenMemory,
    clips: Clips,
    read: Read,
    perceive: Perceive,
    write: Write,
    *,
    truncate: int | None = None,
    remat: bool | str = False,
    unroll: int = 1,
) -> TokenMemory:
    """The memory after these clips. It must have room for their frames; those beyond its capacity would be lost.

    Frames that are not valid change nothing, wherever they are. truncate: no gradient flows into what was written
    before a row's last `truncate` clips, whoever asks, nor into anything older; None: into all. remat: a clip's
    activations are computed anew for the gradient, see ops.layers.rematerialised. unroll: so many clips are compiled
    one behind the other, whose gradient then copies less.
    """
    count, _, frames = clips.valid.shape
    if count * frames > memory.capacity:
        raise OptionError(f"The memory has room for {memory.capacity} frames, but {count * frames} are given; grow it.")
    if truncate is not None and truncate < 1:
        raise OptionError(f"truncate is {truncate}, but must be a positive number of clips.")

    def clip(memory, xs: Clips):
        return step(memory, xs, read, perceive, write), None

    if truncate is not None and truncate < count:
        clips = _ending_together(clips)
        early = jax.tree.map(lambda x: x[: count - truncate], clips)
        clips = jax.tree.map(lambda x: x[count - truncate :], clips)
        memory = jax.lax.stop_gradient(jax.lax.scan(clip, memory, early)[0])
    return jax.lax.scan(rematerialised(clip, remat), memory, clips, unroll=unroll)[0]


def step(memory: TokenMemory, clip: Clips, read: Read, perceive: Perceive, write: Write) -> TokenMemory:
    """One clip (Clips without their first axis): the memory read, the frames perceived, and tokens appended."""
    valid = clip.valid
    features = jnp.where(valid[..., None, None], clip.features, 0)  # so that not even NaN there does any harm
    numbers = jnp.maximum(memory.length[:, None] + jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)
    queries = read(*memory.by_token)
    tokens, keys, values = write(perceive(queries, features, numbers, valid), numbers)
    places = jnp.where(valid, numbers, memory.capacity)  # beyond the end: dropped

    @jax.vmap
    def put(old, new, places):  # [..., R, N, ·]
        return old.at[..., places, :, :].set(new.astype(old.dtype), mode="drop")

    return TokenMemory(
        put(memory.tokens, tokens, places),
        put(memory.keys, keys, places),
        put(memory.values, values, places),
        memory.length + valid.sum(-1, dtype=jnp.int32),
    )


def _ending_together(clips: Clips) -> Clips:
    """Clips of which those without a valid frame at a row's end are before its first: all rows' last ones are last."""
    count, batch, _ = clips.valid.shape
    behind = jnp.argmax(clips.valid.any(-1)[::-1], axis=0)  # [B]
    order = (jnp.arange(count)[:, None] - behind) % count  # [C, B]
    rows = jnp.arange(batch)
    return Clips(clips.features[order, rows % clips.features.shape[1]], clips.valid[order, rows])


def select(
    memory: TokenMemory, q: jax.Array, *, num_candidates: int = 64, num_select: int = 8, num_neighbors: int = 5
) -> tuple[jax.Array, Selection]:
    """Each frame's relevance float32 [B, R] to an instruction, and the frames to look at in detail.

    q [B, H, S, D / H]: READ's projected queries of the instruction. What frames differ by is the mean of their tokens,
    of length 1. See frame_selection.
    """
    scores = relevance(q, memory.by_token[0], memory.valid)
    mean = memory.tokens.astype(jnp.float32).mean(2)
    length = jnp.sqrt(jnp.square(mean).sum(-1, keepdims=True))
    selection = select_frames(
        scores,
        mean / jnp.maximum(length, 1e-12),
        memory.valid,
        num_candidates=num_candidates,
        num_select=num_select,
        num_neighbors=num_neighbors,
    )
    return scores, selection


def pool(features: jax.Array, grid: tuple[int, int], count: int) -> jax.Array:
    """Detail tokens [..., count, W] of a frame's features [..., P, W], its patches being rows * columns of a grid.

    Adaptive average pooling to a grid of `count` cells shaped like this one (16 x 16 and 32: 8 x 4), row by row.
    """
    rows, columns = grid
    if features.shape[-2] != rows * columns:
        raise OptionError(f"{features.shape[-2]} features a frame are no grid of {rows} x {columns} patches.")
    down, across = cells(grid, count)
    square = features.reshape(*features.shape[:-2], rows, columns, -1).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    square = jnp.einsum("ar,...rcw->...acw", _averages(rows, down), square, precision=exact)
    square = jnp.einsum("bc,...acw->...abw", _averages(columns, across), square, precision=exact)
    return square.reshape(*square.shape[:-3], count, -1).astype(features.dtype)


def cells(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns, `count` cells in all, in the proportions nearest to the grid's; of two alike the taller one."""
    pairs = [(rows, count // rows) for rows in range(count, 0, -1) if count % rows == 0]
    return min(pairs, key=lambda pair: round(abs(math.log(pair[0] * grid[1] / (pair[1] * grid[0]))), 9))


@functools.cache
def _averages(size: int, count: int) -> np.ndarray:
    """float32 [count, size]: row i is the mean from floor(i size / count) to below ceil((i + 1) size / count)."""
    matrix = np.zeros((count, size), np.float32)
    for i in range(count):
        start, end = i * size // count, -(-(i + 1) * size // count)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
