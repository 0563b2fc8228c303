"""PivotKV against NumPy: scores, pivots, selection, re-forged positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.memory import pivotkv
from longvid_jax.ops.rope import Rope

RNG = np.random.default_rng(0)
HEADS, KV_HEADS, WIDTH = 4, 2, 8
scores = jax.jit(pivotkv.scores)
keep = jax.jit(pivotkv.keep, static_argnames="pivots")
reforge = jax.jit(pivotkv.reforge)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def numpy_scores(q, k):
    """eq. 6 for one row, as the authors' code has it: q [H, N, D], k [K, C, D] -> [C]."""
    shared = np.repeat(k.astype(np.float64), q.shape[0] // k.shape[0], axis=0)
    logits = np.einsum("hnd,hcd->hnc", q.astype(np.float64), shared) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights.sum(1).mean(0)


def numpy_keep(scores, count, is_pivot=None, pivots="mean"):
    """Sorted indices of the best of one row; Python's sort is stable, so ties stay in order."""
    if is_pivot is not None and pivots == "mean":
        scores = np.where(is_pivot, 1.0, scores)
    first = np.zeros(len(scores), bool) if is_pivot is None or pivots == "mean" else is_pivot
    return sorted(sorted(range(len(scores)), key=lambda i: (not first[i], -scores[i]))[:count])


def grid_positions(frames, rows, columns, start):
    """M-RoPE's positions [frames * rows * columns, 3] of a piece of video."""
    where = np.stack(np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    return (where.reshape(-1, 3) + start).astype(np.int32)


LENGTHS = (40, 23, 1)


@pytest.fixture(scope="module")
def chunk():
    """A batch of chunks of different lengths, padded with large values."""
    q, k = normal(3, HEADS, 40, WIDTH), normal(3, KV_HEADS, 40, WIDTH)
    for row, length in enumerate(LENGTHS):
        q[row, :, length:], k[row, :, length:] = 30, 30
    return q, k, np.arange(40) < np.array(LENGTHS)[:, None]


def test_scores_equal_numpy_and_their_mean_is_one(chunk):
    q, k, valid = chunk
    got = scores(q, k, valid)
    assert got.dtype == jnp.float32
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            got[row, :length], numpy_scores(q[row, :, :length], k[row, :, :length]), atol=1e-5, rtol=0
        )
        np.testing.assert_allclose(got[row, :length].mean(), 1, atol=1e-5)
        np.testing.assert_array_equal(got[row, length:], 0)


def test_scores_have_no_causal_mask(chunk):
    """Turning a chunk around turns its scores around."""
    q, k, valid = (x[:1] for x in chunk)
    np.testing.assert_allclose(scores(q[:, :, ::-1], k[:, :, ::-1], valid), scores(q, k, valid)[:, ::-1], atol=1e-5)


def test_prompt_guided_scores(chunk):
    _, k, valid = chunk
    prompt, real = normal(3, HEADS, 9, WIDTH), np.arange(9) < np.array([9, 4, 1])[:, None]
    got = scores(prompt, k, valid, real)
    for row, length in enumerate(LENGTHS):
        expected = numpy_scores(prompt[row, :, real[row]].swapaxes(0, 1), k[row, :, :length])
        np.testing.assert_allclose(got[row, :length], expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(got[row].sum(), real[row].sum(), rtol=1e-5)


@pytest.mark.parametrize("pivots", ["mean", "always", None])
@pytest.mark.parametrize("ties", [False, True])
def test_what_is_kept_equals_numpy(pivots, ties):
    made = RNG.integers(0, 3, (20, 31)) / 2 + 0.25 if ties else RNG.random((20, 31)) * 2
    made = made.astype(np.float32)
    length, is_pivot = RNG.integers(1, 32, 20), RNG.random((20, 31)) < 0.35
    count = np.array([RNG.integers(1, n + 1) for n in length])
    valid = np.arange(31) < length[:, None]
    got = keep(np.where(valid, made, 9), None if pivots is None else is_pivot, count, valid, pivots=pivots or "mean")
    np.testing.assert_array_equal(got.count, count)
    for row in range(20):
        real = slice(length[row])
        pivot = None if pivots is None else is_pivot[row, real]
        expected = numpy_keep(made[row, real], count[row], pivot, pivots)
        np.testing.assert_array_equal(got.indices[row, : count[row]], expected)
        np.testing.assert_array_equal(np.flatnonzero(got.mask[row]), expected)


def test_mean_gives_pivots_the_average_score_and_no_slot():
    """Pivots at 1 lose against better tokens and win against worse ones; among themselves the earlier wins."""
    made = np.array([[1.5, 0.2, 0.999, 1.001, 0.1, 2.1]], np.float32)
    pivot = np.array([[False, True, False, False, True, False]])
    for count, expected in ((3, [0, 3, 5]), (4, [0, 1, 3, 5]), (5, [0, 1, 3, 4, 5])):
        got = keep(made, pivot, np.array([count]), np.ones((1, 6), bool), pivots="mean")
        np.testing.assert_array_equal(got.indices[0, :count], expected)


def test_always_keeps_the_best_pivots_where_there_are_more_than_the_budget():
    made = np.array([[0.5, 0.2, 3.0, 0.2, 0.7, 2.1]], np.float32)
    pivot = np.array([[True, True, False, True, True, False]])
    for count, expected in ((1, [4]), (2, [0, 4]), (3, [0, 1, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])):
        got = keep(made, pivot, np.array([count]), np.ones((1, 6), bool), pivots="always")
        np.testing.assert_array_equal(got.indices[0, :count], expected)


@pytest.mark.parametrize("pivots", ["mean", "always"])
def test_invalid_tokens_are_never_kept_even_as_pivots(pivots):
    valid = np.arange(10) < np.array([[4], [0]])
    got = keep(np.full((2, 10), 5.0, np.float32), np.ones((2, 10), bool), np.array([10, 10]), valid, pivots=pivots)
    np.testing.assert_array_equal(got.mask, valid)
    np.testing.assert_array_equal(got.count, [4, 0])


def test_the_example_of_the_papers_code_for_reforged_positions():
    """4 patches of 4 tokens at t = 20..23, half of them kept: 20 20 20 20 21 21 21 21, the next chunk from 22."""
    positions = grid_positions(4, 2, 2, 20)[None]
    kept = positions[:, [0, 2, 5, 7, 8, 10, 13, 15]]
    got = np.asarray(reforge(kept, np.array([8]), np.array([16])))
    np.testing.assert_array_equal(got[0, :, 0], [20] * 4 + [21] * 4)
    np.testing.assert_array_equal(got[..., 1:], kept[..., 1:])
    assert got[0, -1, 0] + 1 == 22


@pytest.mark.parametrize(("kept", "total"), [(1, 16), (5, 16), (7, 48), (16, 16), (2304 // 3, 2304)])
def test_reforged_positions_are_integer_arithmetic(kept, total):
    """min + floor((p - min) kept / total), also where the float quotient would round down a whole number."""
    time = np.sort(RNG.integers(1000, 1000 + total, kept)).astype(np.int32)
    positions = np.stack([time, RNG.integers(0, 9, kept), RNG.integers(0, 9, kept)], axis=-1).astype(np.int32)[None]
    expected = [int(time[0]) + (int(t) - int(time[0])) * kept // total for t in time]
    got = reforge(positions, np.array([kept]), np.array([total]))
    np.testing.assert_array_equal(got[0, :, 0], expected)
    np.testing.assert_array_equal(got[..., 1:], positions[..., 1:])


ROPE = Rope(WIDTH, sections=(1, 1, 2))


def numpy_rope(x, positions):
    """M-RoPE of x [heads, N, D] at positions [N, 3]."""
    frequencies = ROPE.theta ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
    angles = positions[:, [0, 1, 2, 2]] * frequencies
    a, b = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


@pytest.mark.parametrize("pivots", ["mean", "always"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("reforged", [True, False])
def test_a_chunk_is_compressed_as_in_numpy_each_row_for_itself(pivots, guided, reforged):
    """Rows of different lengths and counts, against each alone, step by step as PivotKVCache.update does it."""
    frames, counts, prompt = (6, 3, 1), (11, 5, 1), (5, 2, 3)
    width = 6 * 4 + (5 if guided else 0)
    q, k, v = normal(3, HEADS, width, WIDTH), normal(3, KV_HEADS, width, WIDTH), normal(3, KV_HEADS, width, WIDTH)
    valid = np.arange(24) < 4 * np.array(frames)[:, None]
    is_pivot = RNG.random((3, 24)) < 0.35
    positions = np.stack([grid_positions(6, 2, 2, start) for start in (20, 7, 0)])
    if guided:
        behind = np.repeat(np.arange(5)[None, :, None] + 40, 3, axis=2).astype(np.int32)
        positions = np.concatenate([positions, np.repeat(behind, 3, axis=0)], axis=1)
    query_valid = np.arange(5) < np.array(prompt)[:, None] if guided else None

    @jax.jit
    def run(q, k, v, positions, count, valid, is_pivot, query_valid):
        select = pivotkv.compress(count, valid, is_pivot, pivots=pivots, reforged=reforged, query_valid=query_valid)
        return select(q, k, v, positions, ROPE, 0)

    block, kept_count = run(q, k, v, positions, np.array(counts), valid, is_pivot, query_valid)
    np.testing.assert_array_equal(kept_count, counts)
    for row in range(3):
        total, count = 4 * frames[row], counts[row]
        asking = slice(24, 24 + prompt[row]) if guided else slice(total)
        scoring_q, scoring_k = q[row, :, asking], k[row, :, :total]
        if not reforged:
            scoring_q = numpy_rope(scoring_q, positions[row, asking])
            scoring_k = numpy_rope(scoring_k, positions[row, :total])
        at = numpy_keep(numpy_scores(scoring_q, scoring_k), count, is_pivot[row, :total], pivots)
        moved = positions[row, at].copy()
        if reforged:
            moved[:, 0] = moved[0, 0] + (moved[:, 0] - moved[0, 0]) * count // total
        np.testing.assert_array_equal(block.source[row], [*at, *[-1] * (24 - count)])
        np.testing.assert_array_equal(block.positions[row, :count], moved)
        np.testing.assert_array_equal(block.v[row, :, :count], v[row][:, at])
        np.testing.assert_allclose(block.k[row, :, :count], numpy_rope(k[row][:, at], moved), atol=1e-5, rtol=0)


def test_random_tokens_are_drawn_fairly_and_again():
    """As many as are asked for, of the valid ones, each equally often; others by row and layer, the same by key."""
    rows, chunk, count = 400, 12, 4
    q, k = normal(rows, HEADS, chunk, WIDTH), normal(rows, KV_HEADS, chunk, WIDTH)
    valid = np.broadcast_to(np.arange(chunk) < 9, (rows, chunk))
    positions = np.broadcast_to(grid_positions(3, 2, 2, 5), (rows, chunk, 3))

    @jax.jit
    def draw(seed, layer):
        select = pivotkv.compress(np.full(rows, count), valid, None, random=jax.random.key(seed))
        block, kept_count = select(q, k, k, positions, ROPE, layer)
        return block.source, kept_count

    source, kept_count = draw(0, 0)
    np.testing.assert_array_equal(kept_count, count)
    assert (np.diff(source[:, :count]) > 0).all() and (source[:, count:] == -1).all()
    often = np.bincount(np.asarray(source)[:, :count].ravel(), minlength=chunk)
    assert (often[9:] == 0).all() and np.abs(often[:9] / rows - count / 9).max() < 0.1  # 4 standard deviations
    np.testing.assert_array_equal(draw(0, 0)[0], source)
    for other in (draw(1, 0)[0], draw(0, 1)[0], np.roll(source, 1, axis=0)):
        assert (np.asarray(other) != source).any(1).mean() > 0.9
