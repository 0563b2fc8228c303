"""Exact match of beams, and LVU's scores by window and by video, against values counted by hand."""

import pytest

from longvid_jax.evaluate.metrics import exact_match, window_scores


def test_exact_match_of_the_best_and_of_any_beam():
    beams = [["steven", "ron"], [" ron ", "mark"], ["Ron", "mark"], ["a", "b", "c", "d", "e", "ron"]]
    assert exact_match(beams, ["steven", "ron", "mark", "ron"]) == {"top1": 0.5, "top5": 0.75}


def test_windows_and_videos_are_scored_apart():
    answers = ["x", "x", "y", "y", "z", "x"]
    videos = ["a", "a", "a", "b", "b", "c"]
    labels = ["x", "x", "x", "z", "z", "y"]
    scores = window_scores(answers, labels, videos)
    assert scores == {
        "per_window": pytest.approx(3 / 6),
        "per_video": pytest.approx((2 / 3 + 1 / 2 + 0) / 3),
        "per_video_vote": pytest.approx(1 / 3),  # of video b the first of two answers counts
    }


def test_windows_in_any_order_belong_to_their_video():
    assert window_scores(["x", "y", "x"], ["x", "y", "x"], ["a", "b", "a"]) == dict.fromkeys(
        ("per_window", "per_video", "per_video_vote"), 1.0
    )


def test_as_many_answers_as_labels():
    with pytest.raises(ValueError, match="longer"):
        exact_match([["x"]], ["x", "y"])
