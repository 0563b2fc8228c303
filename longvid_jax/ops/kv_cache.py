"""A preallocated key-value cache that layers read and append to, in place.

Its arrays have the token axis second to last. They are stacked over layers ([L, ...], for scanned layers) or tuples
with one array a layer (for unrolled ones). All rows of a batch append at one shared offset; a row with fewer tokens
leaves a hole, which `valid` masks.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longvid_jax.ops.attention import Keys, attend
from longvid_jax.ops.rope import Rope

# Fractions of the capacity among which the attended prefix is chosen, so that the unfilled part is not paid for.
PREFIXES = (8, 4, 2, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What a decoder remembers. L layers, B batch, K kv heads, S capacity, D head width, A position axes."""

    keys: jax.Array | tuple[jax.Array, ...]  # [L, B, K, S, D], rotated
    values: jax.Array | tuple[jax.Array, ...]  # [L, B, K, S, D]
    positions: jax.Array | tuple[jax.Array, ...]  # int32 [L, B, S, A]: where each key stands for the rotary embedding
    source: jax.Array | tuple[jax.Array, ...]  # int32 [L, B, S, 1]: its index in the block it came with; -1: none
    valid: jax.Array  # bool [B, S]
    last: jax.Array  # int32 [L, B]: first-axis position of the last token stored; -1 while empty
    offset: jax.Array  # int32 []: where the next block is written

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.valid.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamCache:
    """What the beams of a beam search remember: a prefix that those of a row share, and the tokens of each.

    G beams a row are G tokens of a block. No key ever moves: which of the row's tokens a beam descends from is a mask.
    """

    prefix: KVCache  # is only read
    suffix: KVCache  # the beams' tokens, G a step, one step behind the other
    path: jax.Array  # bool [B, G, suffix's capacity]: the tokens that a beam descends from


class Block(NamedTuple):
    """What a layer stores of a block of tokens; the first `count` of its N entries are real."""

    k: jax.Array  # [B, K, N, D], rotated
    v: jax.Array  # [B, K, N, D]
    positions: jax.Array  # int32 [B, N, A]
    source: jax.Array  # int32 [B, N]


# Chooses what is stored: select(q, k, v, positions, rope, layer), with q [B, H, N, D] and k, v [B, K, N, D] not rotated
# yet and the layer's number, gives a Block and how many of its entries are real, int32 [B].
Select = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Rope, int | jax.Array], tuple[Block, jax.Array]]


