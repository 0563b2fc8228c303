"""AdaCM2's video cache (arXiv 2411.12593, algorithm 1): bounded by evicting what the query does not attend to.

Each cross-attention layer of a Q-Former remembers keys and values of visual tokens. A new frame's are appended, its
queries attend to all of them, and then of the older part of the cache only what they attended to most stays.

Letters: L cross-attention layers, B batch, P tokens of a frame, R capacity of the cache, S = R + P, C width, Q queries.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from longvid_jax.errors import OptionError
from longvid_jax.ops.attention import Keys, attend, attend_counted
from longvid_jax.ops.topk import best, compact

SCORES = ("attention", "shared", "random", "recent")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VideoCache:
    """What the cross-attention layers remember, oldest first; the first `length` entries of R are real."""

    keys: jax.Array  # [L, B, R, C]
    values: jax.Array  # [L, B, R, C]
    source: jax.Array  # int32 [L, B, R]: which token of the video it is, frame * P + place; -1: none
    length: jax.Array  # int32 [L, B]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What stays, for each cross-attention layer: static.

    alpha, beta: share that is recent, and share of the older part that stays, each in (0, 1].
    scores: by what the older part is chosen: "attention", "shared" (attention summed over layers: one index set for
        all), or, to compare with, "random" or "recent".
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    scores: str = "attention"

    @property
    def evicts(self) -> bool:
        """Whether anything is ever dropped in every layer, so that the cache is bounded."""
        return all(ratio(a, b) < 1 for a, b in zip(self.alpha, self.beta, strict=True))

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped in any layer."""
        return not any(ratio(a, b) < 1 for a, b in zip(self.alpha, self.beta, strict=True))


def ratio(alpha: float, beta: float) -> float:
    """r = alpha + (1 - alpha) beta: the share of a cache that stays (below eq. 8)."""
    return alpha + (1 - alpha) * beta


def bound(tokens: int, alpha: float, beta: float, frames: int | None = None) -> float:
    """Eq. 8: P r (1 - r^T) / (1 - r) tokens in a layer's cache after T frames of P tokens; None: of any number.

    Of real numbers. Rounding a cache of n >= P tokens makes the recent part larger by e <= max(1/2, 1 - alpha P), of
    which a share 1 - beta would else have gone, and the older part by at most 1: so it adds no more than
    (1 + (1 - beta) max(1/2, 1 - alpha P)) / (1 - r) in all.
    """
    r = ratio(alpha, beta)
    if r == 1:
        return math.inf if frames is None else float(tokens * frames)
    return tokens * r * (1.0 if frames is None else 1 - r**frames) / (1 - r)


