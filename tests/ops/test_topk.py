"""Top-k with a mask, against NumPy's stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.ops.topk import best, compact
from longvid_jax.ops.topk import top_k as traced_top_k

RNG = np.random.default_rng(0)
top_k = jax.jit(traced_top_k, static_argnames="width")


def oracle(scores, count, valid=None, first=None) -> list[int]:
    """Sorted indices of the best of one row: Python's sort is stable, so ties stay in order."""
    indices = [i for i in range(len(scores)) if valid is None or valid[i]]
    best = sorted(indices, key=lambda i: (first is None or not first[i], -scores[i]))[:count]
    return sorted(best)


def check(kept, scores, counts, width, valid=None, first=None):
    for row in range(len(scores)):
        chosen = oracle(
            scores[row], counts[row], None if valid is None else valid[row], None if first is None else first[row]
        )
        assert int(kept.count[row]) == len(chosen)
        np.testing.assert_array_equal(kept.indices[row, : len(chosen)], chosen)
        np.testing.assert_array_equal(np.flatnonzero(kept.mask[row]), chosen)
    assert kept.indices.shape == (len(scores), width)
    assert kept.indices.dtype == jnp.int32


def few_values(*shape):
    """Scores with many ties."""
    return RNG.integers(0, 4, shape).astype(np.float32)


@pytest.mark.parametrize("made", [few_values, lambda *shape: RNG.normal(size=shape).astype(np.float32)])
@pytest.mark.parametrize("size", [1, 2, 33])
def test_counts_are_traced_and_differ_by_row(made, size):
    run = jax.jit(lambda scores, count: traced_top_k(scores, count, size))
    for _ in range(5):
        scores, counts = made(6, size), RNG.integers(1, size + 1, 6)
        check(run(scores, counts), scores, counts, size)
    assert run._cache_size() == 1


@pytest.mark.parametrize("with_first", [False, True])
def test_invalid_entries_are_never_chosen(with_first):
    scores, valid = few_values(50, 20), RNG.random((50, 20)) < 0.6
    valid[0] = False
    first = RNG.random((50, 20)) < 0.4 if with_first else None
    counts = RNG.integers(0, 21, 50)
    scores = np.where(valid, scores, np.inf)  # however large what is there
    kept = top_k(scores, counts, 20, valid=valid, first=first)
    check(kept, scores, counts, 20, valid, first)
    assert not (np.asarray(kept.mask) & ~valid).any()


def test_invalid_nan_does_no_harm():
    scores, valid = few_values(20, 12), RNG.random((20, 12)) < 0.6
    kept = top_k(np.where(valid, scores, np.nan), np.full(20, 5), 12, valid=valid)
    check(kept, scores, np.full(20, 5), 12, valid)


def test_a_valid_entry_of_minus_infinity_comes_last_but_may_be_chosen():
    scores = np.array([[-np.inf, 1.0, -np.inf, 5.0]], np.float32)
    check(top_k(scores, jnp.array([3]), 4), scores, [3], 4)
    valid = np.array([[False, True, True, True]])  # ties with the masked one at -inf, which has the lower index
    check(top_k(scores, jnp.array([3]), 4, valid=valid), scores, [3], 4, valid)


@pytest.mark.parametrize("count", [1, 4, 9, 15])
def test_first_comes_before_all_others_and_among_itself_by_score(count):
    scores, first = few_values(30, 15), RNG.random((30, 15)) < 0.5  # often more than count
    counts = np.full(30, count)
    check(top_k(scores, counts, 15, first=first), scores, counts, 15, first=first)


def test_a_narrow_buffer_and_a_python_count():
    scores = few_values(4, 10)
    check(top_k(scores, np.full(4, 3), 3), scores, [3] * 4, 3)
    kept = traced_top_k(scores[0], 3, 3)
    np.testing.assert_array_equal(kept.indices, oracle(scores[0], 3))


def test_the_best_are_those_that_a_stable_sort_puts_first():
    for keys in ([few_values(8, 21)], [RNG.random((8, 21)) < 0.5, few_values(8, 21)]):
        for count in (0, 1, 10, 21):
            mask = np.asarray(best(*map(jnp.asarray, keys), count=jnp.full(8, count)))
            for row in range(8):
                order = sorted(range(21), key=lambda i, row=row: tuple(-float(key[row, i]) for key in keys))
                np.testing.assert_array_equal(np.flatnonzero(mask[row]), sorted(order[:count]))


def test_what_is_no_number_comes_last():
    scores = np.array([[np.nan, 1.0, np.nan, 3.0, 2.0, -np.inf]], np.float32)
    for count, expected in ((1, [3]), (3, [1, 3, 4]), (6, range(6))):
        kept = top_k(scores, np.array([count]), 6)
        np.testing.assert_array_equal(np.flatnonzero(kept.mask[0]), expected)
        assert int(kept.count[0]) == count


def test_compact_keeps_the_order():
    mask = RNG.random((9, 17)) < 0.4
    for width in (17, 5):
        got = np.asarray(compact(jnp.asarray(mask), width))
        for row in range(9):
            np.testing.assert_array_equal(got[row], [*np.flatnonzero(mask[row]), *np.flatnonzero(~mask[row])][:width])


def test_leading_axes():
    scores = few_values(2, 3, 11)
    kept = top_k(scores, np.full((2, 3), 4), 4)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(kept.indices[i, j], oracle(scores[i, j], 4))
