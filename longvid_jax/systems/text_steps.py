"""Compiled steps that every system's decoder takes: it reads a prompt, and writes an answer behind it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from longvid_jax import generate
from longvid_jax.models.llama import Decoder
from longvid_jax.ops import kv_cache
from longvid_jax.ops.kv_cache import KVCache
from longvid_jax.ops.sharding import BATCH, constrain


def text_positions(decoder: Decoder, start: jax.Array, length: int) -> jax.Array:
    """Positions int32 [B, length, A] of text that begins at start [B]: the same on all axes."""
    at = (start[:, None] + jnp.arange(length))[..., None]
    return jnp.broadcast_to(at, (start.shape[0], length, decoder.config.rope.axes)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("batch", "capacity"))
def new_cache(decoder: Decoder, *, batch: int, capacity: int) -> KVCache:
    """An empty cache, born sharded."""
    return constrain_cache(decoder.empty_cache(batch, capacity))


def constrain_cache(cache: KVCache) -> KVCache:
    """Rows of the batch on (data, fsdp), kv heads on tensor."""

    def heads(x):
        return constrain(x, *[None] * (x.ndim - 4), BATCH, "tensor")

    def rows(x):
        return constrain(x, *[None] * (x.ndim - 3), BATCH)

    return dataclasses.replace(
        cache,
        keys=jax.tree.map(heads, cache.keys),
        values=jax.tree.map(heads, cache.values),
        positions=jax.tree.map(rows, cache.positions),
        source=jax.tree.map(rows, cache.source),
    )


@partial(jax.jit, donate_argnames=("cache",))
def read_prompt(
    decoder: Decoder, cache: KVCache, ids: jax.Array, places: jax.Array, vectors: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Reads a prompt of words and vectors into an empty cache; and the logits float32 [B, V] that follow it.

    ids int32 [B, N] (-1: padding behind it); places int32 [B, N]: which of vectors [B, Q, width] stands here in place
    of a word, -1 for none.
    """
    valid = ids >= 0
    x = decoder.embed(jnp.maximum(ids, 0))
    seen = jnp.take_along_axis(vectors.astype(x.dtype), jnp.maximum(places, 0)[..., None], axis=1)
    x = constrain(jnp.where(places[..., None] >= 0, seen, x), BATCH)
    positions = text_positions(decoder, jnp.zeros(ids.shape[0], jnp.int32), ids.shape[1])
    hidden, cache = decoder(x, positions, valid, cache)
    count = valid.sum(-1, dtype=jnp.int32)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return constrain_cache(kv_cache.advance(cache, count, ids.shape[1])), decoder.logits(last)


@partial(jax.jit, static_argnames=("max_new_tokens", "keep_logits"), donate_argnames=("cache",))
def write_answer(
    decoder: Decoder,
    cache: KVCache,
    logits: jax.Array,
    start: jax.Array,
    stop_tokens: jax.Array,
    key: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array,
    *,
    max_new_tokens: int,
    keep_logits: bool,
) -> generate.Generated:
    """Decodes behind a prompt whose next-token logits [B, V] are given; its first new token stands at start [B].

    The state is the cache, which is consumed: given back, it is updated in place.
    """

    def step(state, tokens):
        cache, at = state
        valid = jnp.ones((tokens.shape[0], 1), bool)
        hidden, cache = decoder(decoder.embed(tokens[:, None]), text_positions(decoder, at, 1), valid, cache)
        return (kv_cache.advance(cache, jnp.ones_like(at), 1), at + 1), decoder.logits(hidden[:, 0])

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


@partial(jax.jit, static_argnames=("beams", "max_new_tokens"))
def search_answer(
    decoder: Decoder,
    cache: KVCache,
    logits: jax.Array,
    start: jax.Array,
    stop_tokens: jax.Array,
    min_new_tokens: jax.Array,
    length_penalty: jax.Array,
    *,
    beams: int,
    max_new_tokens: int,
) -> generate.Beams:
    """The same by beam search (generate.beam_search); the cache stays."""
    out = generate.decoder_beams(
        decoder,
        cache,
        start,
        logits,
        beams=beams,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        min_new_tokens=min_new_tokens,
        length_penalty=length_penalty,
    )
    return out._replace(state=None)
