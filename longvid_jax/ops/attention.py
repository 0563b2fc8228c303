"""The one place where attention is computed and its kernel chosen.

Queries are walked in blocks, so that the largest temporary is [heads, block, keys] however long the sequence is. Logits
and softmax are float32, products run in the arrays' dtype with float32 accumulation.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Logits of one block of queries may take this many bytes (float32, all rows and heads together).
BLOCK_BYTES = 64 << 20
SEGMENT = 32  # queries behind a shared prefix that are taken together


class Keys(NamedTuple):
    """A run of keys that queries attend to; a token may attend to several runs under one softmax."""

    k: jax.Array  # [B, K, S, D]
    v: jax.Array  # [B, K, S, D]
    valid: jax.Array | None = None  # bool [B, S], or [B, N, S] where each query has its own; None: all
    causal: bool = False  # query i sees keys 0..i of this run
    groups: jax.Array | None = None  # int32 [B, S]: only queries of the same group see a key, of group 0 all; None: all


def attend(q: jax.Array, *runs: Keys, groups: jax.Array | None = None, scale: float | None = None) -> jax.Array:
    """Softmax attention of q [B, H, N, D] over the keys of all runs together -> [B, H, N, D].

    H is a multiple of K (grouped queries). groups int32 [B, N] are the queries', needed if a run's keys have some. A
    query that may attend to nothing gets a finite, meaningless value.
    """
    heads, kv_heads = q.shape[1], runs[0].k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def block(q, start, groups):  # q [B, K, G, n, D], groups [B, n]
        weights, totals = _weights([_logits(q, run, start, scale, groups) for run in runs])
        parts = [
            jnp.einsum("bkgns,bksd->bkgnd", w.astype(run.v.dtype), run.v, preferred_element_type=jnp.float32)
            for w, run in zip(weights, runs, strict=True)
        ]
        return (sum(parts) / totals[..., None]).astype(q.dtype)

    grouped = q.reshape(q.shape[0], kv_heads, heads // kv_heads, *q.shape[2:])
    out = _over_blocks(block, grouped, sum(run.k.shape[2] for run in runs), groups)
    return out.reshape(q.shape)


def attend_counted(q: jax.Array, keys: Keys, scale: float | None = None) -> tuple[jax.Array, jax.Array]:
    """What attend(q, keys) gives, and how much attention [B, S] each key draws: summed over heads and queries, float32.

    For few queries, such as a Q-Former's: all their weights [B, H, N, S] are in memory at a time.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.reshape(q.shape[0], keys.k.shape[1], -1, *q.shape[2:])
    (weights,), totals = _weights([_logits(grouped, keys, 0, scale)])
    weights = weights / totals[..., None]
    context = jnp.einsum("bkgns,bksd->bkgnd", weights.astype(keys.v.dtype), keys.v, preferred_element_type=jnp.float32)
    return context.astype(q.dtype).reshape(q.shape), weights.sum((1, 2, 3))


