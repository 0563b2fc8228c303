"""Dynamic frame selection: which frames to look at in detail, once all have been seen (ReWind, arXiv 2411.15556).

The instruction's attention to the memory gives each frame a relevance; of the most relevant, density peaks among the
frames' features (DPC-KNN) are selected, so that the few frames chosen do not all show the same. All is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longvid_jax.ops.attention import column_sums
from longvid_jax.ops.topk import Kept, compact, top_k


class Chosen(NamedTuple):
    """Entries chosen of each row, in order of index; behind the last real one is padding, safe to gather with."""

    indices: jax.Array  # int32 [B, width]
    valid: jax.Array  # bool [B, width], a prefix


class Selection(NamedTuple):
    """The frames that selection passed through, both in time order: `selected` are some of the `candidates`."""

    candidates: Chosen
    selected: Chosen


@jax.named_scope("relevance")
def relevance(q: jax.Array, k: jax.Array, valid: jax.Array, query_valid: jax.Array | None = None) -> jax.Array:
    """How much of the instruction's attention each frame of the memory draws: float32 [B, T], 0 where not valid.

    q [B, H, S, D] are the projected queries, of which query_valid [B, S] count (the pooled instruction is one query),
    k [B, K, N, D] the memory's projected keys, N / T consecutive tokens a frame, valid [B, T] the frames there are.
    softmax(q k^T / sqrt(D)) over the tokens of all valid frames is summed over a frame's tokens and over heads, and
    averaged over queries: a row sums to H.
    """
    tokens = jnp.repeat(valid, k.shape[2] // valid.shape[1], axis=1)
    if query_valid is None:
        count = q.shape[2]
    else:
        count = jnp.maximum(query_valid.sum(-1), 1)[:, None]
        q = jnp.where(query_valid[:, None, :, None], q, 0)  # so that nothing there is can turn 0 times it into NaN
    drawn = column_sums(q, k, tokens, query_valid)
    return drawn.reshape(*valid.shape, -1).sum(-1) * q.shape[1] / count


@jax.named_scope("density_peaks")
def density_peaks(features: jax.Array, valid: jax.Array, *, num_neighbors: int = 5, num_select: int) -> Chosen:
    """The num_select points of features [B, N, D], of those valid [B, N], that are dense and far from denser ones.

    A point's density sigma is exp(-mean squared distance to its num_neighbors nearest other points), or to all others
    if they are fewer; rho is its distance to the nearest denser point, for the densest to the farthest point. The
    largest sigma * rho are chosen. Ties go to the earlier point, in density too. Distances are Euclidean, of the
    features as given. No more points than asked: all of them.
    """
    size = valid.shape[1]
    index = jnp.arange(size)
    x = features.astype(jnp.float32)
    # From differences and not from products: a copy is at distance 0 exactly, and both directions agree to the bit.
    squared = jnp.square(x[:, :, None] - x[:, None]).sum(-1)
    others = valid[:, None] & (index[:, None] != index)

    # Sigma and sigma * rho underflow in many dimensions, so their logarithms are compared: -spread, log(rho) - spread.
    nearest = jnp.sort(jnp.where(others, squared, jnp.inf), axis=-1)[..., :num_neighbors]
    count = jnp.minimum(others.sum(-1), num_neighbors)
    near = jnp.where(jnp.arange(nearest.shape[-1]) < count[..., None], nearest, 0)
    spread = near.sum(-1) / jnp.maximum(count, 1)

    mine, theirs = spread[:, :, None], spread[:, None]
    denser = others & ((theirs < mine) | ((theirs == mine) & (index < index[:, None])))
    # Rho squared; 0 for all copies but the first. The densest point's stays infinite: with its distance to the farthest
    # it would come before all others too, since no other rho is larger than that.
    apart = jnp.where(denser, squared, jnp.inf).min(-1)
    return _chosen(top_k(jnp.log(apart) / 2 - spread, num_select, num_select, valid=valid), num_select)


def select_frames(
    scores: jax.Array,
    features: jax.Array,
    valid: jax.Array,
    *,
    num_candidates: int = 64,
    num_select: int = 8,
    num_neighbors: int = 5,
) -> Selection:
    """The density peaks among the num_candidates frames of highest score; all frames where there are no more.

    scores [B, T] (relevance), features [B, T, D] (ReWind's: the L2-normalised mean of a frame's memory tokens), valid
    bool [B, T]. Ties go to the earlier frame.
    """
    candidates = most_relevant(scores, valid, num_candidates)
    theirs = jnp.take_along_axis(features, candidates.indices[..., None], axis=1)
    peaks = density_peaks(theirs, candidates.valid, num_neighbors=num_neighbors, num_select=num_select)
    indices = jnp.take_along_axis(candidates.indices, peaks.indices, axis=1)
    return Selection(candidates, Chosen(indices, peaks.valid))


def most_relevant(scores: jax.Array, valid: jax.Array, num_select: int) -> Chosen:
    """The num_select entries of highest scores [B, N], of those valid [B, N]; ties to the earlier. Of fewer, all."""
    return _chosen(top_k(scores, num_select, num_select, valid=valid), num_select)


def spread_over(seen: jax.Array, valid: jax.Array, num_select: int) -> Chosen:
    """spread over those seen [B, N] of the valid entries [B, N], or over all of them where none is seen."""
    seen = seen & valid
    return spread(jnp.where(seen.any(-1, keepdims=True), seen, valid), num_select)


def spread(valid: jax.Array, num_select: int) -> Chosen:
    """num_select entries of those valid [B, N], evenly: of n the floor((i + 1/2) n / num_select)-th. Of fewer, all."""
    count = valid.sum(-1, dtype=jnp.int32)[:, None]
    place = jnp.cumsum(valid, axis=-1) - 1
    steps = jnp.arange(num_select, dtype=jnp.int32)
    wanted = jnp.where(count < num_select, steps, ((2 * steps + 1) * count) // (2 * num_select))
    mask = valid & (wanted[:, :, None] == place[:, None]).any(1)
    return _chosen(Kept(compact(mask, num_select), jnp.minimum(count[:, 0], num_select), mask), num_select)


def _chosen(kept: Kept, width: int) -> Chosen:
    """As wide as asked, also where there were fewer entries than that."""
    padding = width - kept.indices.shape[-1]
    return Chosen(jnp.pad(kept.indices, [(0, 0), (0, padding)]), jnp.arange(width) < kept.count[:, None])
