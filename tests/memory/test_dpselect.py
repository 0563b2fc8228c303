"""DPSelect against the authors' outputs, and against their max-pooling written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.memory import dpselect
from longvid_jax.memory.dpselect import Lookback

RNG = np.random.default_rng(0)
keyframes = jax.jit(dpselect.keyframes, static_argnames=("num_keep", "window", "per_patch"))
stream_keyframes = jax.jit(dpselect.stream_keyframes, static_argnames="per_patch")
peaks = jax.jit(dpselect.peaks, static_argnames="window")
MODES = pytest.mark.parametrize("per_patch", [False, True], ids=["frame", "patch"])


def numpy_distances(features, per_patch):
    x = features.astype(np.float64)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    distance = np.ones(x.shape[:2])
    distance[1:] = 1 - (unit[1:] * unit[:-1]).sum(-1)
    return distance if per_patch else distance.mean(1)


def numpy_peaks(distance, window=3):
    """The authors' rule: a position is a peak if it is the argmax of the max-pooling window around it."""
    half = window // 2
    padded = np.pad(distance, [(half, half)] + [(0, 0)] * (distance.ndim - 1), constant_values=-np.inf)
    pooled = np.stack([padded[i : i + len(distance)] for i in range(window)])  # argmax gives the first of equals
    return pooled.argmax(0) == half


def numpy_choice(distance, peak, count):
    """Their top-k after raising the peaks by 2, ties to the earlier; [T] or each column of [T, N]."""
    raised = np.atleast_2d((distance + 2.0 * peak).T)
    indices = np.sort(np.argsort(-raised, axis=-1, kind="stable")[:, :count], axis=-1).T
    return indices if distance.ndim == 2 else indices[:, 0]


def smooth(frames, tokens=4, width=8, scale=0.5):
    return np.cumsum(RNG.normal(size=(frames, tokens, width)) * scale, axis=0).astype(np.float32) + 1


@pytest.fixture(scope="module")
def authors(golden_dir):
    return dict(np.load(golden_dir / "retake" / "dpselect.npz"))


@pytest.mark.parametrize("mode", ["frame", "patch"])
@pytest.mark.parametrize(("case", "count"), [(0, 24), (0, 12), (0, 6), (0, 3), (1, 40), (1, 20), (1, 10), (1, 5)])
def test_the_authors_outputs(authors, case, count, mode):
    got = keyframes(jnp.asarray(authors[f"x_{case}"]), count, per_patch=mode == "patch")
    expected = authors[f"mask_{case}_{mode}_{count}"]
    is_peak = got.is_peak if mode == "patch" else jnp.broadcast_to(got.is_peak[:, None], expected.shape)
    np.testing.assert_array_equal(is_peak, expected)
    np.testing.assert_array_equal(got.features, authors[f"out_{case}_{mode}_{count}"])


STEPS = [0.05, 0.30, 0.10, 0.12, 0.12, 0.02, 0.40, 0.01, 0.25]  # distances of frames 1..9 to their predecessors


def turned(steps):
    """Features [T, 1, 2] with those distances: the angle turns back and forth, so equal steps are exactly equal."""
    turns = np.arccos(1 - np.array(steps)) * (-1.0) ** np.arange(len(steps))
    angles = np.concatenate([[0], np.cumsum(turns)])
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, None].astype(np.float32)


@pytest.mark.parametrize(
    ("count", "indices"), [(6, [0, 2, 4, 5, 7, 9]), (4, [0, 2, 7, 9]), (2, [0, 7]), (5, [0, 2, 4, 7, 9])]
)
@pytest.mark.parametrize("made_of", ["features", "distances"])
def test_the_example_of_the_papers_code(count, indices, made_of):
    if made_of == "features":
        got = keyframes(turned(STEPS), count)
    else:
        distance = jnp.array([1.0, *STEPS])
        valid = jnp.ones(10, bool)
        got = dpselect.choose(jnp.zeros((10, 1, 2)), distance, peaks(distance), valid, count, count)
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_array_equal(got.is_peak, np.isin(indices, [0, 2, 4, 7, 9]))


@MODES
def test_a_static_video_has_one_pivot(per_patch):
    features = np.broadcast_to(RNG.normal(size=(1, 5, 8)).astype(np.float32), (12, 5, 8))
    got = keyframes(features, 12, per_patch=per_patch)
    expected = np.zeros(got.is_peak.shape, bool)
    expected[0] = True
    np.testing.assert_array_equal(got.is_peak, expected)
    for place in keyframes(features, 3, per_patch=per_patch).indices.reshape(3, -1).T:  # the rest are ties
        np.testing.assert_array_equal(place, [0, 1, 2])


