"""A preallocated cache: whatever way tokens go in, what comes out is the full forward pass."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longvid_jax.generate import decode
from longvid_jax.models.llama import Decoder, DecoderConfig, forward
from longvid_jax.ops import kv_cache
from longvid_jax.ops.rope import Rope

RNG = np.random.default_rng(0)
VOCAB, BATCH = 90, 2
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    ff_width=48,
    norm_eps=1e-6,
    qkv_bias=True,
    o_bias=False,
    tied=False,
    rope=Rope(8),
)
IDS = RNG.integers(0, VOCAB, (BATCH, 140))


@pytest.fixture(scope="module", params=[False, True], ids=["tuple", "stacked"])
def decoder(request):
    leaves, structure = jax.tree.flatten(
        jax.eval_shape(lambda: Decoder(CONFIG, stacked=request.param, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape) * 0.15, jnp.float32) for x in leaves])


@pytest.fixture(scope="module")
def expected(decoder):
    return np.asarray(jax.jit(forward)(decoder, IDS))


@jax.jit
def step(decoder, cache, ids, positions, valid):
    """Logits of a block of tokens, and the cache behind it."""
    hidden, cache = decoder(decoder.embed(ids), positions[..., None], valid, cache)
    count = valid.sum(-1, dtype=jnp.int32)
    return decoder.logits(hidden), kv_cache.advance(cache, count, ids.shape[1])


def feed(decoder, counts, capacity, expected, *, width=None, grow=()):
    """Feeds each row the next counts[step][row] tokens in blocks as wide as the largest, or `width`; checks logits."""
    cache = decoder.empty_cache(BATCH, capacity)
    at = np.zeros(BATCH, int)
    for index, count in enumerate(np.broadcast_to(np.array(counts).reshape(len(counts), -1), (len(counts), BATCH))):
        if index in grow:
            cache = kv_cache.grow(cache, grow[index])
        size = width or int(count.max())
        valid = np.arange(size) < count[:, None]
        where = at[:, None] + np.arange(size)
        ids = np.where(valid, np.take_along_axis(IDS, np.minimum(where, IDS.shape[1] - 1), axis=1), 7)
        got, cache = step(decoder, cache, ids, where, valid)
        for row in range(BATCH):
            real = slice(at[row], at[row] + count[row])
            np.testing.assert_allclose(got[row, : count[row]], expected[row, real], atol=2e-5, rtol=0)
        at += count
    np.testing.assert_array_equal(cache.valid.sum(-1), at)
    return cache


def test_prefill_at_once(decoder, expected):
    cache = feed(decoder, [16], 128, expected)
    assert int(cache.offset) == 16
    np.testing.assert_array_equal(cache.last, np.full((2, 2), 15))


def test_chunks_of_any_size_and_then_single_tokens_fill_it_to_the_brim(decoder, expected):
    """Offsets 0, 8, 16, 24, 32 (the prefixes' very lengths) and all between: each of the four prefixes is attended."""
    feed(decoder, [8, 8, 8, 8, 1, 8, 8, *[1] * 15], 64, expected)


def test_every_prefix_is_chosen_where_it_is_needed_and_no_longer_one(decoder, monkeypatch):
    lengths, original = [], kv_cache.read

    def read(buffer, layer, length):
        lengths.append(length)
        return original(buffer, layer, length)

    monkeypatch.setattr(kv_cache, "read", read)
    cache, ids = decoder.empty_cache(BATCH, 64), IDS[:, :8]
    offered = jax.make_jaxpr(lambda cache: decoder(decoder.embed(ids), ids[..., None], ids > -1, cache)[0])(cache)
    assert sorted(set(lengths)) == [8, 16, 32, 64]
    assert "cond" in str(offered)

    # A NaN value spoils all queries that read it, masked or not: it shows which prefix was read.
    positions, valid = np.arange(8)[None].repeat(2, 0), np.ones((2, 8), bool)
    for offset, longest in ((0, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (56, 64)):
        for end in (longest - 1, longest):
            if end == 64:
                continue

            def spoil(x, end=end):
                return x.at[..., end, :].set(jnp.nan)

            spoiled = dataclasses.replace(cache, values=jax.tree.map(spoil, cache.values), offset=jnp.int32(offset))
            got, _ = step(decoder, spoiled, ids, positions, valid)
            assert bool(jnp.isnan(got).any()) == (end < longest), (offset, end)


def test_ragged_rows_leave_holes_that_nobody_sees(decoder, expected):
    counts = [[16, 11], [5, 16], [0, 16], [16, 0], [1, 1], [16, 3], [1, 1], [1, 0], [0, 1]]
    cache = feed(decoder, counts, 128, expected, width=16)
    assert int(cache.offset) == sum(max(pair) for pair in counts)
    np.testing.assert_array_equal(cache.last, np.sum(counts, axis=0)[None].repeat(2, 0) - 1)
    source = cache.source if isinstance(cache.source, tuple) else list(cache.source)
    for layer in source:  # what is stored says which token of its block it is
        stored = np.asarray(layer)[..., 0]
        for row in range(BATCH):
            blocks = [np.arange(pair[row]) for pair in counts]
            np.testing.assert_array_equal(stored[row][np.asarray(cache.valid[row])], np.concatenate(blocks))


def test_a_cache_may_grow_in_between(decoder, expected):
    cache = feed(decoder, [8, 8, 5, 16, 16, 16, 1], 64, expected, width=16, grow={3: 128})
    assert cache.capacity == 128
    assert not cache.valid[:, 70:].any()


def test_stored_positions_and_keys(decoder):
    """Rotated keys at their positions, in the first layer: they come from the embedding alone."""
    cache = decoder.empty_cache(BATCH, 64)  # shapes that were compiled before
    positions = np.arange(8)[None].repeat(2, 0) + np.array([[3], [40]])
    _, cache = step(decoder, cache, IDS[:, :8], positions, np.ones((2, 8), bool))
    layer = decoder.layers[0] if isinstance(decoder.layers, tuple) else jax.tree.map(lambda x: x[0], decoder.layers)
    _, k, v = layer.attention.project(layer.attention_norm(decoder.embed(IDS[:, :8])))
    np.testing.assert_allclose(cache.keys[0][:, :, :8], CONFIG.rope(k, positions[..., None]), atol=1e-5)
    np.testing.assert_allclose(cache.values[0][:, :, :8], v, atol=1e-5)
    np.testing.assert_array_equal(cache.positions[0][:, :8, 0], positions)
    np.testing.assert_array_equal(cache.keys[0][:, :, 8:], 0)


def test_a_block_follows_the_layers_last_token():
    """A layer whose last stored position is 21 moves the next block to 22: all that it does is as if it had come so."""
    rope = Rope(8, sections=(1, 1, 2))
    q, k, v = (RNG.normal(size=(1, heads, 3, 8)).astype(np.float32) for heads in (4, 2, 2))
    cache = kv_cache.empty(2, 1, 2, 8, 8, 3, jnp.float32, stacked=True)
    cache = dataclasses.replace(cache, last=jnp.array([[5], [21]], jnp.int32))
    given, valid = np.array([[[24, 6, 7], [24, 6, 8], [25, 6, 7]]]), np.ones((1, 3), bool)

    @partial(jax.jit, static_argnames="follow")
    def run(positions, follow):
        return kv_cache.attention(cache, 1, q, k, v, positions=positions, valid=valid, rope=rope, follow=follow)

    for follow, shift in (("time", [2, 0, 0]), ("all", [2, 2, 2])):
        got, expected = run(given, follow), run(given - np.array(shift), None)
        np.testing.assert_array_equal(got[1].positions[1, 0, :3], given[0] - shift)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def test_what_select_stores_is_what_is_attended_later():
    """Keeping some tokens of a block equals masking the others from all that follow."""
    rope = Rope(8)
    kept, count = np.array([[1, 2, 6, 0], [0, 5, 3, 4]]), np.array([3, 2])
    first, later = ([RNG.normal(size=(2, h, n, 8)).astype(np.float32) for h in (4, 2, 2)] for n in (8, 5))

    def select(q, k, v, positions, rope, layer):
        at = kept[:, None, :, None]
        k, v = jnp.take_along_axis(rope(k, positions), at, axis=2), jnp.take_along_axis(v, at, axis=2)
        positions = jnp.take_along_axis(positions, kept[..., None], axis=1)
        return kv_cache.Block(k, v, positions, jnp.asarray(kept)), jnp.asarray(count, jnp.int32)

    @partial(jax.jit, static_argnames="select")
    def run(cache, qkv, start, valid, select=None):
        positions = (start + np.arange(valid.shape[1]))[None, :, None].repeat(2, 0)
        return kv_cache.attention(cache, 0, *qkv, positions=positions, valid=valid, rope=rope, select=select)

    empty = kv_cache.empty(1, 2, 2, 32, 8, 1, jnp.float32, stacked=False)
    all_valid, later_valid = np.ones((2, 8), bool), np.ones((2, 5), bool)
    whole, stored = run(empty, first, 0, all_valid, select)
    plain, full = run(empty, first, 0, all_valid)
    np.testing.assert_array_equal(whole, plain)  # the block itself sees all of its tokens
    np.testing.assert_array_equal(stored.last, [[6, 5]])
    stored = kv_cache.advance(stored, jnp.asarray(count), 4)
    assert int(stored.offset) == 3
    masked = np.zeros((2, 32), bool)
    for row in range(2):
        masked[row, kept[row, : count[row]]] = True
    full = dataclasses.replace(full, valid=jnp.asarray(masked), offset=jnp.int32(8))
    got, expected = run(stored, later, 8, later_valid)[0], run(full, later, 8, later_valid)[0]
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


def bytes_of(cache):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def memory_of(depth, stacked, batch, length):
    """Memory analysis of a compiled step over a cache of 16384 tokens, which is donated; and the cache's bytes."""
    config = dataclasses.replace(CONFIG, width=256, depth=depth, heads=8, kv_heads=4, rope=Rope(64))
    model = jax.eval_shape(lambda: Decoder(config, stacked=stacked, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: model.empty_cache(batch, 16384))
    ids, valid = (jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, bool))
    lowered = jax.jit(step.__wrapped__, donate_argnums=1).lower(model, cache, ids, ids, valid)
    return lowered.compile().memory_analysis(), bytes_of(cache)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("stacked", "depth"), [(False, 4), (True, 28)], ids=["tuple", "stacked"])
def test_decoding_does_not_copy_the_cache(stacked, depth, batch):
    """Temporaries of a step stay below 5 % of the cache, updated in place; a scan slices one layer out of a stack."""
    analysis, size = memory_of(depth, stacked, batch, 1)
    assert analysis.temp_size_in_bytes < 0.05 * size
    assert analysis.alias_size_in_bytes > 0.99 * size


def test_a_chunk_copies_no_more_than_a_layer():
    """The attended prefix of one layer's keys and values is all that a longer block may copy."""
    analysis, size = memory_of(4, False, 1, 4)
    assert analysis.temp_size_in_bytes < 0.25 * size
    assert analysis.alias_size_in_bytes > 0.99 * size


@pytest.mark.parametrize("batch", [1, 2])
def test_the_decoding_loop_does_not_copy_the_cache(batch):
    config = dataclasses.replace(CONFIG, width=256, depth=4, heads=8, kv_heads=4, rope=Rope(64))
    model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: model.empty_cache(batch, 16384))

    def run(model, cache, logits, key):
        def next_token(cache, tokens):
            positions = jnp.broadcast_to(cache.offset, (batch, 1))
            logits, cache = step(model, cache, tokens[:, None], positions, jnp.ones((batch, 1), bool))
            return cache, logits[:, 0]

        return decode(next_token, cache, logits, max_new_tokens=8, stop_tokens=jnp.array([2]), key=key)

    logits = jax.ShapeDtypeStruct((batch, VOCAB), jnp.float32)
    lowered = jax.jit(run, donate_argnums=1).lower(model, cache, logits, jax.eval_shape(lambda: jax.random.key(0)))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.05 * bytes_of(cache)
