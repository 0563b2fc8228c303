"""AdaCM2's cache against NumPy in float64: eviction, its bound, and frames watched one after the other."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.errors import OptionError
from longvid_jax.memory import adacm2
from longvid_jax.memory.adacm2 import Policy, Window

SHARES = (0.1, 1 / 3, 0.5, 0.77, 1.0)
reduce = jax.jit(adacm2.reduce, static_argnames=("alpha", "beta", "capacity"))


def split(length, alpha, beta):
    """How many of so many tokens are older, and how many of these stay."""
    older = length - min(length, max(1, math.floor(alpha * length + 0.5)))
    return older, max(1, math.ceil(beta * older - 1e-9)) if older else 0


def staying(importance, alpha, beta):
    """Indices of what stays of tokens in time order, as algorithm 1 has it; Python's sort is stable."""
    older, count = split(len(importance), alpha, beta)
    best = sorted(range(older), key=lambda i: -importance[i])[:count]
    return sorted(best) + list(range(older, len(importance)))


def longest(tokens, alpha, beta, frames):
    """Lengths of a layer's cache after each of so many frames."""
    length = 0
    for _ in range(frames):
        older, count = split(length + tokens, alpha, beta)
        length += tokens - older + count
        yield length


# --- reduce ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens():
    """Rows of 0, 1, ..., 300 valid tokens among 300, with holes; many attention sums are equal, and all are exact."""
    rng = np.random.default_rng(0)
    lengths = (0, 1, 2, 3, 4, 5, 9, 10, 11, 29, 30, 31, 100, 257, 299, 300)
    valid = np.stack([rng.permutation(300) < n for n in lengths])
    keys, values = rng.normal(size=(2, len(lengths), 300, 3)).astype(np.float32)
    attention = rng.integers(0, 4, (len(lengths), 2, 3, 300)).astype(np.float32) / 64
    attention[:, :, :, ::7] += 1 / 64
    return keys, values, attention, valid


@pytest.mark.parametrize(
    ("alpha", "beta"), [(a, b) for a in SHARES for b in SHARES if a == b or 0.1 in (a, b) or 1 in (a, b)]
)
def test_reduce_is_what_loops_do(tokens, alpha, beta):
    keys, values, attention, valid = tokens
    out = jax.tree.map(np.asarray, reduce(*tokens, alpha=alpha, beta=beta, capacity=310))
    assert out.kept.shape == out.valid.shape == (len(valid), 310)
    for row in range(len(valid)):
        here = np.flatnonzero(valid[row])
        importance = attention[row].astype(np.float64).sum((0, 1))[here]
        at = here[staying(importance, alpha, beta)]
        np.testing.assert_array_equal(out.kept[row], [*at, *[-1] * (310 - len(at))])
        np.testing.assert_array_equal(out.valid[row], np.arange(310) < len(at))
        np.testing.assert_array_equal(out.keys[row, : len(at)], keys[row, at])
        np.testing.assert_array_equal(out.values[row, : len(at)], values[row, at])


def test_among_equals_the_earlier_stay():
    given = *np.zeros((2, 1, 10, 1)), np.ones((1, 2, 3, 10)), np.ones((1, 10), bool)
    out = reduce(*given, alpha=0.2, beta=0.5, capacity=6)
    np.testing.assert_array_equal(out.kept, [[0, 1, 2, 3, 8, 9]])


def test_what_is_not_valid_draws_nothing():
    """Not even where its attention is the largest, or not a number."""
    attention = np.zeros((1, 1, 1, 6))
    attention[..., 0], attention[..., 2] = np.inf, np.nan
    out = reduce(
        *np.zeros((2, 1, 6, 1)), attention, np.array([[0, 1, 0, 1, 1, 1]], bool), alpha=0.3, beta=0.1, capacity=4
    )
    np.testing.assert_array_equal(out.kept, [[1, 5, -1, -1]])


