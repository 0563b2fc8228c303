"""ReWind's cycle against its definition in float64, one row and one frame at a time; its gradients and its cost."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from longvid_jax.errors import OptionError
from longvid_jax.memory import rewind
from longvid_jax.memory.frame_selection import density_peaks
from longvid_jax.models.perceiver import Perceiver, ReadWrite, cycle
from longvid_jax.train import flops
from tests.models import rewind_oracle
from tests.models.rewind_oracle import Oracle, randomised

close = partial(np.testing.assert_allclose, atol=1e-5, rtol=0)
SMALL = dataclasses.replace(rewind_oracle.SMALL, depth=1)  # programs are small, and how layers follow is tested there
TOKENS, WIDTH, FEATURES, PATCHES = SMALL.num_write, SMALL.width, SMALL.video_width, 5
LENGTHS = (9, 7, 2, 0)  # frames of the rows of `given`


@pytest.fixture(scope="module")
def networks():
    perceiver = randomised(lambda: Perceiver(SMALL, rngs=nnx.Rngs(0)))
    return perceiver, randomised(lambda: ReadWrite(SMALL, rngs=nnx.Rngs(0)), 1)


@pytest.fixture
def given():
    """Features [4, 9, P, W], valid, a question's outputs of BERT and which are valid."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 9, PATCHES, FEATURES)).astype(np.float32)
    words = rng.normal(size=(4, 3, SMALL.text_width)).astype(np.float32)
    return features, np.arange(9) < np.array(LENGTHS)[:, None], words, np.arange(3) < np.array([[3], [1], [2], [3]])


@partial(jax.jit, static_argnames=("clip", "truncate", "remat"))
def watch(networks, memory, features, valid, words, words_valid, *, clip=3, truncate=None, remat=False):
    perceiver, read_write = networks
    steps = cycle(perceiver, read_write, perceiver.instruct(words, words_valid))
    return rewind.watch(memory, rewind.in_clips(features, valid, clip), *steps, truncate=truncate, remat=remat)


def empty(batch, capacity=12):
    return rewind.empty(batch, capacity, TOKENS, WIDTH, SMALL.heads, jnp.float32)


def written(memory):
    """Tokens, keys and values, each [B, R, N, D]."""
    return memory.tokens, *(rearrange(x, "b h r n d -> b r n (h d)") for x in (memory.keys, memory.values))


def same(one, other, frames=None, atol=1e-6):
    np.testing.assert_array_equal(one.length, other.length)
    for a, b in zip(written(one), written(other), strict=True):
        close(a[:, :frames], b[:, :frames], atol=atol)


@pytest.mark.parametrize("clip", [3, 1])
def test_the_cycle(networks, given, clip):
    """Over several clips: full ones, one that ends early, none at all. Where nothing was written there is nothing."""
    features, valid, words, words_valid = given
    memory = watch(networks, empty(4), *given, clip=clip)
    oracle = Oracle(*networks, SMALL)
    np.testing.assert_array_equal(memory.length, LENGTHS)
    np.testing.assert_array_equal(memory.valid.sum(1), LENGTHS)
    for row, length in enumerate(LENGTHS):
        expected = oracle.watch(features[row, :length], oracle.words(words[row, words_valid[row]]), clip)
        for got, want in zip(written(memory), expected, strict=True):
            close(got[row, :length], want)
            assert not np.any(got[row, length:])


def test_keys_are_projected_once(networks, given):
    """What is stored is what would be projected from the tokens anew, each at its place in the video."""
    memory = watch(networks, empty(4), *given)

    @jax.jit
    def project(read_write, tokens):
        normed = read_write.token_norm(tokens)
        placed = normed + read_write.positions(jnp.arange(12))[:, None]
        return read_write.reading.k(placed), read_write.reading.v(normed)

    seen = np.asarray(memory.valid)
    for stored, anew in zip(written(memory)[1:], project(networks[1], memory.tokens), strict=True):
        close(np.asarray(stored)[seen], np.asarray(anew)[seen], atol=1e-6)


def test_chunking_of_the_stream(networks, given):
    """One clip at a time in a Python loop is all clips at once; the memory may grow in between."""
    features, valid, *words = given
    whole, memory = watch(networks, empty(4), *given), empty(4, 3)
    for start in (0, 3, 6):
        part = slice(start, start + 3)
        memory = watch(networks, memory, features[:, part], valid[:, part], *words)
        if memory.capacity == 3:
            memory = rewind.grow(memory, rewind.room(9, 3))
    same(memory, whole)