@functools.cache
def counts(alpha: float, beta: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [size + 1] each: of 0, 1, ..., size tokens, how many are recent, and how many of the older ones stay."""
    recent, kept = np.array([_staying(n, alpha, beta) for n in range(size + 1)], np.int32).T
    return recent, kept


def _staying(length: int, alpha: float, beta: float) -> tuple[int, int]:
    """Of so many tokens, how many are recent, and how many of the older stay: at least one, if there are any."""
    recent = min(length, max(1, math.floor(alpha * length + 0.5)))
    older = length - recent
    return recent, max(1, math.ceil(beta * older - 1e-9)) if older else 0


@functools.cache
def largest(tokens: int, alpha: float, beta: float, frames: int | None = None) -> int:
    """The most tokens that a layer's cache of frames of P tokens holds once reduced; OptionError if it has no end."""
    if frames is None and ratio(alpha, beta) == 1:
        raise OptionError("alpha or beta of 1 keeps everything, so the cache has no bound; give the number of frames.")
    if frames is None:
        # One token more makes what stays larger by one or not at all. So caches grow to the least length that a further
        # frame does not make longer, and all beyond it would shrink.
        enough = range(math.ceil(bound(tokens, alpha, beta) + 2 / (1 - ratio(alpha, beta))) + 1)
        return bisect.bisect_left(enough, True, key=lambda n: sum(_staying(n + tokens, alpha, beta)) <= n)
    length = 0
    for _ in range(frames):
        before, length = length, sum(_staying(length + tokens, alpha, beta))
        if length == before:
            break
    return length


class Reduced(NamedTuple):
    """A cache after eviction: survivors in time order, left-aligned; see reduce."""

    keys: jax.Array  # [B, R, C]
    values: jax.Array  # [B, R, C]
    valid: jax.Array  # bool [B, R]
    kept: jax.Array  # int32 [B, R] into S, -1 where there is none


def reduce(
    keys: jax.Array,
    values: jax.Array,
    attention: jax.Array,
    valid: jax.Array,
    *,
    alpha: float,
    beta: float,
    capacity: int,
) -> Reduced:
    """Lines 5 to 8 of algorithm 1 for one layer: keys, values [B, S, C] of which valid [B, S] are real, in time order.

    attention [B, H, Q, S]: the cross-attention's probabilities, summed over heads and queries (eq. 5). Of L valid
    tokens the newest max(1, floor(alpha L + 1/2)) stay (eq. 6), and of the n older ones the ceil(beta n) (at least 1)
    that draw the most attention (eq. 7), ties to the earlier. Raises OptionError where `capacity` may be too small.
    """
    importance = attention.astype(jnp.float32).sum((1, 2))
    recent, older = counts(_share("alpha", alpha), _share("beta", beta), keys.shape[1])
    if capacity < (most := int((recent + older).max())):
        raise OptionError(
            f"capacity is {capacity}, but of {keys.shape[1]} tokens {most} stay with alpha {alpha} and beta {beta}."
        )
    mask = survivors(importance, valid, jnp.asarray(recent), jnp.asarray(older))
    indices, real = _left(mask, capacity)
    taken = (jnp.take_along_axis(x, indices[..., None], axis=1) for x in (keys, values))
    return Reduced(*taken, real, jnp.where(real, indices, -1))


def survivors(importance: jax.Array, valid: jax.Array, recent: jax.Array, older: jax.Array) -> jax.Array:
    """Which of the tokens [..., S] stay: bool. recent, older: the tables of `counts`, [S + 1] or one for each row."""
    length = valid.sum(-1, dtype=jnp.int32)
    if recent.ndim == 1:
        few, many = recent[length], older[length]
    else:  # [L, S + 1] for rows [L, B]
        few, many = (jnp.take_along_axis(table, length, axis=1) for table in (recent, older))
    place = jnp.cumsum(valid, axis=-1) - 1
    is_older = valid & (place < (length - few)[..., None])
    lowest = jnp.finfo(jnp.float32).min
    score = jnp.where(is_older, jnp.maximum(importance, lowest), -jnp.inf)
    return (is_older & best(score, count=many)) | (valid & ~is_older)


def _left(mask: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Indices int32 [..., capacity] of the True entries of mask [..., S], in order, and which of them are real."""
    indices = compact(mask, capacity)
    real = jnp.arange(indices.shape[-1]) < mask.sum(-1, keepdims=True)
    short = capacity - indices.shape[-1]
    if short > 0:  # more room than there are tokens
        padding = [(0, 0)] * (mask.ndim - 1) + [(0, short)]
        indices, real = jnp.pad(indices, padding), jnp.pad(real, padding)
    return indices, real


def _share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise OptionError(f"{name} is {value}, but must be above 0 and at most 1.")
    return float(value)


def empty(layers: int, batch: int, capacity: int, width: int, dtype) -> VideoCache:
    """A cache that has seen nothing."""
    return VideoCache(
        keys=jnp.zeros((layers, batch, capacity, width), dtype),
        values=jnp.zeros((layers, batch, capacity, width), dtype),
        source=jnp.full((layers, batch, capacity), -1, jnp.int32),
        length=jnp.zeros((layers, batch), jnp.int32),
    )


def grow(cache: VideoCache, capacity: int) -> VideoCache:
    """The same with room for `capacity` tokens."""
    extra = capacity - cache.capacity

    def pad(x, fill=0):
        return jnp.pad(x, [(0, 0), (0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)

    return VideoCache(pad(cache.keys), pad(cache.values), pad(cache.source, -1), cache.length)


class Window(NamedTuple):
    """Frames that are watched one after the other: T of them."""

    keys: jax.Array  # [T, L, B, P, C], of every cross-attention layer
    values: jax.Array
    number: jax.Array  # int32 [T, B]: of the frame in its video
    valid: jax.Array  # bool [T, B]


class Ask(NamedTuple):
    """A Q-Former in two parts: what a frame leaves in the cache needs the first one only.

    look(queries [B, Q, C], look, carry) -> (seen, carry): its cross-attention layers call look(layer, q [B, H, Q, D],
    carry) -> (context [B, H, Q, D], carry); see models.qformer.
    conclude(seen) -> outputs [B, Q, C]: what comes behind the last of them.
    """

    look: Callable[[jax.Array, Callable, tuple], tuple[jax.Array, tuple]]
    conclude: Callable[[jax.Array], jax.Array]


@jax.named_scope("adacm2")
def watch(
    cache: VideoCache,
    queries: jax.Array,
    window: Window,
    ask: Ask,
    learned: jax.Array,
    policy: Policy,
    *,
    carry_queries: bool = False,
    stop_gradient: bool = False,
    remat: bool = True,
    random: jax.Array | None = None,
) -> tuple[VideoCache, jax.Array]:
    """Algorithm 1 over the frames of a window: the cache, and the outputs [B, Q, C] of the last valid frame.

    queries [B, Q, C]: the outputs so far (of no account before the first frame); learned [B, Q, C]: what the queries of
    a video's first frame are, and of every frame unless carry_queries (then: the outputs of the frame before, fig. 4).
    stop_gradient: none flows through the cache nor the carried queries from later frames. remat: a frame's activations
    are computed anew for the gradient. random: a key, for a policy with random scores.
    """
    if policy.keeps_all and not carry_queries:
        look = partial(_look_once, ask=ask, stop_gradient=stop_gradient)
        return (jax.checkpoint(look) if remat else look)(cache, queries, window, learned)

    def frame(state, xs: Window):
        cache, last = state
        start = learned
        if carry_queries:
            carried = last.astype(learned.dtype)
            begun = cache.length[0] > 0
            start = jnp.where(
                begun[:, None, None], jax.lax.stop_gradient(carried) if stop_gradient else carried, learned
            )
        if stop_gradient:
            cache = jax.lax.stop_gradient(cache)
        seen, new = step(cache, start, xs, ask, policy, random=random)
        new = ask.conclude(new) if carry_queries else new
        return (
            jax.tree.map(lambda new, old: _where(xs.valid, new, old, 1), seen, cache),
            _where(xs.valid, new.astype(last.dtype), last, 0),
        ), None

    last = queries
    if not carry_queries:  # outputs are made of the last frame alone
        first = jax.tree.map(lambda x: x[0], window)
        like = jax.eval_shape(lambda: step(cache, learned, first, ask, policy, random=random)[1])
        last = jnp.zeros(like.shape, like.dtype)
    cache, last = jax.lax.scan(jax.checkpoint(frame) if remat else frame, (cache, last), window)[0]
    if carry_queries:
        return cache, last
    return cache, _where(window.valid.any(0), ask.conclude(last).astype(queries.dtype), queries, 0)


def _look_once(
    cache: VideoCache, outputs: jax.Array, window: Window, learned: jax.Array, *, ask: Ask, stop_gradient: bool
) -> tuple[VideoCache, jax.Array]:
    """What watch gives where nothing is forgotten and no query goes on: the last frame's queries see all there is."""
    keys, values = window.keys, window.values
    if stop_gradient:
        cache = jax.lax.stop_gradient(cache)
        keys, values = (only_last(x, window.valid) for x in (keys, values))
    tokens, capacity = keys.shape[3], cache.capacity
    place = window.number[..., None] * tokens + jnp.arange(tokens)  # [T, B, P]
    source = jnp.broadcast_to(place[:, None], keys.shape[:-1])
    length = cache.length + tokens * window.valid.sum(0, dtype=jnp.int32)
    real = jnp.arange(capacity) < length[..., None]
    at = jnp.arange(capacity) - cache.length[..., None]  # [L, B, R]: in the window

    def append(old, new):
        new = rearrange(new, "t l b p ... -> l b (t p) ...").astype(old.dtype)
        index = jnp.clip(at, 0, new.shape[2] - 1)
        extra = (1,) * (old.ndim - 3)
        new = jnp.take_along_axis(new, index.reshape(index.shape + extra), axis=2)
        return jnp.where(((at >= 0) & real).reshape(at.shape + extra), new, old)

    seen = VideoCache(
        append(cache.keys, keys),
        append(cache.values, values),
        jnp.where(real, append(cache.source, source), -1),
        length,
    )

    def look(layer, q, carry):
        k, v = (rearrange(x[layer], "b s (h d) -> b h s d", h=q.shape[1]) for x in (seen.keys, seen.values))
        return attend(q, Keys(k, v, real[layer])), carry

    new = ask.conclude(ask.look(learned, look, ())[0])
    return seen, _where(window.valid.any(0), new.astype(outputs.dtype), outputs, 0)


def only_last(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Frames x [T, L, B, P, C] of which only each row's last valid [T, B] one lets gradients through."""
    last = jnp.arange(len(valid))[:, None] == valid.sum(0) - 1
    return jnp.where(last[:, None, :, None, None], x, jax.lax.stop_gradient(x))


def step(
    cache: VideoCache, queries: jax.Array, frame: Window, ask: Ask, policy: Policy, *, random: jax.Array | None = None
) -> tuple[VideoCache, jax.Array]:
    """One frame (a Window without its first axis): appended, looked at by queries [B, Q, C], and all layers reduced.

    Gives the cache, and what ask.conclude makes outputs of.
    """
    layers, batch, capacity, _ = cache.keys.shape
    tokens = frame.keys.shape[2]
    keys = jnp.concatenate([cache.keys, frame.keys.astype(cache.keys.dtype)], axis=2)
    values = jnp.concatenate([cache.values, frame.values.astype(cache.values.dtype)], axis=2)
    past = jnp.arange(capacity) < cache.length[..., None]
    valid = jnp.concatenate([past, jnp.ones((layers, batch, tokens), bool)], axis=2)
    place = frame.number[:, None] * tokens + jnp.arange(tokens)
    source = jnp.concatenate([cache.source, jnp.broadcast_to(place, (layers, *place.shape))], axis=2)

    def look(layer, q, drawn):
        heads = q.shape[1]
        k, v = (rearrange(x[layer], "b s (h d) -> b h s d", h=heads) for x in (keys, values))
        context, sums = attend_counted(q, Keys(k, v, valid[layer]))
        return context, (*drawn, sums)

    seen, drawn = ask.look(queries, look, ())
    importance = _importance(policy, jax.lax.stop_gradient(jnp.stack(drawn)), valid, frame.number, random)
    size = capacity + tokens
    tables = zip(*(counts(a, b, size) for a, b in zip(policy.alpha, policy.beta, strict=True)), strict=True)
    recent, older = (jnp.asarray(np.stack(table)) for table in tables)
    indices, real = _left(survivors(importance, valid, recent, older), capacity)
    keys, values = (jnp.take_along_axis(x, indices[..., None], axis=2) for x in (keys, values))
    source = jnp.where(real, jnp.take_along_axis(source, indices, axis=2), -1)
    return VideoCache(keys, values, source, real.sum(-1, dtype=jnp.int32)), seen


def _importance(policy: Policy, drawn: jax.Array, valid: jax.Array, number: jax.Array, random) -> jax.Array:
    """What the older part is ranked by: float32 [L, B, S]."""
    if policy.scores == "shared":
        return jnp.broadcast_to(drawn.sum(0), drawn.shape)
    if policy.scores == "random":  # other ones in each layer, row and frame
        keys = jax.vmap(lambda n, row: jax.random.fold_in(jax.random.fold_in(random, n), row))(
            number, jnp.arange(number.shape[0])
        )
        layers, _, size = drawn.shape
        return jnp.moveaxis(jax.vmap(lambda key: jax.random.uniform(key, (layers, size)))(keys), 0, 1)
    if policy.scores == "recent":
        return jnp.cumsum(valid, axis=-1).astype(jnp.float32)
    return drawn


def _where(mask: jax.Array, new: jax.Array, old: jax.Array, axis: int) -> jax.Array:
    """new where mask [B] is true, B being an axis of the arrays."""
    shape = [1] * new.ndim
    shape[axis] = mask.shape[0]
    return jnp.where(mask.reshape(shape), new, old)