def test_a_capacity_is_enough_or_an_error(tokens):
    keys, values, attention, valid = tokens
    needed = len(staying(np.zeros(300), 0.1, 0.5))
    exact = reduce(*tokens, alpha=0.1, beta=0.5, capacity=needed)
    roomy = reduce(*tokens, alpha=0.1, beta=0.5, capacity=310)
    np.testing.assert_array_equal(exact.kept, roomy.kept[:, :needed])
    assert exact.valid[-1].all()
    with pytest.raises(OptionError, match=f"capacity is {needed - 1}, but of 300 tokens {needed} stay"):
        adacm2.reduce(*tokens, alpha=0.1, beta=0.5, capacity=needed - 1)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (1.1, 0.5), (0.5, -0.1), (0.5, 2), (math.nan, 0.5)])
def test_shares_out_of_range(tokens, alpha, beta):
    with pytest.raises(OptionError, match="must be above 0 and at most 1"):
        adacm2.reduce(*tokens, alpha=alpha, beta=beta, capacity=300)


# --- counts and bounds ----------------------------------------------------------------------------------------------


def test_counts():
    for alpha in SHARES:
        for beta in SHARES:
            recent, kept = adacm2.counts(alpha, beta, 300)
            assert recent.dtype == kept.dtype == np.int32 and recent.shape == kept.shape == (301,)
            for n in range(301):
                assert recent[n] + kept[n] == len(staying([0.0] * n, alpha, beta))
    recent, kept = adacm2.counts(0.1, 0.1, 30)
    assert [*recent[:6], recent[14], recent[15], recent[25]] == [0, 1, 1, 1, 1, 1, 1, 2, 3]
    # Nine times out of ten 0.1 * n is not the number it stands for: 30 of 300 older ones, and not 31.
    assert adacm2.counts(1e-9, 0.1, 301)[1][301] == 30
    assert [kept[1], kept[2], kept[11], kept[12]] == [0, 1, 1, 2]


def test_the_sequence_of_the_paper():
    """P = 257, alpha = beta = 0.1: 50, 59, 61, 61, ... tokens a layer (eq. 8: 60.3), less than a frame."""
    keys = jnp.zeros((5, 1, 1, 257, 2))
    queries = jnp.zeros((1, 1, 2))

    ask = adacm2.Ask(lambda queries, look, carry: look(0, queries[:, None], carry), lambda seen: seen[:, 0])
    cache, lengths = adacm2.empty(1, 1, 61, 2, jnp.float32), []
    for t in range(5):
        frame = Window(keys[t], keys[t], jnp.full((1,), t), jnp.ones((1,), bool))
        cache, _ = adacm2.step(cache, queries, frame, ask, Policy((0.1,), (0.1,)))
        lengths.append(int(cache.length[0, 0]))
    assert lengths == [50, 59, 61, 61, 61]
    assert [adacm2.largest(257, 0.1, 0.1, n) for n in range(6)] == [0, 50, 59, 61, 61, 61]
    assert adacm2.largest(257, 0.1, 0.1) == 61
    assert adacm2.bound(257, 0.1, 0.1) == pytest.approx(60.28, abs=0.01)
    assert adacm2.bound(257, 0.5, 0.5) == pytest.approx(771)
    assert adacm2.largest(257, 0.1, 0.1) + 257 <= 257 / (1 - 0.19) + 1.2  # before it is reduced