def attend_few(
    x: jax.Array, k: jax.Array, v: jax.Array, offsets: jax.Array, valid: jax.Array | None, scale: float
) -> jax.Array:
    """Many x [B, N, W] over few keys k [B, H, S, W] -> [B, N, V]: what they find in v [B, H, S, V], heads summed.

    k is of the width of x itself, for which offsets float32 [B, H, S] are added to the logits, and v of what comes out:
    the maps around the attention are part of them. Only keys valid bool [B, S] count, None: all.
    """
    logits = jnp.einsum("bnw,bhsw->bnhs", x, k, preferred_element_type=jnp.float32)
    logits = (logits + offsets[:, None]) * scale
    if valid is not None:
        logits = jnp.where(valid[:, None, None], logits, jnp.finfo(jnp.float32).min)
    (weights,), totals = _weights([logits])
    weights = (weights / totals[..., None]).astype(v.dtype)
    return jnp.einsum("bnhs,bhsv->bnv", weights, v, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Packed:
    """What is known of sequences in which conversations stand behind what they share: sizes for a program's shapes."""

    prefix: int  # all tokens of group 0 are among the first so many
    longest: int  # tokens of a conversation, which stand next to each other, at most


def attend_packed(q: jax.Array, keys: Keys, packed: Packed, scale: float | None = None) -> jax.Array:
    """What attend(q, keys, groups=keys.groups) gives for causal self-attention -> [B, H, N, D].

    A query looks at the prefix and at the `longest` tokens up to it only, which is all that it sees: the work grows
    with the conversations' number and not with its square. Padding gets finite, meaningless values.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    prefix = packed.prefix
    if q.shape[2] - prefix <= SEGMENT:
        return attend(q, keys, groups=keys.groups, scale=scale)
    k, v, valid, _, groups = keys
    first = Keys(k[:, :, :prefix], v[:, :, :prefix], valid[:, :prefix], groups=groups[:, :prefix])
    ahead = attend(q[:, :, :prefix], first._replace(causal=True), groups=first.groups, scale=scale)

    batch, kv_heads, width = q.shape[0], k.shape[1], q.shape[-1]
    length = q.shape[2] - prefix
    count, back = -(-length // SEGMENT), -(-(packed.longest - 1) // SEGMENT)
    behind = jnp.pad(q[:, :, prefix:], [(0, 0), (0, 0), (0, count * SEGMENT - length), (0, 0)])
    theirs = jnp.pad(groups[:, prefix:], [(0, 0), (0, count * SEGMENT - length)], constant_values=-1)
    grouped = behind.reshape(batch, kv_heads, -1, *behind.shape[2:])
    shared = _over_blocks(lambda q, start, own: _partial(q, first, start, scale, own), grouped, prefix, theirs)

    def windows(x, axis):
        """The segment of each query and `back` before it: [batch * count, ..., (back + 1) * SEGMENT, ...]."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (back * SEGMENT, count * SEGMENT - length)
        x = jnp.pad(jax.lax.slice_in_dim(x, prefix, None, axis=axis), padding)
        x = jnp.moveaxis(x.reshape(*x.shape[:axis], back + count, SEGMENT, *x.shape[axis + 1 :]), axis, 1)
        x = jnp.concatenate([x[:, n : n + count] for n in range(back + 1)], axis=axis + 1)
        return x.reshape(-1, *x.shape[2:])

    def segments(x, axis):
        x = jnp.moveaxis(x.reshape(*x.shape[:axis], count, SEGMENT, *x.shape[axis + 1 :]), axis, 1)
        return x.reshape(-1, *x.shape[2:])

    run = Keys(windows(k, 2), windows(v, 2), windows(valid, 1), causal=True, groups=windows(groups, 1))
    own = _partial(segments(grouped, 3), run, back * SEGMENT, scale, segments(theirs, 1))
    own = [jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 3) for x in own]
    own = [x.reshape(*x.shape[:3], count * SEGMENT, *x.shape[5:]) for x in own]

    highest = jnp.maximum(shared[1], own[1])
    shares = [jnp.exp(part[1] - highest) for part in (shared, own)]
    total = sum(share * part[2] for share, part in zip(shares, (shared, own), strict=True))
    context = sum(share[..., None] * part[0] for share, part in zip(shares, (shared, own), strict=True))
    context = (context / total[..., None]).astype(q.dtype).reshape(batch, -1, count * SEGMENT, width)
    return jnp.concatenate([ahead, context[:, :, :length]], axis=2)


