"""DPSelect: frames (or single patches of them) where the picture changes most (ReTaKe, arXiv 2412.20504, section 3.2).

The distance of a temporal patch is one minus the cosine to its predecessor's features (eq. 1); a keyframe is a local
peak of the distance (eq. 2). Distances are float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

from longvid_jax.ops.topk import top_k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keyframes:
    """What DPSelect keeps of T temporal patches: [k], or [k, N] when every patch position decides for itself."""

    indices: jax.Array  # int32 [k] or [k, N], in time order
    is_peak: jax.Array  # bool [k] or [k, N]: which of them are local peaks
    features: jax.Array  # [k, N, D]


def keyframes(
    features: jax.Array,
    num_keep: int,
    *,
    window: int = 3,
    per_patch: bool = False,
    valid: jax.Array | None = None,
    count: jax.Array | None = None,
) -> Keyframes:
    """The peaks and, where there is room, the patches of largest distance after them (eq. 3), in time order.

    features [T, N, D]; valid bool [T] marks real temporal patches, a prefix. num_keep is the width of the result; a
    traced `count` may ask for fewer, and then the entries behind it are padding.
    """
    valid = jnp.ones(features.shape[0], bool) if valid is None else valid
    num_keep = min(num_keep, features.shape[0])
    distance = distances(features, features[0], jnp.bool_(False), per_patch=per_patch)
    peak = peaks(jnp.where(_along(valid, distance), distance, -jnp.inf), window=window)
    return choose(features, distance, peak, valid, num_keep if count is None else count, num_keep)


@jax.named_scope("dpselect")
def choose(
    features: jax.Array, distance: jax.Array, peak: jax.Array, valid: jax.Array, count: jax.Array | int, width: int
) -> Keyframes:
    """The `count` best of features [T, N, D] in a buffer of `width`: peaks first, then by distance ([T] or [T, N])."""
    # Selection runs along time: bring time last, [N, T], or [T] when a frame decides as a whole.
    kept = top_k(
        distance.T, count, width, valid=jnp.broadcast_to(_along(valid, distance), distance.shape).T, first=peak.T
    )
    indices = kept.indices.T
    along = indices[..., None] if indices.ndim == 2 else indices[:, None, None]
    return Keyframes(
        indices=indices,
        is_peak=jnp.take_along_axis(peak, indices, axis=0) & _along(jnp.arange(width) < kept.count.min(), indices),
        features=jnp.take_along_axis(features, jnp.broadcast_to(along, (width, *features.shape[1:])), axis=0),
    )


def distances(features: jax.Array, before: jax.Array, has_before: jax.Array, *, per_patch: bool = False) -> jax.Array:
    """One minus the cosine of features [T, N, D] to their predecessors: float32 [T, N], or its mean [T] over patches.

    `before` [N, D] precedes the first; where there is none (has_before False) the distance is 1.
    """
    x = features.astype(jnp.float32)
    previous = jnp.concatenate([before.astype(jnp.float32)[None], x[:-1]])
    norms = jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-8) * jnp.maximum(jnp.linalg.norm(previous, axis=-1), 1e-8)
    distance = 1 - jnp.sum(x * previous, axis=-1) / norms
    distance = distance.at[0].set(jnp.where(has_before, distance[0], 1.0))
    return distance if per_patch else distance.mean(-1)


def peaks(distance: jax.Array, *, window: int = 3) -> jax.Array:
    """Local maxima of distance [T, ...] within a centred window of odd width; of equal neighbours the first counts."""
    lowest = jnp.full((window // 2, *distance.shape[1:]), -jnp.inf)
    padded = jnp.concatenate([lowest, distance, lowest])
    size, half = distance.shape[0], window // 2
    peak = distance > -jnp.inf
    for step in range(1, half + 1):
        peak &= distance > padded[half - step : half - step + size]
        peak &= distance >= padded[half + step : half + step + size]
    return peak


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lookback:
    """What the streaming form remembers of the temporal patch before the next one."""

    features: jax.Array  # [N, D]
    distance: jax.Array  # float32 [N] or []
    started: jax.Array  # bool []

    @classmethod
    def empty(cls, tokens: int, width: int, dtype, *, per_patch: bool = False) -> "Lookback":
        """Before the first temporal patch of N tokens of width D."""
        distance = jnp.zeros((tokens,) if per_patch else (), jnp.float32)
        return cls(jnp.zeros((tokens, width), dtype), distance, jnp.bool_(False))


@jax.named_scope("dpselect")
def stream_keyframes(
    lookback: Lookback,
    features: jax.Array,
    after: jax.Array,
    valid: jax.Array,
    has_after: jax.Array,
    *,
    per_patch: bool = False,
) -> tuple[Lookback, jax.Array, jax.Array]:
    """Peaks (window 3) of the next temporal patches of a stream, as `keyframes` of the whole stream would find them.

    features [T, N, D], of which a prefix `valid` [T] is real; `after` [N, D] is the patch behind them, if has_after.
    Returns the lookback for the next call, the distances [T, N] or [T] and the peaks, bool of the same shape.
    """
    index, count = jnp.arange(features.shape[0] + 1), valid.sum()
    after = after[None].astype(features.dtype)
    ahead = jnp.where((index == count)[:, None, None], after, jnp.concatenate([features, after]))
    distance = distances(ahead, lookback.features, lookback.started, per_patch=per_patch)
    real = index < count + has_after
    distance = jnp.where(_along(real, distance), distance, -jnp.inf)
    before = jnp.where(lookback.started, lookback.distance, -jnp.inf)
    peak = peaks(jnp.concatenate([before[None], distance]))[1:-1] & _along(valid, distance)
    last = jnp.maximum(count - 1, 0)
    moved = Lookback(features[last].astype(lookback.features.dtype), distance[last], jnp.bool_(True))
    lookback = jax.tree.map(lambda new, old: jnp.where(valid.any(), new, old), moved, lookback)
    return lookback, distance[:-1], peak


def _along(flags: jax.Array, like: jax.Array) -> jax.Array:
    """flags [T] shaped to broadcast along the first axis of `like`."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))
