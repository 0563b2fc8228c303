"""Relevance and density peaks against their definitions, written with loops in float64 (and decimals, for exp)."""

from decimal import Decimal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.memory import frame_selection

relevance = jax.jit(frame_selection.relevance)
density_peaks = jax.jit(frame_selection.density_peaks, static_argnames=("num_neighbors", "num_select"))
select_frames = jax.jit(
    frame_selection.select_frames, static_argnames=("num_candidates", "num_select", "num_neighbors")
)


# What the functions must give, one row at a time.


def best(scores, points, count) -> list[int]:
    """Of some points, the `count` of largest score, in order; Python's sort is stable, so ties go to the earlier."""
    return sorted(sorted(points, key=lambda i: -scores[i])[:count])


def numpy_relevance(q, k, valid, query_valid):
    heads, frames = q.shape[0], len(valid)
    group, per_frame = heads // k.shape[0], k.shape[1] // len(valid)
    there = [n for n in range(k.shape[1]) if valid[n // per_frame]]
    queries = np.flatnonzero(query_valid)
    scores = np.zeros(frames)
    for head in range(heads):
        for s in queries:
            logits = [k[head // group, n].astype(np.float64) @ q[head, s] / np.sqrt(q.shape[-1]) for n in there]
            weights = np.exp(np.array(logits) - max(logits, default=0))
            for n, weight in zip(there, weights / weights.sum(), strict=True):
                scores[n // per_frame] += weight / len(queries)
    return scores


def numpy_density_peaks(features, valid, num_neighbors, num_select) -> list[int]:
    x = features.astype(np.float64)
    points = [i for i in range(len(x)) if valid[i]]
    if len(points) <= num_select:
        return points
    sigma, product = {}, {}
    for i in points:
        squared = sorted(((x[i] - x[j]) ** 2).sum() for j in points if j != i)[:num_neighbors]
        sigma[i] = (-Decimal(float(sum(squared) / len(squared)))).exp()  # does not underflow
    for i in points:
        denser = [j for j in points if sigma[j] > sigma[i] or (sigma[j] == sigma[i] and j < i)]
        distances = {j: float(np.sqrt(((x[i] - x[j]) ** 2).sum())) for j in points}
        rho = min(distances[j] for j in denser) if denser else max(distances.values())
        product[i] = sigma[i] * Decimal(rho)
    return best(product, points, num_select)


def check(chosen, rows, width, size):
    """`rows` were chosen; what is behind them is masked and points at something."""
    assert chosen.indices.shape == chosen.valid.shape == (len(rows), width)
    assert chosen.indices.dtype == jnp.int32
    for indices, mask, row in zip(np.asarray(chosen.indices), np.asarray(chosen.valid), rows, strict=True):
        np.testing.assert_array_equal(indices[: len(row)], row)
        np.testing.assert_array_equal(mask, np.arange(width) < len(row))
        assert ((indices >= 0) & (indices < size)).all()


def check_peaks(features, valid, num_select, num_neighbors=5):
    chosen = density_peaks(features, valid, num_neighbors=num_neighbors, num_select=num_select)
    rows = [numpy_density_peaks(x, v, num_neighbors, num_select) for x, v in zip(features, valid, strict=True)]
    check(chosen, rows, num_select, valid.shape[1])
    return rows


def gaussian(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def grid(rng, *shape):
    """Whole numbers in few dimensions: their squared distances are exact, and many are equal."""
    return rng.integers(0, 3, shape).astype(np.float32)


def clustered(rng, *shape):
    """Scenes of different lengths, whose frames are alike."""
    centres = rng.normal(size=(shape[0], 6, shape[2]))
    scene = np.sort(rng.choice(6, shape[:2], p=[0.4, 0.25, 0.15, 0.1, 0.05, 0.05]), axis=1)
    return (np.take_along_axis(centres, scene[..., None], 1) + 0.1 * rng.normal(size=shape)).astype(np.float32)


# Relevance.


@pytest.mark.parametrize(("heads", "kv_heads", "queries", "per_frame"), [(12, 12, 1, 2), (4, 2, 5, 1), (2, 1, 3, 4)])
def test_relevance_is_the_attention_that_a_frame_draws(rng, heads, kv_heads, queries, per_frame):
    batch, frames, width = 4, 9, 8
    q, k = gaussian(rng, batch, heads, queries, width) * 2, gaussian(rng, batch, kv_heads, frames * per_frame, width)
    valid, query_valid = rng.random((batch, frames)) < 0.6, rng.random((batch, queries)) < 0.6
    valid[:, 2] = query_valid[:, 0] = True
    expected = np.stack([numpy_relevance(*row) for row in zip(q, k, valid, query_valid, strict=True)])
    got = relevance(q, k, valid, query_valid)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.sum(1), heads, rtol=1e-6)
    np.testing.assert_array_equal(got == 0, ~valid)

    all_count = np.stack([numpy_relevance(*row, np.ones(queries)) for row in zip(q, k, valid, strict=True)])
    np.testing.assert_allclose(relevance(q, k, valid), all_count, rtol=1e-5, atol=1e-6)


def test_relevance_does_not_depend_on_padding_or_batch(rng):
    q, k = gaussian(rng, 3, 4, 2, 8), gaussian(rng, 3, 4, 12, 8)
    valid = np.arange(6) < np.array([[4], [6], [1]])
    query_valid = np.array([[True, False], [True, True], [False, True]])
    got = relevance(q, k, valid, query_valid)
    nan = relevance(
        np.where(query_valid[:, None, :, None], q, np.nan),
        np.where(valid.repeat(2, 1)[:, None, :, None], k, np.nan),
        valid,
        query_valid,
    )
    np.testing.assert_array_equal(got, nan)
    for row in range(3):
        one = slice(row, row + 1)
        np.testing.assert_allclose(relevance(q[one], k[one], valid[one], query_valid[one]), got[one], rtol=1e-6)
    short = relevance(q[:1, :, :1], k[:1, :, :8], valid[:1, :4])
    np.testing.assert_allclose(short, got[:1, :4], rtol=1e-6)


def test_relevance_of_no_frames_or_no_queries_is_zero(rng):
    q, k = gaussian(rng, 2, 4, 2, 8), gaussian(rng, 2, 4, 6, 8)
    valid, query_valid = np.array([[False] * 3, [True] * 3]), np.array([[True] * 2, [False] * 2])
    np.testing.assert_array_equal(relevance(q, k, valid, query_valid), np.zeros((2, 3)))


def test_relevance_of_equal_keys_is_equal_and_logits_may_be_large(rng):
    q = gaussian(rng, 1, 4, 1, 8)
    np.testing.assert_allclose(relevance(q, np.ones((1, 4, 10, 8), np.float32), np.ones((1, 5), bool)), 4 / 5, 1e-6)
    k = gaussian(rng, 1, 4, 10, 8)
    got = relevance(q * 1e4, k, np.ones((1, 5), bool))
    expected = numpy_relevance((q * np.float32(1e4))[0], k[0], np.ones(5), np.ones(1))
    np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-6)


# Density peaks.


@pytest.mark.parametrize("made", [gaussian, unit, clustered])
@pytest.mark.parametrize(("size", "width"), [(64, 768), (64, 5)])
def test_density_peaks(rng, made, size, width):
    features, valid = made(rng, 4, size, width), rng.random((4, size)) < 0.7
    valid[0] = True
    check_peaks(features, valid, 8)


@pytest.mark.parametrize(("num_neighbors", "num_select"), [(1, 1), (5, 3), (5, 8), (100, 3)])
def test_ties_and_copies_go_to_the_earlier(rng, num_neighbors, num_select):
    check_peaks(
        np.concatenate([grid(rng, 8, 20, 2), grid(rng, 8, 20, 2) * [1, 0]]).astype(np.float32),
        rng.random((16, 20)) < 0.8,
        num_select,
        num_neighbors,
    )


def test_points_that_are_all_alike(rng):
    """Every point is as far from every other: all have the same density, and the same distance to a denser one."""
    for size in (5, 33):
        valid = rng.random((3, size)) < 0.8
        valid[:, :2] = True
        rows = check_peaks(np.broadcast_to(np.eye(size, dtype=np.float32), (3, size, size)), valid, 4)
        for row, there in zip(rows, valid, strict=True):
            assert row == [*np.flatnonzero(there)[:4]]


@pytest.mark.parametrize("width", [3, 768])
def test_of_copies_the_first_is_chosen_before_a_second(rng, width):
    different = gaussian(rng, 5, width)
    features = different[rng.permutation(np.repeat(np.arange(5), 6))][None]
    (row,) = check_peaks(features, np.ones((1, 30), bool), 5)
    assert len(np.unique(features[0, row], axis=0)) == 5
    (row,) = check_peaks(features, np.ones((1, 30), bool), 8)  # and then in order of time
    assert len(np.unique(features[0, row], axis=0)) == 5


def test_all_copies_of_one_point(rng):
    valid = np.ones((2, 12), bool)
    valid[1, [0, 3, 4]] = False
    rows = check_peaks(np.broadcast_to(gaussian(rng, 7), (2, 12, 7)), valid, 4)
    assert rows == [[0, 1, 2, 3], [1, 2, 5, 6]]


def test_exp_would_underflow_in_768_dimensions(rng):
    """Mean squared distances are about 1,500 to 150,000 here; exp(-746) is 0 even in float64."""
    scale = np.array([1, 3, 10], np.float32)[:, None, None]
    features, valid = gaussian(rng, 3, 64, 768) * scale, np.ones((3, 64), bool)
    rows = check_peaks(features, valid, 8)
    assert all(row != list(range(8)) for row in rows)  # what ties of zeros would give


@pytest.mark.parametrize("there", range(6))
def test_fewer_points_than_asked_and_fewer_neighbours(rng, there):
    features, valid = gaussian(rng, 3, 10, 4), np.zeros((3, 10), bool)
    for row in valid:
        row[rng.permutation(10)[:there]] = True
    for num_select in (3, 12):  # 12: more than the buffer holds
        rows = check_peaks(features, valid, num_select)
        if there <= num_select:
            assert rows == [[*np.flatnonzero(row)] for row in valid]


def test_a_single_point():
    chosen = density_peaks(np.ones((1, 1, 3), np.float32), np.ones((1, 1), bool), num_select=8)
    check(chosen, [[0]], 8, 1)


def test_one_peak_a_cluster_from_the_densest():
    """Three clusters on a line, worked out by hand: 0, 1 and 2 around 1; 10 and 10.5; 30, alone.

    With one neighbour, the mean squared distances are 1, 1, 1, .25, .25 and 380.25. Of the densest pair, 10 is the
    earlier and so the densest; 10.5 is .5 from it; of the next, 0 is 10 from 10, 1 is 1 from 0, 2 is 1 from 1; 30 is
    19.5 from 10.5. log(rho) - mean: log(20) - .25, log(.5) - .25, log(10) - 1, -1, -1, log(19.5) - 380.25.
    """
    features = np.array([30, 0, 10, 1, 10.5, 2], np.float32)[None, :, None]
    for num_select, expected in [(1, [2]), (3, [1, 2, 4]), (5, [1, 2, 3, 4, 5])]:
        chosen = density_peaks(features, np.ones((1, 6), bool), num_neighbors=1, num_select=num_select)
        check(chosen, [expected], num_select, 6)


@pytest.mark.parametrize("made", [clustered, grid])
def test_padding_and_batch_do_not_matter(rng, made):
    features = made(rng, 4, 40, 12)
    valid = np.arange(40) < np.array([40, 17, 8, 3])[:, None]
    together = density_peaks(features, valid, num_select=8)
    nan = density_peaks(np.where(valid[..., None], features, np.nan), valid, num_select=8)
    jax.tree.map(np.testing.assert_array_equal, nan, together)
    for row, count in enumerate(valid.sum(1)):
        alone = density_peaks(features[row : row + 1], valid[row : row + 1], num_select=8)
        jax.tree.map(lambda one, all, row=row: np.testing.assert_array_equal(one[0], all[row]), alone, together)
        short = density_peaks(features[row : row + 1, :count], valid[row : row + 1, :count], num_select=8)
        chosen = np.asarray(together.indices[row])[np.asarray(together.valid[row])]
        check(short, [[*chosen]], 8, count)


@pytest.mark.parametrize("made", [gaussian, clustered])
def test_the_order_of_points_does_not_matter_without_ties(rng, made):
    features, order = made(rng, 5, 64, 24), rng.permutation(64)
    valid = rng.random((5, 64)) < 0.9
    plain = density_peaks(features, valid, num_select=8)
    permuted = density_peaks(features[:, order], valid[:, order], num_select=8)
    np.testing.assert_array_equal(np.sort(order[np.asarray(permuted.indices)]), plain.indices)


def test_without_jit_and_under_vmap(rng):
    features, valid = grid(rng, 3, 20, 6), rng.random((3, 20)) < 0.7
    jitted = density_peaks(features, valid, num_select=3)
    plain = frame_selection.density_peaks(features, valid, num_select=3)
    jax.tree.map(np.testing.assert_array_equal, plain, jitted)
    mapped = jax.jit(jax.vmap(partial(frame_selection.density_peaks, num_select=3)))
    mapped = mapped(features[:, None], valid[:, None])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:, 0], y), mapped, jitted)


def test_bfloat16_features_are_compared_in_float32(rng):
    features = jnp.asarray(unit(rng, 2, 64, 768), jnp.bfloat16)
    check_peaks(np.asarray(features.astype(jnp.float32)), np.ones((2, 64), bool), 8)
    plain = density_peaks(features.astype(jnp.float32), np.ones((2, 64), bool), num_select=8)
    jax.tree.map(np.testing.assert_array_equal, density_peaks(features, np.ones((2, 64), bool), num_select=8), plain)


def test_the_temporaries_hold_no_vector_for_each_pair():
    shapes = jax.ShapeDtypeStruct((1, 64, 768), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.bool_)
    memory = density_peaks.lower(*shapes, num_select=8).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 64 * 768 * 4 / 8


# Both together.


def check_selection(selection, scores, features, valid, num_candidates, num_select):
    candidates = [best(s, [*np.flatnonzero(v)], num_candidates) for s, v in zip(scores, valid, strict=True)]
    check(selection.candidates, candidates, num_candidates, valid.shape[1])
    selected = []
    for row, x in zip(candidates, features, strict=True):
        chosen = numpy_density_peaks(x[row], np.ones(len(row)), 5, num_select)
        selected.append([row[i] for i in chosen])
    check(selection.selected, selected, num_select, valid.shape[1])


@pytest.mark.parametrize("made", [clustered, grid])
@pytest.mark.parametrize("frames", [1, 8, 200])
def test_select_frames(rng, made, frames):
    """64 and then 8, where there are more; also of one frame, of no more than 8 and of fewer than 64."""
    features = made(rng, 4, frames, 12)
    scores = rng.integers(0, 30, (4, frames)).astype(np.float32)  # with ties
    valid = np.arange(frames) < np.array([frames, frames // 2, 3, 0])[:, None]
    selection = select_frames(np.where(valid, scores, np.inf), features, valid)
    check_selection(selection, scores, features, valid, 64, 8)


@pytest.mark.parametrize(("num_candidates", "num_select"), [(16, 4), (4, 8)])
def test_select_other_numbers_of_frames(rng, num_candidates, num_select):
    features, scores, valid = clustered(rng, 3, 50, 8), gaussian(rng, 3, 50), rng.random((3, 50)) < 0.8
    sizes = {"num_candidates": num_candidates, "num_select": num_select}
    selection = select_frames(scores, features, valid, **sizes)
    check_selection(selection, scores, features, valid, num_candidates, num_select)
    for row in range(3):
        one = slice(row, row + 1)
        alone = select_frames(scores[one], features[one], valid[one], **sizes)
        jax.tree.map(lambda x, all, one=one: np.testing.assert_array_equal(x, all[one]), alone, selection)


def test_one_program_for_any_number_of_frames_in_a_buffer(rng):
    run = jax.jit(lambda scores, features, valid: frame_selection.select_frames(scores, features, valid))
    for count in (1, 7, 70, 128):
        run(gaussian(rng, 1, 128), gaussian(rng, 1, 128, 8), (np.arange(128) < count)[None])
    assert run._cache_size() == 1
