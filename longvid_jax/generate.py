"""Decoding as one compiled loop over a static cache: greedy or sampled, with an early exit for the whole batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
