"""ReTaKe's compiled steps on Qwen2-VL: pure functions of the model, a cache and arrays, each compiled once a shape."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longvid_jax import generate
from longvid_jax.memory import dpselect, pivotkv
from longvid_jax.memory.dpselect import Lookback
from longvid_jax.models.qwen2_vl import Qwen2VL
from longvid_jax.ops import kv_cache
from longvid_jax.ops.kv_cache import KVCache
from longvid_jax.ops.sharding import BATCH, constrain
from longvid_jax.systems.text_steps import constrain_cache, text_positions
from longvid_jax.video.preprocess import patchify


@dataclasses.dataclass(frozen=True)
class Static:
    """The choices of a method that a compiled step depends on; ratios, budgets and lengths are not among them."""

    compress: bool = False
    dpselect: str | None = None
    pivots: str = "mean"
    reforge: bool = False


@partial(jax.jit, static_argnames=("grid", "mean", "std"))
def encode_frames(model: Qwen2VL, pixels: jax.Array, *, grid: tuple[int, int], mean, std) -> jax.Array:
    """Features [B, T, N, D] of frames uint8 [B, 2T, H, W, 3]; grid is (rows, columns) of patches."""
    vision = model.config.vision
    patches = patchify(pixels, patch=vision.patch, temporal=vision.temporal, merge=vision.merge, mean=mean, std=std)
    return encode_patches(model, patches, grid=grid)


@partial(jax.jit, static_argnames=("grid",))
def encode_patches(model: Qwen2VL, patches: jax.Array, *, grid: tuple[int, int]) -> jax.Array:
    """Features [B, T, N, D] of patches [B, T, P, channels * temporal * patch^2]."""
    patches = constrain(patches, BATCH)
    features = model.vision(patches.reshape(-1, *patches.shape[2:]), grid)
    return constrain(features.reshape(*patches.shape[:2], *features.shape[1:]), BATCH)


class Marked(NamedTuple):
    """A chunk as DPSelect leaves it: features [B, T, N, D], peaks bool [B, T] or [B, T, N], a line for the trace."""

    lookback: Lookback
    features: jax.Array
    peak: jax.Array
    times: jax.Array  # float32 [B, T] seconds
    share: jax.Array  # float32 [B, T] of a temporal patch that is a peak
    change: jax.Array  # float32 [B, T] distance to the predecessor


@partial(jax.jit, static_argnames=("static", "width"))
def mark(
    lookback: Lookback,
    features: jax.Array,
    after: jax.Array,
    patches: jax.Array,
    has_after: jax.Array,
    times: jax.Array,
    count: jax.Array | None = None,
    *,
    static: Static,
    width: int | None = None,
) -> Marked:
    """Streaming DPSelect over features [B, T, N, D], `patches` [B] of them real, with `after` [B, N, D] behind them.

    With a width, the `count` [B] best temporal patches are let through, in a buffer of that width.
    """

    def one(lookback, features, after, patches, has_after, times, count):
        valid = jnp.arange(features.shape[0]) < patches
        per_patch = static.dpselect == "patch"
        lookback, distance, peak = dpselect.stream_keyframes(
            lookback, features, after, valid, has_after, per_patch=per_patch
        )
        if width is not None:
            kept = dpselect.choose(features, distance, peak, valid, count, width)
            features, peak, distance = kept.features, kept.is_peak, jnp.take_along_axis(distance, kept.indices, axis=0)
            times = times[kept.indices]
        line = [x.astype(jnp.float32).reshape(x.shape[0], -1).mean(-1) for x in (times, peak, distance)]
        return Marked(lookback, features, peak, *line)

    return jax.vmap(one)(lookback, features, after, patches, has_after, times, count)


@partial(jax.jit, static_argnames=("grid", "static"), donate_argnames=("cache",))
def read_chunk(
    model: Qwen2VL,
    cache: KVCache,
    features: jax.Array,
    peak: jax.Array | None,
    patches: jax.Array,
    start: jax.Array,
    time: jax.Array,
    count: jax.Array,
    prompt: jax.Array | None,
    random: jax.Array | None = None,
    *,
    grid: tuple[int, int],
    static: Static,
) -> KVCache:
    """The decoder reads a chunk of video and stores the `count` [B] tokens of it that PivotKV keeps.

    features [B, T, N, D] of which `patches` [B] temporal patches are real; peak bool [B, T] or [B, T, N]; the chunk's
    first patch stands at position start + time (both [B]). grid is (rows, columns) of tokens, N = rows * columns.
    prompt int32 [B, S] (-1: none) are the tokens that score where compression is guided by the prompt; they are not
    stored. random is a key where tokens are drawn instead of scored.
    """
    batch, length, tokens, width = features.shape
    chunk = length * tokens
    valid = jnp.repeat(jnp.arange(length) < patches[:, None], tokens, axis=1)
    where = jnp.stack(jnp.meshgrid(jnp.arange(length), *map(jnp.arange, grid), indexing="ij"), axis=-1)
    first = jnp.stack([start + time, start, start], axis=-1)
    positions = where.reshape(1, chunk, 3) + first[:, None]
    x, all_valid, query_valid = features.reshape(batch, chunk, width), valid, None
    if prompt is not None:
        query_valid = prompt >= 0
        behind = jnp.maximum(start + time + patches, start + max(grid))
        positions = jnp.concatenate([positions, text_positions(model.text, behind, prompt.shape[1])], axis=1)
        x = jnp.concatenate([x, model.text.embed(jnp.maximum(prompt, 0)).astype(x.dtype)], axis=1)
        all_valid = jnp.concatenate([valid, query_valid], axis=1)
    select = None
    if static.compress:
        pivot = None
        if static.dpselect:
            pivot = peak.reshape(batch, chunk) if peak.ndim == 3 else jnp.repeat(peak, tokens, axis=1)
        select = pivotkv.compress(
            count, valid, pivot, pivots=static.pivots, reforged=static.reforge, query_valid=query_valid, random=random
        )
    x = constrain(x, BATCH)
    _, cache = model.text(x, positions, all_valid, cache, follow="time" if static.reforge else None, select=select)
    return constrain_cache(kv_cache.advance(cache, count, chunk))


@partial(jax.jit, static_argnames=("static",), donate_argnames=("cache",))
def read_text(
    model: Qwen2VL, cache: KVCache, ids: jax.Array, start: jax.Array, *, static: Static
) -> tuple[KVCache, jax.Array]:
    """The decoder reads text ids int32 [B, N] (-1: padding behind it) at positions from start [B] on and stores all.

    Returns the logits float32 [B, V] that follow each row's last token.
    """
    valid = ids >= 0
    x = constrain(model.text.embed(jnp.maximum(ids, 0)), BATCH)
    positions = text_positions(model.text, start, ids.shape[1])
    hidden, cache = model.text(x, positions, valid, cache, follow="time" if static.reforge else None)
    count = valid.sum(-1, dtype=jnp.int32)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return constrain_cache(kv_cache.advance(cache, count, ids.shape[1])), model.text.logits(last)


@partial(jax.jit, static_argnames=("static", "max_new_tokens", "keep_logits"), donate_argnames=("cache",))
def write_answer(
    model: Qwen2VL,
    cache: KVCache,
    logits: jax.Array,
    start: jax.Array,
    stop_tokens: jax.Array,
    key: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array,
    *,
    static: Static,
    max_new_tokens: int,
    keep_logits: bool,
) -> generate.Generated:
    """Decodes behind a prompt whose next-token logits [B, V] are given; its first new token stands at start [B]."""

    def step(state, tokens):
        cache, at = state
        x = model.text.embed(tokens[:, None])
        valid = jnp.ones((tokens.shape[0], 1), bool)
        hidden, cache = model.text(
            x, text_positions(model.text, at, 1), valid, cache, follow="all" if static.reforge else None
        )
        cache = kv_cache.advance(cache, jnp.ones_like(at), 1)
        return (cache, at + 1), model.text.logits(hidden[:, 0])

    out = generate.decode(
        step,
        (cache, start),
        logits,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        key=key,
        temperature=temperature,
        top_p=top_p,
        keep_logits=keep_logits,
    )
    return out._replace(state=out.state[0])


@partial(jax.jit, static_argnames=("capacity",))
def grow_cache(cache: KVCache, *, capacity: int) -> KVCache:
    """The cache in the next bucket."""
    return constrain_cache(kv_cache.grow(cache, capacity))
