"""Several questions about each of several videos, watched by AdaCM2 with no more work than the answers need.

What comes out is what begin, watch and answer give. A frame's features are shared by all questions of its video; what
does not hang on the question, such as what is kept at random, is watched once a video; and of all frames but the last
only what they leave in the cache is computed, unless queries are carried on.

Letters: V videos, A questions about each, B = V A rows, M = V or B rows of a memory, T frames, P tokens, C width.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from longvid_jax.memory import adacm2
from longvid_jax.memory.adacm2 import Ask, Policy, VideoCache, Window
from longvid_jax.models.instructblip import InstructBlip
from longvid_jax.ops.attention import Keys, attend
from longvid_jax.systems import adacm2_steps as steps
from longvid_jax.systems import text_steps
from longvid_jax.systems.adacm2 import AdaCM2Model

ENCODED, WINDOW = 64, 32  # frames at a time
BLIND = ("random", "recent")  # scores that no question changes


def encode(model: AdaCM2Model, frames: np.ndarray) -> np.ndarray:
    """Features [T, P, C] of a video's frames uint8 [T, H, W, 3], on the host."""
    size, parts = min(ENCODED, len(frames)), []
    for start in range(0, len(frames), size):
        now = frames[start : start + size]
        filled = np.pad(now, ((0, size - len(now)),) + ((0, 0),) * 3)
        settings = model.settings
        encoded = steps.encode_frames(model.model, filled[None], mean=settings.mean, std=settings.std)
        parts.append(np.asarray(encoded)[0, : len(now)])
    return np.concatenate(parts)