def _partial(q: jax.Array, run: Keys, start, scale: float, groups) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One run's share of a softmax: weighted values [..., n, D], the highest logit and the weights' sum [..., n]."""
    logits = _logits(q, run, start, scale, groups)
    highest = jax.lax.stop_gradient(logits.max(-1))
    weights = jnp.exp(logits - highest[..., None])
    values = jnp.einsum("bkgns,bksd->bkgnd", weights.astype(run.v.dtype), run.v, preferred_element_type=jnp.float32)
    return values, highest, weights.sum(-1)


def column_sums(
    q: jax.Array, k: jax.Array, valid: jax.Array, query_valid: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """How much attention each key draws: softmax(q k^T) summed over queries and averaged over heads, float32 [B, S].

    q [B, H, N, D], k [B, K, S, D]; only valid [B, S] keys draw any, only query_valid [B, N] queries give any. No causal
    mask.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.reshape(q.shape[0], kv_heads, heads // kv_heads, *q.shape[2:])
    counted = jnp.ones((q.shape[0], q.shape[2]), bool) if query_valid is None else query_valid

    def block(total, start, q, counted):
        (weights,), totals = _weights([_logits(q, Keys(k, k, valid), start, scale)])
        shares = counted[:, None, None].astype(jnp.float32) / (totals * heads)
        # As products of a row and a matrix a head: one contraction over heads too is several times as slow on CPUs.
        return total + jnp.einsum("bkgn,bkgns->bkgs", shares, weights).sum((1, 2))

    size = _block_size(grouped, k.shape[2])
    count = -(-q.shape[2] // size)
    total = jnp.zeros((q.shape[0], k.shape[2]), jnp.float32)
    if count == 1:
        return block(total, 0, grouped, counted) * valid
    pieces = _split(grouped, 3, size), _split(counted, 1, size)  # padding queries count nothing
    total, _ = jax.lax.scan(lambda total, xs: (block(total, *xs), None), total, (jnp.arange(count) * size, *pieces))
    return total * valid


def _weights(logits: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The runs' weights [..., S] of one softmax over all of them, and what these sum to [...]: divided by it later."""
    highest = functools.reduce(jnp.maximum, [x.max(-1) for x in logits])
    weights = [jnp.exp(x - highest[..., None]) for x in logits]
    return weights, sum(w.sum(-1) for w in weights)


def _logits(q: jax.Array, run: Keys, start, scale: float, groups: jax.Array | None = None) -> jax.Array:
    """Masked logits float32 [B, K, G, n, S] of the queries start..start+n, of the groups [B, n]."""
    # XLA transposes the second operand of such a product on CPUs: for few queries the logits move, not the keys.
    few = q.shape[2] * q.shape[3] <= q.shape[4]
    if few:
        logits = jnp.einsum("bksd,bkgnd->bksgn", run.k, q, preferred_element_type=jnp.float32)
        logits = jnp.moveaxis(logits, 2, -1) * scale
    else:
        logits = jnp.einsum("bkgnd,bksd->bkgns", q, run.k, preferred_element_type=jnp.float32) * scale
    lowest = jnp.finfo(jnp.float32).min
    if run.valid is not None:
        valid = run.valid[:, None]
        if run.valid.ndim == 3:  # clipped for the queries that only fill a block up
            valid = jnp.take(run.valid, start + jnp.arange(q.shape[3]), axis=1, mode="clip")
        logits = jnp.where(valid[:, None, None], logits, lowest)
    if run.causal:
        seen = jnp.arange(run.k.shape[2]) <= start + jnp.arange(q.shape[3])[:, None]
        logits = jnp.where(seen, logits, lowest)
    if run.groups is not None:
        theirs = run.groups[:, None]  # [B, 1, S]
        seen = (theirs == 0) | (theirs == groups[:, :, None])
        logits = jnp.where(seen[:, None, None], logits, lowest)
    return logits


def _over_blocks(block, q: jax.Array, keys: int, groups: jax.Array | None) -> jax.Array:
    """block(q piece, start, groups piece) over pieces of the token axis: q's 3, groups' 1, and the results' 3."""
    size = _block_size(q, keys)
    if size >= q.shape[3]:
        return block(q, 0, groups)
    pieces = _split(q, 3, size)
    of_groups = None if groups is None else _split(groups, 1, size)
    out = jax.lax.map(lambda xs: block(*xs), (pieces, jnp.arange(pieces.shape[0]) * size, of_groups))

    def joined(x):
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, : q.shape[3]]

    return jax.tree.map(joined, out)


def _block_size(q: jax.Array, keys: int) -> int:
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    return min(q.shape[3], max(64, BLOCK_BYTES // (4 * rows * keys) // 64 * 64))


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pads an axis to a multiple of size and moves the blocks to a new leading axis."""
    count = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)
