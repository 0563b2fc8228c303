"""PivotKV: keep the keys and values that a chunk's own queries attend to most (ReTaKe, arXiv 2412.20504, section 3.3).

Everything is per layer and per chunk, for one index set shared by all heads; scores are float32.
"""

import jax
import jax.numpy as jnp

from longvid_jax.ops.attention import column_sums
from longvid_jax.ops.kv_cache import Block
from longvid_jax.ops.rope import Rope
from longvid_jax.ops.topk import Kept, top_k


def scores(q: jax.Array, k: jax.Array, valid: jax.Array, query_valid: jax.Array | None = None) -> jax.Array:
    """How much attention each token of a chunk draws (eq. 6, summed over queries as the authors do): float32 [B, C].

    q [B, H, N, D] and k [B, K, C, D] are not rotated, so that importance does not depend on position; no causal mask,
    no history. Without query_valid [B, N] the queries are the chunk's own tokens, masked by valid [B, C]; with it they
    are the prompt's (prompt-guided scoring, section 4 of the authors' code).
    """
    return column_sums(q, k, valid, valid if query_valid is None else query_valid)


def keep(
    scores: jax.Array, is_pivot: jax.Array | None, count: jax.Array, valid: jax.Array, *, pivots: str = "mean"
) -> Kept:
    """The `count` [B] tokens that stay, of scores [B, C] and is_pivot bool [B, C] (from DPSelect).

    pivots="mean" gives pivots the average score 1, as the authors' code does; "always" puts them before all others
    (eq. 7), among themselves by score. Ties go to the earlier token.
    """
    if is_pivot is None:
        return top_k(scores, count, scores.shape[-1], valid=valid)
    if pivots == "always":
        return top_k(scores, count, scores.shape[-1], valid=valid, first=is_pivot)
    return top_k(jnp.where(is_pivot, 1.0, scores), count, scores.shape[-1], valid=valid)


def reforge(positions: jax.Array, count: jax.Array, total: jax.Array) -> jax.Array:
    """Positions [B, C, A] of kept tokens with the first axis squeezed to the kept share.

    It becomes min + floor((p - min) count / total); the others (height and width) stay.
    count, total int32 [B]: tokens kept and tokens there were.
    """
    time = positions[..., 0]
    start = time[:, :1]  # kept tokens come in time order
    return positions.at[..., 0].set(start + (time - start) * count[:, None] // jnp.maximum(total, 1)[:, None])


def compress(
    count: jax.Array,
    valid: jax.Array,
    is_pivot: jax.Array | None,
    *,
    pivots: str = "mean",
    reforged: bool = True,
    query_valid: jax.Array | None = None,
    random: jax.Array | None = None,
):
    """A `select` for ops.kv_cache.attention that stores the best `count` [B] tokens of each chunk.

    valid and is_pivot bool [B, C]. With query_valid [B, N - C] the block's tokens behind the first C are the prompt:
    they score and are not stored. With a random key tokens are drawn, other ones in each layer, and nothing is scored.
    """
    chunk = valid.shape[1]
    total = valid.sum(-1, dtype=jnp.int32)

    def importance(q, k, positions, rope: Rope, layer) -> jax.Array:
        if random is not None:
            return jax.random.uniform(jax.random.fold_in(random, layer), valid.shape)
        scored_q, scored_k = q if query_valid is None else q[:, :, chunk:], k[:, :, :chunk]
        if not reforged:  # the authors' code undoes the rotation only where positions are re-forged
            scored_q = rope(scored_q, positions if query_valid is None else positions[:, chunk:])
            scored_k = rope(scored_k, positions[:, :chunk])
        return scores(scored_q, scored_k, valid, query_valid)

    @jax.named_scope("pivotkv")
    def select(q, k, v, positions, rope: Rope, layer) -> tuple[Block, jax.Array]:
        chunk_k, chunk_v, chunk_positions = k[:, :, :chunk], v[:, :, :chunk], positions[:, :chunk]
        kept = keep(importance(q, k, positions, rope, layer), is_pivot, count, valid, pivots=pivots)
        at = kept.indices
        new_positions = jnp.take_along_axis(chunk_positions, at[..., None], axis=1)
        if reforged:
            new_positions = reforge(new_positions, kept.count, total)
        stored_k = rope(jnp.take_along_axis(chunk_k, at[:, None, :, None], axis=2), new_positions)
        stored_v = jnp.take_along_axis(chunk_v, at[:, None, :, None], axis=2)
        source = jnp.where(jnp.arange(chunk) < kept.count[:, None], at, -1)
        return Block(stored_k, stored_v, new_positions, source), kept.count

    return select