@pytest.mark.parametrize("alpha", (0.001, 0.01, *SHARES))
@pytest.mark.parametrize("beta", (0.001, *SHARES))
def test_no_cache_passes_its_bound(alpha, beta):
    """Eq. 8 and what rounding may add, over 150 frames; `largest` is exact, for any number of frames."""
    r = adacm2.ratio(alpha, beta)
    for size in (1, 2, 5, 17, 64, 257):
        lengths = list(longest(size, alpha, beta, 150))
        slack = 0 if r == 1 else (1 + (1 - beta) * max(0.5, 1 - alpha * size)) / (1 - r)
        for frames, length in enumerate(lengths, 1):
            assert length <= adacm2.bound(size, alpha, beta, frames) + slack + 1e-6
        assert [adacm2.largest(size, alpha, beta, n) for n in (1, 2, 7, 150)] == [
            max(lengths[:n]) for n in (1, 2, 7, 150)
        ]
        if r < 1:
            assert lengths[-1] == lengths[-2]  # it has stopped growing
            assert adacm2.largest(size, alpha, beta) == max(lengths)
            assert adacm2.bound(size, alpha, beta) == pytest.approx(adacm2.bound(size, alpha, beta, 10**6))
        else:
            assert lengths == [size * n for n in range(1, 151)]
            assert adacm2.bound(size, alpha, beta) == math.inf
            with pytest.raises(OptionError, match="no bound"):
                adacm2.largest(size, alpha, beta)


def test_large_shares_have_a_bound_at_once():
    """Such a cache grows for many frames."""
    *_, last = longest(3, 0.99, 0.98, 20000)
    assert adacm2.largest(3, 0.99, 0.98) == last
    assert 1e9 < adacm2.largest(257, 0.9999, 0.999) < 1e11


# --- watching -------------------------------------------------------------------------------------------------------

LAYERS, ROWS, TOKENS, FRAMES, HEADS, WIDTH, QUERIES = 3, 3, 7, 33, 2, 8, 4
LENGTHS = (33, 20, 5)
PER_LAYER = {"alpha": (0.1, 0.5, 1 / 3), "beta": (0.5, 0.1, 0.7)}
ALL = {"alpha": (1.0,) * 3, "beta": (1.0,) * 3}


@dataclasses.dataclass(frozen=True)
class Stand:
    """A Q-Former of linear maps, whose rows have different instructions; in NumPy or JAX as its arrays are."""

    q: np.ndarray  # [L, C, C]
    out: np.ndarray
    text: np.ndarray  # [B, C]

    def look(self, queries, look, carry):
        xp = jnp if isinstance(queries, jax.Array) else np
        x = queries + self.text[:, None]
        x = x / xp.sqrt((x**2).mean(-1, keepdims=True))
        for layer in range(LAYERS):
            q = (x @ self.q[layer]).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
            context, carry = look(layer, q, carry)
            x = x + xp.tanh(context.swapaxes(1, 2).reshape(x.shape) @ self.out[layer])
        return x, carry

    def conclude(self, x):
        return x * self.text[:, None]


@pytest.fixture(scope="module")
def stand():
    q, out = np.random.default_rng(1).normal(size=(2, LAYERS, WIDTH, WIDTH)) * 0.4
    return Stand(q, out, np.random.default_rng(2).normal(size=(ROWS, WIDTH)))


@pytest.fixture(scope="module")
def window():
    rng = np.random.default_rng(3)
    keys, values = rng.normal(size=(2, FRAMES, LAYERS, ROWS, TOKENS, WIDTH))
    number = np.broadcast_to(np.arange(FRAMES)[:, None], (FRAMES, ROWS))
    return Window(keys, values, number, np.arange(FRAMES)[:, None] < np.array(LENGTHS))


@pytest.fixture(scope="module")
def learned():
    return np.random.default_rng(4).normal(size=(ROWS, QUERIES, WIDTH))


