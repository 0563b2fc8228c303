"""Top-k with a static width and a traced count: every data-dependent choice is a mask over a fixed buffer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kept(NamedTuple):
    """Chosen entries: the first `count` of `indices` are real and sorted; the rest point at entries not chosen."""

    indices: jax.Array  # int32 [..., width]
    count: jax.Array  # int32 [...]
    mask: jax.Array  # bool [..., C]: which entries were chosen


def best(*keys: jax.Array, count: jax.Array) -> jax.Array:
    """bool [..., C]: the `count` [...] first entries when sorted by the keys [..., C], largest first.

    Ties go to the lower index, and what is not a number comes last. One sort finds the last of them, and all entries
    are compared with that one.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, keys[0].shape, keys[0].ndim - 1)
    # A bool key is sorted as an integer; negation turns "largest first" into lax.sort's ascending order.
    ascending = [
        -key.astype(jnp.int32) if key.dtype == jnp.bool_ else jnp.where(jnp.isnan(key), jnp.inf, -key) for key in keys
    ]
    ascending.append(index)
    place = jnp.maximum(count - 1, 0)[..., None]
    ordered = jax.lax.sort(ascending, num_keys=len(ascending))
    before = jnp.ones(index.shape, bool)  # or the same: from the last key to the first
    for key, last in zip(reversed(ascending), reversed(ordered), strict=True):
        last = jnp.take_along_axis(last, place, axis=-1)
        before = (key < last) | ((key == last) & before)
    return before & (count > 0)[..., None]


def top_k(
    scores: jax.Array,
    count: jax.Array | int,
    width: int,
    *,
    valid: jax.Array | None = None,
    first: jax.Array | None = None,
) -> Kept:
    """The `count` [...] best of scores [..., C], of those `valid` [..., C], in order of index, in a buffer of `width`.

    Ties go to the lower index. `first` [..., C] (bool) marks entries that come before all others whatever their score.
    """
    if valid is None:
        valid = jnp.ones(scores.shape, bool)
    lowest = jnp.finfo(jnp.float32).min  # a valid entry of -inf still comes before those that are not valid
    scores = jnp.where(valid, jnp.maximum(scores.astype(jnp.float32), lowest), -jnp.inf)
    keys = (scores,) if first is None else (first & valid, scores)
    count = jnp.minimum(jnp.asarray(count, jnp.int32), valid.sum(-1, dtype=jnp.int32))
    mask = best(*keys, count=count) & valid
    return Kept(compact(mask, width), jnp.minimum(count, width), mask)


def compact(mask: jax.Array, width: int) -> jax.Array:
    """Indices int32 [..., width] that bring the True entries of mask [..., C] to the front in order, then the rest."""
    size = mask.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    ordered = jax.lax.sort(jnp.where(mask, index, index + size))[..., :width]  # one operand: XLA sorts it fastest
    return jnp.where(ordered < size, ordered, ordered - size)