@pytest.mark.parametrize("shape", [(1,), (2,), (30,), (30, 6)])
@pytest.mark.parametrize("window", [3, 5, 7])
def test_peaks_are_argmax_of_max_pooling(shape, window):
    """Few distinct values, so that there are ties and plateaus."""
    for _ in range(40):
        distance = RNG.integers(0, 4, shape).astype(np.float32)
        np.testing.assert_array_equal(peaks(jnp.asarray(distance), window=window), numpy_peaks(distance, window))


@MODES
@pytest.mark.parametrize("frames", [1, 2, 3, 25])
def test_keyframes_equal_numpy(per_patch, frames):
    features = smooth(frames)
    distance = numpy_distances(features, per_patch)
    np.testing.assert_allclose(
        dpselect.distances(features, features[0], False, per_patch=per_patch), distance, atol=1e-6
    )
    for count in {1, max(1, frames // 3), frames}:
        got = keyframes(features, count, per_patch=per_patch)
        peak = numpy_peaks(distance)
        expected = numpy_choice(distance, peak, count)
        np.testing.assert_array_equal(got.indices, expected)
        np.testing.assert_array_equal(got.is_peak, np.take_along_axis(peak, expected, axis=0))
        at = expected if per_patch else np.repeat(expected[:, None], features.shape[1], axis=1)
        np.testing.assert_array_equal(got.features, np.take_along_axis(features, at[..., None], axis=0))


def test_ties_go_to_the_earlier():
    features = turned([0.2] * 11)  # a plateau of distances behind the first frame
    np.testing.assert_array_equal(keyframes(features, 5).indices, [0, 1, 2, 3, 4])


@MODES
@pytest.mark.parametrize("rest", [0.0, np.nan, 1e9])
def test_padding_changes_nothing(per_patch, rest):
    features = smooth(17)
    padded = np.concatenate([features, np.full((9, *features.shape[1:]), rest, np.float32)])
    alone = keyframes(features, 6, per_patch=per_patch)
    got = keyframes(padded, 6, per_patch=per_patch, valid=np.arange(26) < 17)
    for field in ("indices", "is_peak", "features"):
        np.testing.assert_array_equal(getattr(got, field), getattr(alone, field))


@MODES
def test_a_traced_count_gives_what_num_keep_gives(per_patch):
    features = smooth(20)
    run = jax.jit(lambda count: dpselect.keyframes(features, 20, per_patch=per_patch, count=count))
    for count in (1, 13, 20):
        got, alone = run(count), keyframes(features, count, per_patch=per_patch)
        for field in ("indices", "is_peak", "features"):
            np.testing.assert_array_equal(getattr(got, field)[:count], getattr(alone, field))
        assert not got.is_peak[count:].any()
    assert run._cache_size() == 1


def streamed(features, pieces, per_patch, width):
    """Distances and peaks from the streaming form, fed `pieces` temporal patches at a time in windows of `width`."""
    lookback = Lookback.empty(*features.shape[1:], jnp.float32, per_patch=per_patch)
    distance, peak, start = [], [], 0
    for size in pieces:
        window = np.full((width, *features.shape[1:]), np.nan, np.float32)  # what is not valid must not matter
        window[:size] = features[start : start + size]
        start += size
        after, has_after = (features[start], True) if start < len(features) else (features[0], False)
        valid = np.arange(width) < size
        lookback, d, p = stream_keyframes(lookback, window, after, valid, jnp.bool_(has_after), per_patch=per_patch)
        distance.append(d[:size])
        peak.append(p[:size])
        assert not p[size:].any()
    assert start == len(features)
    return np.concatenate(distance), np.concatenate(peak)


@MODES
@pytest.mark.parametrize(
    "pieces",
    [[24], [1] * 24, [2] * 12, [5, 5, 5, 5, 4], [8, 8, 8], [3, 8, 1, 6, 2, 4], [7, 0, 8, 0, 0, 8, 1], [0, 8, 8, 8]],
)
def test_the_streaming_form_equals_the_global_one_in_any_split(per_patch, pieces):
    features = smooth(24)
    if 5 in pieces:  # plateaus across the borders of windows
        features[3:7] = features[3]
        features[14:16] = features[14]
    distance, peak = streamed(features, pieces, per_patch, width=max(8, *pieces))
    expected = numpy_distances(features, per_patch)
    np.testing.assert_allclose(distance, expected, atol=1e-6)
    np.testing.assert_array_equal(peak, keyframes(features, 24, per_patch=per_patch).is_peak)
    np.testing.assert_array_equal(peak, numpy_peaks(expected))


def test_the_streaming_form_finds_ties_across_windows():
    features = turned([0.2, 0.3, 0.3, 0.1, 0.1, 0.4, 0.4, 0.4, 0.05, 0.06, 0.06])
    for pieces in ([12], [1] * 12, [3, 3, 3, 3], [2, 5, 5], [6, 1, 5]):
        _, peak = streamed(features, pieces, False, width=12)
        np.testing.assert_array_equal(np.flatnonzero(peak), [0, 2, 6, 10])
