"""Decoding as one compiled loop over a static cache: greedy, sampled or with beams; it ends early for a whole batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longvid_jax.models.llama import Decoder
from longvid_jax.ops import kv_cache


class Generated(NamedTuple):
    """New tokens of a batch; row b's first `count[b]` are real, the stop token (if one came) among them."""

    tokens: jax.Array  # int32 [B, M], padded with 0
    count: jax.Array  # int32 [B]
    logits: jax.Array | None  # float32 [B, M, V], where asked for
    state: Any  # as step left it


class _Loop(NamedTuple):
    index: jax.Array  # how many tokens every row has
    tokens: jax.Array
    logits: jax.Array | None
    done: jax.Array
    count: jax.Array
    key: jax.Array
    state: Any


def decode(
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array]],
    state: Any,
    logits: jax.Array,
    *,
    max_new_tokens: int,
    stop_tokens: jax.Array,
    key: jax.Array,
    temperature: jax.Array | None = None,
    top_p: jax.Array | float = 1.0,
    keep_logits: bool = False,
) -> Generated:
    """Generates up to max_new_tokens after a prompt whose next-token logits [B, V] are given.

    step(state, tokens int32 [B]) feeds one token a row and returns the state and the next logits. A row ends with any
    of stop_tokens int32 [K]; the loop ends when all have. temperature None is greedy; otherwise tokens are drawn from
    the smallest set of most likely ones whose probability reaches top_p.
    """
    batch = logits.shape[0]

    def take(loop: _Loop, logits: jax.Array) -> _Loop:
        key, now = jax.random.split(loop.key)
        token = jnp.argmax(logits, axis=-1) if temperature is None else sample(now, logits, temperature, top_p)
        token = jnp.where(loop.done, 0, token).astype(jnp.int32)
        return loop._replace(
            index=loop.index + 1,
            tokens=loop.tokens.at[:, loop.index].set(token),
            logits=loop.logits.at[:, loop.index].set(logits) if keep_logits else None,
            count=loop.count + ~loop.done,
            done=loop.done | jnp.isin(token, stop_tokens),
            key=key,
        )

    def body(loop: _Loop) -> _Loop:
        state, logits = step(loop.state, loop.tokens[:, loop.index - 1])
        return take(loop._replace(state=state), logits)

    loop = _Loop(
        index=jnp.int32(0),
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        logits=jnp.zeros((batch, max_new_tokens, logits.shape[-1]), jnp.float32) if keep_logits else None,
        done=jnp.zeros((batch,), bool),
        count=jnp.zeros((batch,), jnp.int32),
        key=key,
        state=state,
    )
    loop = take(loop, logits)
    loop = jax.lax.while_loop(lambda loop: (loop.index < max_new_tokens) & ~loop.done.all(), body, loop)
    return Generated(loop.tokens, loop.count, loop.logits, loop.state)


