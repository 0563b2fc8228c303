"""The compiled steps of AdaCM2: encode a window of frames, and take it into the memory."""

from functools import partial

import jax
import jax.numpy as jnp

from longvid_jax.memory import adacm2
from longvid_jax.memory.adacm2 import Ask, Policy, VideoCache, Window
from longvid_jax.models.instructblip import InstructBlip
from longvid_jax.ops.sharding import BATCH, constrain
from longvid_jax.video.preprocess import normalise


@partial(jax.jit, static_argnames=("mean", "std"))
def encode_frames(model: InstructBlip, pixels: jax.Array, *, mean, std) -> jax.Array:
    """Features [B, T, P, C] of frames uint8 [B, T, H, W, 3]."""
    return encode_pixels(model, normalise(pixels, mean, std))


@jax.jit
def encode_pixels(model: InstructBlip, pixels: jax.Array) -> jax.Array:
    """Features [B, T, P, C] of normalised frames [B, T, H, W, 3]."""
    features = model.vision(constrain(pixels, BATCH).reshape(-1, *pixels.shape[2:]))
    return constrain(features.reshape(*pixels.shape[:2], *features.shape[1:]), BATCH)


def window(model: InstructBlip, features: jax.Array, number: jax.Array, valid: jax.Array) -> Window:
    """Frames of features [B or 1, T, P, C] as AdaCM2's memory takes them in; number, valid [B, T].

    One row of features is what all rows of a batch, which ask different questions, look at.
    """
    rows = number.shape[0]
    placed = model.placed(features, number[: features.shape[0]])
    keys, values = model.qformer.keys_values(placed)  # [L, B, T, P, C]

    def by_frame(x):
        x = jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:])) if x.shape[1] != rows else x
        return jnp.moveaxis(x, 2, 0)

    return Window(by_frame(keys), by_frame(values), number.T, valid.T)


@partial(jax.jit, static_argnames=("policy", "carry_queries"), donate_argnames=("cache", "outputs"))
def watch_window(
    model: InstructBlip,
    cache: VideoCache,
    outputs: jax.Array,
    features: jax.Array,
    start: jax.Array,
    valid: jax.Array,
    text: jax.Array | None,
    random: jax.Array | None,
    *,
    policy: Policy,
    carry_queries: bool,
) -> tuple[VideoCache, jax.Array]:
    """The cache and the last frame's outputs [B, Q, width] after frames of features [B or 1, T, P, C].

    start int32 [B]: the number of the window's first frame; valid bool [B, T]: a prefix of each row.
    """
    number = (start[:, None] + jnp.arange(valid.shape[1])).astype(jnp.int32)
    return adacm2.watch(
        _constrain_cache(cache),
        outputs,
        window(model, features, number, valid),
        Ask(*model.asker(text)),
        model.queries(valid.shape[0]),
        policy,
        carry_queries=carry_queries,
        remat=False,
        random=random,
    )


@partial(jax.jit, static_argnames=("batch", "capacity"))
def new_memory(model: InstructBlip, *, batch: int, capacity: int) -> tuple[VideoCache, jax.Array]:
    """A cache that has seen nothing, and outputs of nothing."""
    config, dtype = model.config, model.query_tokens.dtype
    cache = adacm2.empty(config.qformer.cross_layers, batch, capacity, config.qformer.width, dtype)
    return _constrain_cache(cache), jnp.zeros((batch, config.num_queries, config.qformer.width), dtype)


@partial(jax.jit, static_argnames=("capacity",))
def grow_cache(cache: VideoCache, *, capacity: int) -> VideoCache:
    """The cache with more room."""
    return _constrain_cache(adacm2.grow(cache, capacity))


@jax.jit
def project(model: InstructBlip, outputs: jax.Array) -> jax.Array:
    """Vectors [B, Q, width] for the decoder."""
    return model.projection(outputs)


def _constrain_cache(cache: VideoCache) -> VideoCache:
    """Rows of the batch on (data, fsdp)."""
    return jax.tree.map(lambda x: constrain(x, None, BATCH), cache)