def outputs(
    model: InstructBlip,
    features: jax.Array,
    text: jax.Array,
    memory_text: jax.Array | None = None,
    *,
    policy: Policy,
    carry_queries: bool = False,
    random: jax.Array | None = None,
) -> jax.Array:
    """The queries' outputs [B, Q, width] after frames of features [V, T, P, C] for the instructions text [B, S].

    memory_text int32 [M, S]: what all frames but the last are watched with, None: text. No queries are carried where M
    is V. The rows of a video stand side by side.
    """
    if policy.keeps_all and not carry_queries:
        return look_at_all(model, features, text)
    memory_text = text if memory_text is None else memory_text
    if policy.scores in BLIND and not carry_queries:
        memory_text = memory_text[:: len(memory_text) // len(features)]
    length, tokens = features.shape[1:3]
    shares = zip(policy.alpha, policy.beta, strict=True)
    capacity = max(adacm2.largest(tokens, *pair, max(1, length - 1)) for pair in shares)
    config, rows = model.config.qformer, len(memory_text)
    cache = adacm2.empty(config.cross_layers, rows, capacity, config.width, model.query_tokens.dtype)
    queries = model.queries(rows)
    for start in range(-((1 - length) % WINDOW), length - 1, WINDOW):  # whole windows: those of all lengths are alike
        number = np.arange(start, start + WINDOW)
        window, how = features[:, np.maximum(number, 0)], {"policy": policy, "carry_queries": carry_queries}
        cache, queries = remember(model, cache, queries, window, number, memory_text, random, **how)
    return look(model, cache, queries, features[:, -1], np.int32(length - 1), text, policy=policy)


@partial(jax.jit, static_argnames=("policy", "carry_queries"), donate_argnames=("cache", "queries"))
def remember(
    model: InstructBlip,
    cache: VideoCache,
    queries: jax.Array,
    features: jax.Array,
    number: jax.Array,
    text: jax.Array,
    random: jax.Array | None,
    *,
    policy: Policy,
    carry_queries: bool,
) -> tuple[VideoCache, jax.Array]:
    """What M rows with the instructions text [M, S] hold after frames of features [V, T, P, C] with these numbers [T].

    And the queries [M, Q, width] that the next frame starts with. Frames with numbers below 0 leave nothing behind.
    """
    rows = text.shape[0]
    blind = policy.scores in BLIND and not carry_queries
    ask, learned = _glance(model) if blind else Ask(*model.asker(text)), model.queries(rows)

    def frame(state, xs):
        cache, queries = state
        now, number = xs
        cache, seen = adacm2.step(cache, queries, _window(model, now, number, rows), ask, policy, random=random)
        seen = ask.conclude(seen) if carry_queries else seen
        cache = dataclasses.replace(cache, length=jnp.where(number < 0, 0, cache.length))
        return (cache, jnp.where(number < 0, learned, seen) if carry_queries else queries), None

    return jax.lax.scan(frame, (cache, queries), (jnp.moveaxis(features, 1, 0), number))[0]


@partial(jax.jit, static_argnames=("policy",))
def look(
    model: InstructBlip,
    cache: VideoCache,
    queries: jax.Array,
    features: jax.Array,
    number: jax.Array,
    text: jax.Array,
    *,
    policy: Policy,
) -> jax.Array:
    """The outputs [B, Q, width] of a last frame of features [V, P, C] with this number, behind what M rows remember."""
    rows = text.shape[0]
    each = rows // queries.shape[0]
    cache = jax.tree.map(lambda x: jnp.repeat(x, each, axis=1), cache)
    window, ask = _window(model, features, number, rows), Ask(*model.asker(text))
    queries, scores = jnp.repeat(queries, each, axis=0), Policy(policy.alpha, policy.beta)
    return ask.conclude(adacm2.step(cache, queries, window, ask, scores)[1])  # what it evicts is of no account


@jax.jit
def look_at_all(model: InstructBlip, features: jax.Array, text: jax.Array) -> jax.Array:
    """The same where nothing is evicted or carried: the last frame's queries see all tokens of [V, T, P, C]."""
    videos, length = features.shape[:2]
    number = jnp.broadcast_to(jnp.arange(length), (videos, length))
    keys, values = model.qformer.keys_values(model.placed(features, number))  # [L, V, T, P, C]

    def look(index, q, carry):
        heads = q.shape[1]
        k, v = (rearrange(x[index], "v t p (h d) -> v h (t p) d", h=heads) for x in (keys, values))
        together = rearrange(q, "(v a) h q d -> v h (a q) d", v=videos)
        context = attend(together, Keys(k, v))
        return rearrange(context, "v h (a q) d -> (v a) h q d", q=q.shape[2]), carry

    ask = Ask(*model.asker(text))
    return ask.conclude(ask.look(model.queries(text.shape[0]), look, ())[0])


def answers(model: AdaCM2Model, seen: jax.Array, ids: np.ndarray, places: np.ndarray, max_new_tokens: int) -> list[str]:
    """What the decoder says, greedily, to prompts (ids and places [B, N]) with the queries' outputs [B, Q, width]."""
    decoder = model.model.text
    cache = text_steps.new_cache(decoder, batch=len(ids), capacity=ids.shape[1] + max_new_tokens)
    cache, logits = text_steps.read_prompt(decoder, cache, ids, places, steps.project(model.model, seen))
    out = text_steps.write_answer(
        decoder,
        cache,
        logits,
        (ids >= 0).sum(1),
        np.array(model.settings.stop_tokens or (-1,), np.int32),
        jax.random.key(0),
        None,
        np.float32(1.0),
        max_new_tokens=max_new_tokens,
        keep_logits=False,
    )
    tokens = [row[:count].tolist() for row, count in zip(np.asarray(out.tokens), np.asarray(out.count), strict=True)]
    return [text.strip() for text in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _window(model: InstructBlip, features: jax.Array, number: jax.Array, rows: int) -> Window:
    """One frame of features [V, P, C], for several rows a video."""
    videos = features.shape[0]
    keys, values = model.qformer.keys_values(model.placed(features, jnp.broadcast_to(number, videos)))
    keys, values = (jnp.repeat(x, rows // videos, axis=1) for x in (keys, values))
    return Window(keys, values, jnp.broadcast_to(number, rows).astype(jnp.int32), jnp.ones(rows, bool))


def _glance(model: InstructBlip) -> Ask:
    """Nobody asks anything: a single empty query looks, and what it sees is of no account."""

    def glance(queries, look, carry):
        nothing = jnp.zeros((queries.shape[0], 1, 1, queries.shape[2]), queries.dtype)
        for layer in range(model.config.qformer.cross_layers):
            _, carry = look(layer, nothing, carry)
        return queries, carry

    return Ask(glance, lambda seen: seen)