def test_frame_by_frame(networks, given):
    """Clips of one frame: the scan is a Python loop over frames."""
    features, valid, *words = given
    whole = watch(networks, empty(4), *given, clip=1)
    memory = empty(4)
    for n in range(9):
        memory = watch(networks, memory, features[:, n : n + 1], valid[:, n : n + 1], *words, clip=1)
    same(memory, whole)


def test_rows_are_alone(networks, given):
    """Without the others, without its padding, and beside others that watch the same video."""
    features, valid, words, words_valid = given
    memory = watch(networks, empty(4), *given)
    alone = watch(networks, empty(1), features[1:2, :7], valid[1:2, :7], words[1:2, :1], words_valid[1:2, :1])
    close(memory.tokens[1:2], alone.tokens, atol=1e-6)
    close(memory.keys[1:2], alone.keys, atol=1e-6)
    shared = watch(networks, empty(4), features[:1], np.repeat(valid[:1], 4, 0), words, words_valid)
    close(shared.tokens[0], memory.tokens[0], atol=1e-6)
    assert np.abs(shared.tokens[1] - shared.tokens[0]).max() > 1e-3  # they ask different questions


def test_what_is_not_valid_changes_nothing(networks, given):
    """Whole clips of it, anywhere, and NaN in it."""
    features, valid, *words = given
    memory = watch(networks, empty(4), *given)
    spread = np.full((4, 12, PATCHES, FEATURES), np.nan, np.float32)
    there = np.zeros((4, 12), bool)
    for start, end, place in ((0, 3, 0), (3, 9, 6)):  # all but the second of four clips
        here = slice(place, place + end - start)
        there[:, here] = valid[:, start:end]
        spread[:, here] = np.where(valid[:, start:end, None, None], features[:, start:end], np.nan)
    same(watch(networks, empty(4), spread, there, *words), memory)


# --- gradients --------------------------------------------------------------------------------------------------------


def weighted(memory):
    """A sum over all that is written."""
    return (memory.tokens * jnp.cos(jnp.arange(memory.tokens.size)).reshape(memory.tokens.shape)).sum()


@partial(jax.jit, static_argnames=("truncate", "remat"))
def gradients(networks, features, valid, words, words_valid, **how):
    """Of what is written, with respect to networks and features; and the memory."""

    def loss(networks, features):
        memory = watch(networks, empty(len(features)), features, valid, words, words_valid, **how)
        return weighted(memory), memory

    return jax.grad(loss, (0, 1), has_aux=True)(networks, features)


def test_gradients_are_the_same_when_computed_anew(networks, given):
    full, anew = gradients(networks, *given)[0], gradients(networks, *given, remat=True)[0]
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(anew), strict=True):
        assert np.isfinite(a).all()
        close(a, b, atol=1e-5 * max(1, np.abs(a).max()))
    of_features = np.abs(full[1]).sum((2, 3))
    np.testing.assert_array_equal(of_features > 0, given[1])  # from every frame, and from no padding


def test_truncated_gradients_stop(networks, given):
    """Nothing flows into clips before a row's last one; it is the gradient with those clips' memory held fixed."""
    features, valid, *words = given
    (_, of_features), memory = gradients(networks, *given, truncate=1)
    last = np.arange(9) >= np.array([6, 6, 0, 0])[:, None]  # the rows' last clips begin there
    np.testing.assert_array_equal(np.abs(of_features).sum((2, 3)) > 0, valid & last)
    same(memory, watch(networks, empty(4), *given))

    early = empty(4)
    for start in (0, 3):
        part = slice(start, start + 3)
        early = watch(networks, early, features[:, part], valid[:, part], *words)
    held = jax.jit(jax.grad(lambda x: weighted(watch(networks, early, x, valid[:, 6:], *words))))
    expected = held(features[:, 6:])
    close(of_features[:2, 6:], expected[:2], atol=1e-5 * np.abs(expected).max())


# --- cost -------------------------------------------------------------------------------------------------------------


def program(networks, frames, capacity, patches=7, clip=4):
    """The program for a video; 29 frames of memory, 58 tokens, are no other size in it."""
    shapes = (1, frames, patches, FEATURES), (1, frames), (1, 3, SMALL.text_width), (1, 3)
    kinds = (np.float32, bool, np.float32, bool)
    args = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    memory = jax.eval_shape(lambda: empty(1, capacity))
    return jax.make_jaxpr(partial(watch, clip=clip))(networks, memory, *args).jaxpr