def empty(
    depth: int, batch: int, kv_heads: int, capacity: int, head_dim: int, axes: int, dtype, *, stacked: bool
) -> KVCache:
    """An empty cache; `stacked` as the decoder's layers are."""

    def zeros(shape, dtype, fill=0):
        if stacked:
            return jnp.full((depth, *shape), fill, dtype)
        return tuple(jnp.full(shape, fill, dtype) for _ in range(depth))

    return KVCache(
        keys=zeros((batch, kv_heads, capacity, head_dim), dtype),
        values=zeros((batch, kv_heads, capacity, head_dim), dtype),
        positions=zeros((batch, capacity, axes), jnp.int32),
        source=zeros((batch, capacity, 1), jnp.int32, -1),
        valid=jnp.zeros((batch, capacity), bool),
        last=jnp.full((depth, batch), -1, jnp.int32),
        offset=jnp.int32(0),
    )


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The same cache with room for `capacity` tokens a row."""
    extra = capacity - cache.capacity

    def pad(x, axis, fill=0):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, extra)
        return jnp.pad(x, widths, constant_values=fill)

    return dataclasses.replace(
        cache,
        keys=jax.tree.map(lambda x: pad(x, -2), cache.keys),
        values=jax.tree.map(lambda x: pad(x, -2), cache.values),
        positions=jax.tree.map(lambda x: pad(x, -2), cache.positions),
        source=jax.tree.map(lambda x: pad(x, -2, -1), cache.source),
        valid=pad(cache.valid, -1),
    )


def take_rows(cache: KVCache, rows: np.ndarray, offset: int) -> KVCache:
    """A cache of these rows int [n] of the batch, in this order, any of them several times, filled to `offset`."""
    axis = 0 if isinstance(cache.keys, tuple) else 1

    def take(buffer):
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), buffer)

    return KVCache(
        keys=take(cache.keys),
        values=take(cache.values),
        positions=take(cache.positions),
        source=take(cache.source),
        valid=cache.valid[rows],
        last=cache.last[:, rows],
        offset=jnp.int32(offset),
    )


def with_beams(prefix: KVCache, beams: int, steps: int) -> BeamCache:
    """A cache of `beams` beams a row behind a prefix, which is not copied, with room for `steps` tokens of each."""
    batch, capacity = prefix.valid.shape[0], beams * steps

    def empty(buffer, fill=0):
        return jax.tree.map(lambda x: jnp.full((*x.shape[:-2], capacity, x.shape[-1]), fill, x.dtype), buffer)

    suffix = KVCache(
        keys=empty(prefix.keys),
        values=empty(prefix.values),
        positions=empty(prefix.positions),
        source=empty(prefix.source, -1),
        valid=jnp.zeros((batch, capacity), bool),
        last=prefix.last,
        offset=jnp.int32(0),
    )
    return BeamCache(prefix, suffix, jnp.zeros((batch, beams, capacity), bool))


def descend(cache: BeamCache, origin: jax.Array) -> BeamCache:
    """The cache of beams that go on from the beams origin int32 [B, G] of their row."""
    return dataclasses.replace(cache, path=jnp.take_along_axis(cache.path, origin[..., None], axis=1))


def advance_beams(cache: BeamCache) -> BeamCache:
    """After all layers stored one token a beam: each beam descends from its own."""
    batch, beams, _ = cache.path.shape
    own = jnp.broadcast_to(jnp.eye(beams, dtype=bool), (batch, beams, beams))
    return dataclasses.replace(
        cache,
        suffix=advance(cache.suffix, jnp.full((batch,), beams, jnp.int32), beams),
        path=jax.lax.dynamic_update_slice(cache.path, own, (0, 0, cache.suffix.offset)),
    )


def read(buffer, layer, length: int) -> jax.Array:
    """The first `length` tokens of one layer."""
    if isinstance(buffer, tuple):
        return buffer[layer][..., :length, :]
    size = (1, *buffer.shape[1:-2], length, buffer.shape[-1])
    return jax.lax.dynamic_slice(buffer, (layer,) + (0,) * (buffer.ndim - 1), size)[0]


def write(buffer, layer, offset, block: jax.Array):
    """The buffer with block [..., N, D] at the token `offset` of one layer."""
    if isinstance(buffer, tuple):
        at = (0,) * (block.ndim - 2) + (offset, 0)
        new = jax.lax.dynamic_update_slice(buffer[layer], block.astype(buffer[layer].dtype), at)
        return (*buffer[:layer], new, *buffer[layer + 1 :])
    at = (layer,) + (0,) * (block.ndim - 2) + (offset, 0)
    return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype)[None], at)


def attention(
    cache: KVCache | BeamCache,
    layer,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    valid: jax.Array,
    rope: Rope,
    follow: str | None = None,
    select: Select | None = None,
) -> tuple[jax.Array, KVCache | BeamCache]:
    """One layer's attention of a block of tokens over the cache and, causally, over itself; then the block is stored.

    q [B, H, N, D] and k, v [B, K, N, D] are not rotated yet; positions int32 [B, N, A]; valid bool [B, N], valid
    tokens first. `follow` moves the block behind the layer's last stored token, which compression may have moved
    (ReTaKe's re-forged positions, arXiv 2412.20504 section 3.3): "time" along the first position axis only,
    "all" along all. `select` decides what is stored; without it everything is. `valid` and `offset` of the cache move
    once for all layers, with `advance`.

    With a BeamCache the block is one token a beam, all at the same position, which sees the prefix, those that it
    descends from and itself; all are stored, and `advance_beams` moves the cache.
    """
    stored = cache.suffix if isinstance(cache, BeamCache) else cache
    if follow is not None:
        shift = (stored.last[layer] + 1 - positions[:, 0, 0])[:, None, None]
        moved = np.arange(positions.shape[-1]) < (1 if follow == "time" else positions.shape[-1])
        positions = positions + shift * moved
    rotated_q, rotated_k = rope(q, positions), rope(k, positions)
    if isinstance(cache, BeamCache):
        context = _attend_beams(cache, layer, rotated_q, rotated_k, v)
    else:
        context = _attend_prefix(cache, layer, rotated_q, Keys(rotated_k, v, valid, causal=True))
    if select is None:
        source = jnp.where(valid, jnp.arange(valid.shape[1]), -1)
        block, count = Block(rotated_k, v, positions, source), valid.sum(-1, dtype=jnp.int32)
    else:
        block, count = select(q, k, v, positions, rope, layer)
    end = jnp.take_along_axis(block.positions[..., 0], jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    offset = _once_known(context, stored.offset)
    stored = dataclasses.replace(
        stored,
        keys=write(stored.keys, layer, offset, block.k),
        values=write(stored.values, layer, offset, block.v),
        positions=write(stored.positions, layer, offset, block.positions),
        source=write(stored.source, layer, offset, block.source[..., None]),
        last=stored.last.at[layer].set(jnp.where(count > 0, end, stored.last[layer])),
    )
    return context, dataclasses.replace(cache, suffix=stored) if isinstance(cache, BeamCache) else stored


def advance(cache: KVCache, count: jax.Array, width: int) -> KVCache:
    """After all layers stored a block `width` wide, `count` [B] of it real: these become valid, the offset moves."""
    valid = jnp.arange(width) < count[:, None]
    return dataclasses.replace(
        cache,
        valid=jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.offset)),
        offset=cache.offset + count.max().astype(jnp.int32),
    )


def _once_known(context: jax.Array, offset: jax.Array) -> jax.Array:
    """offset, which waits for context.

    With nothing that orders the write behind the read XLA may copy the whole cache, for every token, to have both.
    """

    def minimum(context, offset):
        # On CPUs a barrier is gone by the time it decides; the minimum is always 0, which XLA does not find out.
        return offset + jnp.minimum(jnp.isnan(context[0, 0, 0, 0]).astype(jnp.int32), 0)

    def barrier(context, offset):  # costs no collective where context is sharded
        return jax.lax.optimization_barrier((context, offset))[1]

    return jax.lax.platform_dependent(context, offset, cpu=minimum, default=barrier)


def _attend_prefix(cache: KVCache, layer, q: jax.Array, own: Keys) -> jax.Array:
    """Attention over the shortest static prefix of the cache that holds all that is stored, and over the own block."""

    def over(length):
        past = Keys(read(cache.keys, layer, length), read(cache.values, layer, length), cache.valid[:, :length])
        return attend(q, past, own)

    if q.shape[2] == 1:  # one token: a branch costs more than it saves
        return over(cache.capacity)
    lengths = sorted({-(-cache.capacity // part) for part in PREFIXES})
    index = sum((cache.offset > length).astype(jnp.int32) for length in lengths[:-1])
    return jax.lax.switch(index, [lambda _, n=n: over(n) for n in lengths], None)


def _attend_beams(cache: BeamCache, layer, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of a row's beams, as so many queries, over the prefix, over their own pasts and each over itself."""
    prefix, suffix = cache.prefix, cache.suffix
    beams = q.shape[2]
    return attend(
        q,
        Keys(read(prefix.keys, layer, prefix.capacity), read(prefix.values, layer, prefix.capacity), prefix.valid),
        Keys(read(suffix.keys, layer, suffix.capacity), read(suffix.values, layer, suffix.capacity), cache.path),
        Keys(k, v, jnp.broadcast_to(jnp.eye(beams, dtype=bool), (q.shape[0], beams, beams))),
    )
