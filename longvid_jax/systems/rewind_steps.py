"""The compiled steps of ReWind: encode a window of frames, take it into the memory, look back, and tell the decoder."""

from functools import partial

import jax
import jax.numpy as jnp

from longvid_jax.memory import rewind
from longvid_jax.memory.frame_selection import Selection
from longvid_jax.memory.rewind import TokenMemory
from longvid_jax.models.perceiver import Instruction
from longvid_jax.models.rewind import Rewind
from longvid_jax.ops.sharding import BATCH, constrain
from longvid_jax.video.preprocess import normalise

DETAIL = jnp.bfloat16  # of features that are kept to look back at


@partial(jax.jit, static_argnames=("mean", "std"))
def encode_frames(model: Rewind, pixels: jax.Array, *, mean, std) -> tuple[jax.Array, jax.Array]:
    """Features [B, T, P, W] of frames uint8 [B, T, H, W', 3], and their detail tokens [B, T, m, W]."""
    return _encode(model, normalise(pixels, mean, std))


@jax.jit
def encode_pixels(model: Rewind, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same of normalised frames [B, T, H, W', 3]."""
    return _encode(model, pixels)


def _encode(model: Rewind, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    patch = model.config.vision.patch
    grid = pixels.shape[2] // patch, pixels.shape[3] // patch
    features = constrain(model.features(constrain(pixels, BATCH)), BATCH)
    return features, constrain(rewind.pool(features, grid, model.config.detail_tokens).astype(DETAIL), BATCH)


@partial(jax.jit, static_argnames=("clip_frames",), donate_argnames=("memory", "details"))
def watch_window(
    model: Rewind,
    memory: TokenMemory,
    details: jax.Array | None,
    features: jax.Array,
    fresh: jax.Array,
    start: jax.Array,
    valid: jax.Array,
    text: jax.Array,
    *,
    clip_frames: int,
) -> tuple[TokenMemory, jax.Array | None]:
    """The memory, and the detail tokens kept (None: nowhere on the device), after frames of features [B or 1, T, P, W].

    fresh [B or 1, T, m, W]: their detail tokens; start int32 []: of the window's first frame; valid bool [B, T]: a
    prefix of each row; text int32 [B, S]: the instructions, -1 behind their end.
    """
    clips = rewind.in_clips(features, valid, clip_frames)
    cycle = model.cycle(_instruction(model, text))
    memory = _constrain(rewind.watch(_constrain(memory), clips, *cycle))
    if details is not None:
        details = constrain(jax.lax.dynamic_update_slice_in_dim(details, fresh, start, axis=1), BATCH)
    return memory, details


@partial(jax.jit, static_argnames=("num_candidates", "num_select", "num_neighbors"))
def look_back(
    model: Rewind, memory: TokenMemory, text: jax.Array, *, num_candidates: int, num_select: int, num_neighbors: int
) -> tuple[jax.Array, Selection]:
    """Each frame's relevance float32 [B, R] to the instructions int32 [B, S], and the frames to look at in detail."""
    asked = model.asked(_instruction(model, text))
    return rewind.select(
        memory, asked, num_candidates=num_candidates, num_select=num_select, num_neighbors=num_neighbors
    )


@jax.jit
def gather(details: jax.Array, indices: jax.Array) -> jax.Array:
    """Detail tokens [B, K, m, W] of frames int32 [B, K] of details [B or 1, R, m, W]."""
    if details.shape[0] != indices.shape[0]:
        return details[0][indices]
    return jnp.take_along_axis(details, indices[..., None, None], axis=1)


@jax.jit
def tell(model: Rewind, memory: TokenMemory, details: jax.Array) -> jax.Array:
    """Vectors [B, R n + 1 + K m, width] for the decoder: all of memory, the separator, and detail [B, K, m, W]."""
    everywhere = jnp.ones(details.shape[:2], bool)
    return constrain(model.told(memory.tokens, memory.valid, details, everywhere)[0], BATCH)


@partial(jax.jit, static_argnames=("batch", "capacity"))
def new_memory(model: Rewind, *, batch: int, capacity: int) -> TokenMemory:
    """A memory in which nothing is written."""
    config = model.config.perceiver
    sizes = config.num_write, config.width, config.heads
    return _constrain(rewind.empty(batch, capacity, *sizes, model.separator.dtype))


@partial(jax.jit, static_argnames=("rows", "capacity"))
def new_details(model: Rewind, *, rows: int, capacity: int) -> jax.Array:
    """Room for the detail tokens of frames."""
    return constrain(jnp.zeros((rows, capacity, model.config.detail_tokens, model.config.vision.width), DETAIL), BATCH)


@partial(jax.jit, static_argnames=("capacity",))
def grow(memory: TokenMemory, details: jax.Array | None, *, capacity: int) -> tuple[TokenMemory, jax.Array | None]:
    """Both with more room."""
    if details is not None:
        details = jnp.pad(details, [(0, 0), (0, capacity - details.shape[1]), (0, 0), (0, 0)])
    return _constrain(rewind.grow(memory, capacity)), details


def _instruction(model: Rewind, text: jax.Array) -> Instruction:
    return model.instruct(jnp.maximum(text, 0), text >= 0)


def _constrain(memory: TokenMemory) -> TokenMemory:
    """Rows of the batch on (data, fsdp); what READ's heads look at on tensor, as its projections are."""
    keys, values = (constrain(x, BATCH, "tensor") for x in (memory.keys, memory.values))
    return TokenMemory(constrain(memory.tokens, BATCH), keys, values, constrain(memory.length, BATCH))
