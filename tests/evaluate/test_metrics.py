"""Scores against values worked out by hand, intervals against closed forms and SciPy."""

import numpy as np
import pytest
import scipy.stats

from longvid_jax.evaluate.metrics import RESAMPLES, event_score, grounding, interval, span_iou
from longvid_jax.video.synthetic import World

STAR, SQUARE, TURN = "a red star appears", "a blue square appears", "an orange ring turns cyan"


@pytest.mark.parametrize(
    ("told", "truth", "expected"),
    [
        ("from 2 to 6 seconds", (2.0, 6.0), 1.0),
        ("from 2 to 6 seconds", (4.0, 8.0), 2 / 6),
        ("It is there from 3 to 4 seconds.", (2.0, 6.0), 1 / 4),
        ("from 0 to 9 seconds", (8.5, 9.5), 0.5 / 9.5),
        ("from 2 to 4 seconds", (4.0, 5.0), 0.0),
        ("from 7 to 2 seconds", (2.0, 7.0), 0.0),
        ("at the end", (2.0, 7.0), 0.0),
    ],
)
def test_span_iou(told, truth, expected):
    assert span_iou(told, truth) == pytest.approx(expected)


def test_right_answers_reach_what_whole_seconds_allow():
    asked = [question for seed in range(20) for question in World(seed).questions(2, ["when"])]
    assert all(0.4 < span_iou(question.answer, question.span) <= 1 for question in asked)


def test_grounding():
    assert grounding([0.0, 0.3, 0.5, 0.69, 1.0]) == {
        "miou": pytest.approx(0.498),
        "r1@0.3": 0.8,
        "r1@0.5": 0.6,
        "r1@0.7": 0.2,
    }


@pytest.mark.parametrize(
    ("told", "truth", "expected"),
    [
        ([STAR, SQUARE, TURN], [STAR, SQUARE, TURN], 1.0),
        ([STAR, TURN, SQUARE], [STAR, SQUARE, TURN], 2 * 2 / 6),
        ([TURN, SQUARE, STAR], [STAR, SQUARE, TURN], 2 * 1 / 6),
        ([STAR], [STAR, SQUARE, TURN], 2 * 1 / 4),
        ([STAR, STAR, STAR, STAR], [STAR, SQUARE], 2 * 1 / 6),
        ([STAR, "something happens"], [STAR, "something happens"], 2 * 1 / 4),  # what is no event fits none
        (["an orange ring appears"], [TURN], 0.0),
        ([], [STAR], 0.0),
    ],
)
def test_event_score(told, truth, expected):
    assert event_score(", then ".join(told), ", then ".join(truth)) == pytest.approx(expected)


def test_interval_is_the_binomials():
    """One question a video: the mean is a binomial over n, near normal."""
    n, p = 400, 0.7
    values = np.arange(n) < p * n
    low, high = interval(values, np.arange(n))
    width = 2 * scipy.stats.norm.ppf(0.975) * (p * (1 - p) / n) ** 0.5
    assert high - low == pytest.approx(width, rel=0.05)
    assert (low + high) / 2 == pytest.approx(p, abs=0.003)


def test_interval_is_scipys():
    values = np.random.default_rng(1).exponential(size=60)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=1)
    assert interval(values, np.arange(60)) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


def test_questions_of_a_video_stay_together():
    values = np.random.default_rng(0).random(50) < 0.5
    alone = interval(values, np.arange(50))
    assert interval(np.repeat(values, 8), np.repeat(np.arange(50), 8)) == pytest.approx(
        alone
    )  # copies tell nothing new
    apart = interval(np.repeat(values, 8), np.arange(400))
    assert apart[1] - apart[0] < 0.5 * (alone[1] - alone[0])


def test_videos_with_many_questions_weigh_more():
    values, videos = [1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"]  # of two draws: aa, ab or ba, bb
    low, high = interval(values, videos)
    assert (low, high) == (0.0, 1.0)
    drawn = np.random.default_rng(0).multinomial(2, [0.5, 0.5], 1000)
    assert set(np.round(drawn @ [1, 0] / (drawn @ [1, 3]), 3)) == {0.0, 0.25, 1.0}


def test_pairs_that_do_not_differ_are_sure():
    right = np.random.default_rng(2).random(200) < 0.6
    assert interval(right.astype(float) - right, np.arange(200) // 4) == (0.0, 0.0)