def test_cost_is_linear(networks):
    """In frames, and in READ alone in the memory's capacity."""

    def count(*sizes):
        return flops.count(program(networks, *sizes))

    instruct = 2 * 3 * SMALL.text_width * WIDTH  # once a question
    for capacity in (32, 64):
        once, twice = (count(frames, capacity) - instruct for frames in (16, 32))
        assert twice == 2 * once
    queries = SMALL.num_queries + 1
    read = 2 * 2 * queries * WIDTH * TOKENS  # of a clip, for each frame of the memory: logits and values
    assert count(16, 64) - count(16, 32) == (16 // 4) * 32 * read


def test_no_attention_between_stream_and_memory(networks):
    """No matrix product has both of them in its result, nor patches twice."""

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.outvars[0].aval.shape
            for value in equation.params.values():
                for inner in flops._jaxprs(value):
                    yield from products(inner)

    shapes = list(products(program(networks, 16, 29)))
    patches, memory = {7, 4 * 7}, {29, 29 * TOKENS}
    assert any(memory & set(shape) for shape in shapes)  # READ
    assert any(patches & set(shape) for shape in shapes)  # PERCEIVE
    for shape in shapes:
        assert not (memory & set(shape) and patches & set(shape)), shape
        assert sum(size in patches for size in shape) < 2, shape


# --- looking back -----------------------------------------------------------------------------------------------------


def test_select(networks, given):
    """Scores against a softmax written out; candidates the best of them, and of those the density peaks."""
    memory = watch(networks, empty(4), *given)
    perceiver, read_write = networks
    q = jax.jit(lambda *words: read_write.queries(perceiver.instruct(*words).pooled[:, None]))(*given[2:])
    select = jax.jit(partial(rewind.select, num_candidates=5, num_select=3, num_neighbors=2))
    peaks_of = jax.jit(partial(density_peaks, num_neighbors=2, num_select=3))
    scores, (candidates, selected) = select(memory, q)
    for row, length in enumerate(LENGTHS):
        expected = np.zeros(12)
        for head in range(SMALL.heads):
            weights = np.exp(np.float64(memory.keys[row, head, :length]) @ np.float64(q[row, head, 0]) / 2)
            expected[:length] += (weights / weights.sum()).sum(1) if length else 0
        close(scores[row], expected)
        best = sorted(sorted(range(length), key=lambda n, scores=scores[row]: -scores[n])[:5])
        np.testing.assert_array_equal(candidates.indices[row, : len(best)], best)
        assert candidates.valid[row].sum() == len(best)
        mean = np.asarray(memory.tokens[row, best], np.float64).mean(1)
        mean = np.float32(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
        if best:
            peaks = peaks_of(mean[None], np.ones((1, len(best)), bool))
            expected = np.array(best)[peaks.indices[0]]
            np.testing.assert_array_equal(selected.indices[row][selected.valid[row]], expected[peaks.valid[0]])
    assert not selected.valid[3].any()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("grid", "count", "cells"),
    [((16, 16), 32, (8, 4)), ((16, 16), 16, (4, 4)), ((9, 14), 6, (2, 3)), ((5, 3), 32, (8, 4)), ((4, 7), 1, (1, 1))],
)
def test_pooling(grid, count, cells):
    """As torch's adaptive average pooling, from and to any sizes."""
    import torch

    features = np.random.default_rng(0).normal(size=(2, 3, math.prod(grid), 4)).astype(np.float32)
    assert rewind.cells(grid, count) == cells
    square = torch.tensor(features).reshape(6, *grid, 4).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(square, cells).permute(0, 2, 3, 1).reshape(2, 3, count, 4)
    close(rewind.pool(features, grid, count), expected.numpy(), atol=1e-6)
    assert rewind.pool(jnp.asarray(features, jnp.bfloat16), grid, count).dtype == jnp.bfloat16


def test_room():
    assert [rewind.room(n) for n in (0, 64, 65, 128, 1000)] == [64, 64, 128, 128, 1024]
    assert rewind.room(97, 96) == 192


def test_what_cannot_be(networks, given):
    with pytest.raises(OptionError, match="room for 6 frames, but 9 are given"):
        watch(networks, empty(4, 6), *given)
    with pytest.raises(OptionError, match="truncate is 0, but must be a positive number of clips"):
        watch(networks, empty(4), *given, truncate=0)
    with pytest.raises(OptionError, match="5 features a frame are no grid of 2 x 2 patches"):
        rewind.pool(given[0], (2, 2), 1)