def sample(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """One token int32 [B] a row of logits [B, V], from the nucleus of probability top_p at a temperature."""
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)  # the most likely token always has nothing before it
    choice = jax.random.categorical(key, ranked, axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


class Beams(NamedTuple):
    """What a beam search found: the best answer of each row, and the best G, the best first."""

    tokens: jax.Array  # int32 [B, M], padded with 0: the best one, its stop token (if one came) among them
    count: jax.Array  # int32 [B]
    beams: jax.Array  # int32 [B, G, M]
    counts: jax.Array  # int32 [B, G]
    scores: jax.Array  # float32 [B, G]: log probability over length ** length_penalty
    state: Any  # as step left it


class _Hypotheses(NamedTuple):
    tokens: jax.Array  # int32 [B, G, M]
    count: jax.Array  # int32 [B, G]
    score: jax.Array  # float32 [B, G]
    real: jax.Array  # bool [B, G]: the others only hold a place

    def chosen(self, index: jax.Array) -> "_Hypotheses":
        """Those of the indices [B, N] of their row."""
        return jax.tree.map(lambda x: _of_rows(x, index), self)


class _Search(NamedTuple):
    index: jax.Array  # how many tokens every running beam has
    tokens: jax.Array  # int32 [B, G, M], of the running beams, the likeliest first
    score: jax.Array  # float32 [B, G], their log probability
    origin: jax.Array  # int32 [B, G], the beam that each was one token ago
    ended: _Hypotheses
    open: jax.Array  # bool [B]: whether better ones may come
    state: Any


def beam_search(
    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]],
    state: Any,
    logits: jax.Array,
    *,
    beams: int,
    max_new_tokens: int,
    stop_tokens: jax.Array,
    min_new_tokens: jax.Array | int = 0,
    length_penalty: jax.Array | float = 1.0,
) -> Beams:
    """The likeliest answers after a prompt whose next-token logits [B, V] are given, as transformers searches them.

    step(state, tokens int32 [B, G], origin int32 [B, G]) moves each beam's past to that of the beam `origin` of its
    row, feeds one token a beam and returns the state and the next logits [B, G, V]. Answers end with any of stop_tokens
    int32 [N], though not before min_new_tokens, or after max_new_tokens, and are ranked by their log probability over
    their length ** length_penalty. A row is done when it has `beams` answers and its likeliest running beam, were it to
    end at once, would not beat the worst of them (early_stopping=False there); the loop ends when all are. One beam is
    greedy decoding.
    """
    batch, vocabulary = logits.shape
    stops = jnp.isin(jnp.arange(vocabulary), stop_tokens)
    width = beams * (1 + max(1, stop_tokens.shape[0]))  # so many that `beams` of them do not stop

    def take(search: _Search, logits: jax.Array) -> _Search:
        index = search.index
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        log_p = jnp.where(stops & (index < min_new_tokens), -jnp.inf, log_p) + search.score[..., None]
        score, flat = jax.lax.top_k(log_p.reshape(batch, -1), width)
        origin, token = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
        tokens = _of_rows(search.tokens, origin).at[:, :, index].set(token)
        ends = jnp.isin(token, stop_tokens) | (index + 1 == max_new_tokens)

        running, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, score), beams)
        length = (index + 1).astype(jnp.float32) ** length_penalty
        # Of those that end only the ones among the best count: the others are there to go on in their place.
        real = ends & (jnp.arange(width) < beams) & search.open[:, None]
        new = _Hypotheses(tokens, jnp.full_like(token, index + 1), jnp.where(real, score / length, -jnp.inf), real)
        ended = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), search.ended, new)
        ended = ended.chosen(jax.lax.top_k(ended.score, beams)[1])
        beaten = ended.real.all(1) & ((running[:, 0] / length <= ended.score[:, -1]) | (beams == 1))
        return search._replace(
            index=index + 1,
            tokens=_of_rows(tokens, kept),
            score=running,
            origin=_of_rows(origin, kept),
            ended=ended,
            open=search.open & ~beaten,
        )

    def body(search: _Search) -> _Search:
        state, logits = step(search.state, search.tokens[:, :, search.index - 1], search.origin)
        return take(search._replace(state=state), logits)

    tokens = jnp.zeros((batch, beams, max_new_tokens), jnp.int32)
    search = _Search(
        index=jnp.int32(0),
        tokens=tokens,
        # All beams of a row begin alike, so that only the first may.
        score=jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (batch, beams)),
        origin=jnp.zeros((batch, beams), jnp.int32),
        ended=_Hypotheses(
            tokens,
            count=jnp.zeros((batch, beams), jnp.int32),
            score=jnp.full((batch, beams), -jnp.inf),
            real=jnp.zeros((batch, beams), bool),
        ),
        open=jnp.ones((batch,), bool),
        state=state,
    )
    search = take(search, jnp.broadcast_to(logits[:, None], (batch, beams, vocabulary)))
    search = jax.lax.while_loop(lambda search: (search.index < max_new_tokens) & search.open.any(), body, search)
    best, counts, scores, _ = search.ended
    return Beams(best[:, 0], counts[:, 0], best, counts, scores, search.state)


def decoder_beams(
    decoder: Decoder,
    cache: kv_cache.KVCache,
    start: jax.Array,
    logits: jax.Array,
    *,
    beams: int,
    max_new_tokens: int,
    follow: str | None = None,
    **options,
) -> Beams:
    """Beam search by a decoder behind a cache that holds the prompt, whose next-token logits [B, V] are given.

    The beams of a row share the cache, which is neither copied nor needs room for what comes. New tokens stand at
    start int32 [B] and behind, the same on all position axes; `follow` as in ops.kv_cache.attention, further options as
    in beam_search. The state is the BeamCache and where the next token would stand.
    """

    def step(state, tokens, origin):
        cache, at = state
        cache = kv_cache.descend(cache, origin)
        positions = jnp.broadcast_to(at[:, None, None], (*tokens.shape, decoder.config.rope.axes))
        valid = jnp.ones(tokens.shape, bool)
        hidden, cache = decoder(decoder.embed(tokens), positions, valid, cache, follow=follow)
        return (kv_cache.advance_beams(cache), at + 1), decoder.logits(hidden)

    state = (kv_cache.with_beams(cache, beams, max_new_tokens), start.astype(jnp.int32))
    return beam_search(step, state, logits, beams=beams, max_new_tokens=max_new_tokens, **options)


def _of_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b]] for every row b: [B, N, ...] of x [B, G, ...] and index int [B, N]."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