def naive(stand, window, learned, alpha, beta, *, scores="attention", carry_queries=False):
    """AdaCM2 over growing lists, row by row: sources [row][layer], and outputs [B, Q, C]; float64."""
    sources, outputs = [], np.zeros_like(learned)
    for row in range(learned.shape[0]):
        keys, values, source = ([[] for _ in range(LAYERS)] for _ in range(3))
        alone, x, first = dataclasses.replace(stand, text=stand.text[row : row + 1]), None, learned[row : row + 1]
        for t in range(len(window.keys)):
            if not window.valid[t, row]:
                continue
            for layer in range(LAYERS):
                keys[layer] += list(window.keys[t, layer, row])
                values[layer] += list(window.values[t, layer, row])
                source[layer] += [int(window.number[t, row]) * TOKENS + i for i in range(TOKENS)]
            drawn = []

            def look(layer, q, carry, keys=keys, values=values, drawn=drawn):
                k, v = (np.array(x[layer]).reshape(-1, HEADS, WIDTH // HEADS) for x in (keys, values))
                logits = np.einsum("bhqd,shd->bhqs", q, k) / math.sqrt(WIDTH // HEADS)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                drawn.append(weights.sum((0, 1, 2)))
                return np.einsum("bhqs,shd->bhqd", weights, v), carry

            x = alone.conclude(alone.look(x if carry_queries and x is not None else first, look, None)[0])
            for layer in range(LAYERS):
                importance = {"attention": drawn[layer], "recent": np.arange(len(drawn[layer]))}
                if scores == "shared":
                    importance["shared"] = np.sum(drawn, axis=0)
                at = staying(importance[scores], alpha[layer], beta[layer])
                keys[layer], values[layer], source[layer] = ([x[layer][i] for i in at] for x in (keys, values, source))
        sources.append(source)
        outputs[row] = 0 if x is None else x[0]
    return sources, outputs


@functools.partial(jax.jit, static_argnames=("policy", "capacity", "carry_queries", "stop_gradient", "remat"))
def begin_and_watch(stand, window, learned, policy, capacity, cache=None, outputs=None, seed=0, **how):
    stand = Stand(*stand)
    rows = learned.shape[0]
    cache = adacm2.empty(LAYERS, rows, capacity, WIDTH, jnp.float32) if cache is None else cache
    outputs = jnp.zeros_like(learned) if outputs is None else outputs
    return adacm2.watch(cache, outputs, window, stand, learned, policy, random=jax.random.key(seed), **how)


def run(stand, window, learned, policy, capacity=None, **how):
    """watch() of float32 arrays, from the start, in a cache of just the size that it needs."""
    if capacity is None:
        capacity = max(
            adacm2.largest(TOKENS, a, b, FRAMES if adacm2.ratio(a, b) == 1 else None)
            for a, b in zip(policy.alpha, policy.beta, strict=True)
        )
    given = single((dataclasses.astuple(stand), window, learned))
    return begin_and_watch(*given, policy, capacity, **how)


def single(tree):
    """float32 and int32, as JAX has them."""
    return jax.tree.map(jnp.asarray, tree)


def sources(cache):
    """Of each row, of each layer: which tokens are held."""
    source, length = np.asarray(cache.source), np.asarray(cache.length)
    for layer, counts in zip(source, length, strict=True):
        for row, n in zip(layer, counts, strict=True):
            assert (row[:n] >= 0).all() and (row[n:] == -1).all()
    return [[source[layer, row, : length[layer, row]].tolist() for layer in range(LAYERS)] for row in range(ROWS)]


@pytest.mark.parametrize("carry_queries", [False, True])
@pytest.mark.parametrize(
    ("shares", "scores"),
    [
        ((0.1, 0.1), "attention"),
        ((0.5, 0.5), "attention"),
        ((1.0, 1.0), "attention"),
        (PER_LAYER, "attention"),
        ((0.3, 0.4), "shared"),
        (PER_LAYER, "recent"),
    ],
)
def test_frames_are_watched_as_in_loops(stand, window, learned, shares, scores, carry_queries):
    """33, 20 and 5 frames side by side: the same tokens stay in each layer and row, the outputs to 1e-5."""
    alpha, beta = shares.values() if isinstance(shares, dict) else ((share,) * LAYERS for share in shares)
    cache, outputs = run(stand, window, learned, Policy(alpha, beta, scores), carry_queries=carry_queries)
    expected, seen = naive(stand, window, learned, alpha, beta, scores=scores, carry_queries=carry_queries)
    assert sources(cache) == expected
    np.testing.assert_allclose(outputs, seen, atol=1e-5, rtol=0)
    for row in range(ROWS):  # keys and values go with their sources
        for layer, held in enumerate(expected[row]):
            frame, place = np.divmod(held, TOKENS)
            for stored, given in ((cache.keys, window.keys), (cache.values, window.values)):
                np.testing.assert_allclose(stored[layer, row, : len(held)], given[frame, layer, row, place], rtol=1e-6)
    if scores == "shared":
        assert all(row[0] == row[1] == row[2] for row in expected)
    else:
        assert alpha[0] == 1 or any(row[0] != row[2] for row in expected)


def test_random_tokens_as_many_and_again(stand, window, learned):
    """As many as attention keeps, others by layer, row, frame and key, and the same for the same key."""
    policy = Policy(*PER_LAYER.values())
    even = Policy((0.2,) * LAYERS, (0.3,) * LAYERS)
    for one in (policy, even):
        scored, _ = run(stand, window, learned, one)
        drawn, _ = run(stand, window, learned, dataclasses.replace(one, scores="random"))
        np.testing.assert_array_equal(scored.length, drawn.length)
        again, _ = run(stand, window, learned, dataclasses.replace(one, scores="random"))
        np.testing.assert_array_equal(drawn.source, again.source)
        other, _ = run(stand, window, learned, dataclasses.replace(one, scores="random"), seed=1)
        assert sources(other) != sources(drawn) != sources(scored)
    even = dataclasses.replace(even, scores="random")
    same = window._replace(valid=np.ones_like(window.valid))
    held = sources(run(stand, same, learned, even)[0])
    assert held[0][0] != held[0][1] and held[0][0] != held[1][0]
    # The draw of frame t is the same wherever the window begins, and another one for another frame.
    one = jax.tree.map(lambda x: x[:1], same)
    draws = [sources(run(stand, one._replace(number=one.number + n), learned, even)[0])[0][0] for n in (0, 1, 2, 3)]
    assert len({tuple(x % TOKENS for x in draw) for draw in draws}) > 1


@pytest.mark.parametrize(
    ("carry_queries", "shares", "room"), [(False, PER_LAYER, 30), (True, PER_LAYER, 30), (False, ALL, 20 * TOKENS)]
)
def test_how_frames_are_cut_into_windows_changes_nothing(stand, window, learned, carry_queries, shares, room):
    policy = Policy(*shares.values())
    whole = run(stand, jax.tree.map(lambda x: x[:20], window), learned, policy, room, carry_queries=carry_queries)
    parts = (None, None)
    for start, end in ((0, 8), (8, 16), (16, 20)):
        part = jax.tree.map(lambda x, s=start, e=end: x[s:e], window)
        parts = run(stand, part, learned, policy, room, cache=parts[0], outputs=parts[1], carry_queries=carry_queries)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_a_row_is_as_if_alone(stand, window, learned):
    policy = Policy(*PER_LAYER.values())
    together = run(stand, window, learned, policy, carry_queries=True)
    for row in range(ROWS):
        here = slice(row, row + 1)
        alone = Window(*(x[:, :, here] for x in window[:2]), *(x[:, here] for x in window[2:]))
        cache, outputs = run(
            dataclasses.replace(stand, text=stand.text[here]), alone, learned[here], policy, carry_queries=True
        )
        np.testing.assert_array_equal(cache.source, together[0].source[:, here])
        np.testing.assert_allclose(outputs, together[1][here], atol=1e-6)


def test_a_row_without_a_frame_stays_as_it_was(stand, window, learned):
    policy = Policy((0.5,) * LAYERS, (0.5,) * LAYERS)
    cache, outputs = run(stand, window._replace(valid=np.zeros_like(window.valid)), learned, policy)
    jax.tree.map(np.testing.assert_array_equal, cache, adacm2.empty(LAYERS, ROWS, cache.capacity, WIDTH, jnp.float32))
    assert not np.asarray(outputs).any()


def test_room_changes_nothing(stand, window, learned):
    """A larger cache, and one that is made larger on the way."""
    policy = Policy(*PER_LAYER.values())
    first, rest = (jax.tree.map(lambda x, s=s: x[s], window) for s in (slice(11), slice(11, None)))
    exact = run(stand, window, learned, policy)
    roomy = run(stand, window, learned, policy, 50)
    cache, outputs = run(stand, first, learned, policy)
    grown = run(stand, rest, learned, policy, cache=adacm2.grow(cache, 50), outputs=outputs)
    for cache, outputs in (roomy, grown):
        assert cache.capacity == 50
        assert sources(cache) == sources(exact[0])
        np.testing.assert_allclose(outputs, exact[1], atol=1e-6)


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(stand, window, learned, policy, **how):
    """Of the sum of squares of the last outputs, to keys, values and learned queries."""

    def loss(keys, values, learned):
        _, outputs = run(stand, window._replace(keys=keys, values=values), learned, policy, **how)
        return (outputs**2).sum()

    return jax.tree.map(np.asarray, jax.grad(loss, argnums=(0, 1, 2))(*single((window.keys, window.values, learned))))


@pytest.fixture(scope="module")
def short(window):
    """Six frames, of the last row three."""
    return jax.tree.map(lambda x: x[:6], window)._replace(valid=np.arange(6)[:, None] < np.array([6, 6, 3]))


@pytest.mark.parametrize(("carry_queries", "shares"), [(False, (0.3, 0.5)), (True, (0.3, 0.5)), (False, (1.0, 1.0))])
def test_stopped_gradients_stop(stand, short, learned, carry_queries, shares):
    """Only a row's last frame gets any; without the switch those that the cache still holds do, too."""
    policy, last = Policy(*((share,) * LAYERS for share in shares)), (5, 5, 2)
    how = {"carry_queries": carry_queries}
    stopped = gradients(stand, short, learned, policy, **how, stop_gradient=True)
    flowing = gradients(stand, short, learned, policy, **how)
    for of_stopped, of_flowing in zip(stopped[:2], flowing[:2], strict=True):
        for row, end in enumerate(last):
            assert not of_stopped[:end, :, row].any() and not of_stopped[end + 1 :, :, row].any()
            assert np.abs(of_stopped[end, :, row]).max() > 1e-3
            assert np.abs(of_flowing[end - 1, :, row]).max() > 1e-4
    assert np.abs(flowing[2]).max() > 1e-3
    assert np.abs(stopped[2]).any() != carry_queries  # the last frame's queries are the learned ones, or stopped ones
    first = jax.tree.map(lambda x: x[:1], short)
    assert np.abs(gradients(stand, first, learned, policy, **how, stop_gradient=True)[2]).max() > 1e-3


@pytest.mark.parametrize(("carry_queries", "shares"), [(False, (0.3, 0.5)), (True, (0.3, 0.5)), (False, (1.0, 1.0))])
def test_gradients_are_differences(stand, short, learned, carry_queries, shares):
    """Against central differences of the loops in float64, along a random direction of everything."""
    shares = tuple((share,) * LAYERS for share in shares)
    got = gradients(stand, short, learned, Policy(*shares), carry_queries=carry_queries)
    points = short.keys, short.values, learned
    rng = np.random.default_rng(7)
    direction = [rng.normal(size=x.shape) for x in points]

    def loss(step):
        keys, values, first = (x + step * d for x, d in zip(points, direction, strict=True))
        moved = short._replace(keys=keys, values=values)
        return (naive(stand, moved, first, *shares, carry_queries=carry_queries)[1] ** 2).sum()

    expected = (loss(1e-7) - loss(-1e-7)) / 2e-7  # so little that the same tokens stay
    assert sum((g * d).sum() for g, d in zip(got, direction, strict=True)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_remat_changes_no_gradient(stand, short, learned, stop_gradient):
    how = {"carry_queries": True, "stop_gradient": stop_gradient}
    policy = Policy(*PER_LAYER.values())
    kept = gradients(stand, short, learned, policy, **how, remat=False)
    again = gradients(stand, short, learned, policy, **how, remat=True)
    for one, other in zip(kept, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-5)
