"""What answers are worth, as numbers: spans of time, events in order, and how sure a mean over videos is."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from longvid_jax.video.synthetic import parse_caption, parse_span

THRESHOLDS = (0.3, 0.5, 0.7)  # of IoU, for R@1
RESAMPLES = 10_000
LEVEL = 0.95  # of confidence


def span_iou(told: str, truth: tuple[float, float]) -> float:
    """Intersection over union of the span that a text tells with the true (start, end) in seconds; 0 if it tells none.

    The truth is exact and the text in whole seconds, so that even the right answer is mostly below 1.
    """
    span = parse_span(told)
    if span is None:
        return 0.0
    (start, end), (true_start, true_end) = span, truth
    shared = max(0.0, min(end, true_end) - max(start, true_start))
    return shared / (end - start + true_end - true_start - shared)


def grounding(ious: Sequence[float]) -> dict[str, float]:
    """Mean IoU, and R@1: the share of answers that reach each threshold."""
    ious = np.asarray(ious, float)
    return {"miou": float(ious.mean()), **{f"r1@{least}": float((ious >= least).mean()) for least in THRESHOLDS}}


def event_score(told: str, truth: str) -> float:
    """How much of a caption's events is told in their order: an F1 score.

    Twice the longest common subsequence of the events (colour, shape, what it turns into: equal or not), over the
    number of events in both captions together. What is no event of the world counts as one that fits none.
    """
    told, truth = parse_caption(told), parse_caption(truth)
    if not told or not truth:
        return float(told == truth)
    longest = np.zeros((len(told) + 1, len(truth) + 1), int)
    for i, one in enumerate(told):
        for j, other in enumerate(truth):
            same = one is not None and one == other
            longest[i + 1, j + 1] = longest[i, j] + 1 if same else max(longest[i, j + 1], longest[i + 1, j])
    return 2 * int(longest[-1, -1]) / (len(told) + len(truth))


def exact_match(beams: Sequence[Sequence[str]], labels: Sequence[str]) -> dict[str, float]:
    """MA-LMM's top-1 and top-5: how often the best beam, or any of the five best, is the label to the letter.

    beams: of each example, the best first.
    """
    hits = [[text.strip() == label for text in texts[:5]] for texts, label in zip(beams, labels, strict=True)]
    return {"top1": float(np.mean([hit[0] for hit in hits])), "top5": float(np.mean([any(hit) for hit in hits]))}


def window_scores(answers: Sequence[str], labels: Sequence[str], videos: Sequence) -> dict[str, float]:
    """Exact match of answers [n] to windows [n] of videos [n], as LVU is scored.

    per_window: the mean over windows, which MA-LMM's and AdaCM2's tables have. per_video: the mean over videos of the
    share of their windows. per_video_vote: the share of videos whose most frequent answer is right (of as frequent
    ones the one given first), which is LVU's own score for classes told one a window.
    """
    told: dict = {}
    for answer, label, video in zip(answers, labels, videos, strict=True):
        told.setdefault(video, []).append((answer.strip(), label))
    rights = [[answer == label for answer, label in windows] for windows in told.values()]
    votes = []
    for windows in told.values():
        given = [answer for answer, _ in windows]
        votes.append(max(given, key=given.count) == windows[0][1])
    return {
        "per_window": float(np.mean(np.concatenate(rights))),
        "per_video": float(np.mean([np.mean(right) for right in rights])),
        "per_video_vote": float(np.mean(votes)),
    }


def interval(values: Sequence[float], videos: Sequence, *, seed: int = 0) -> tuple[float, float]:
    """95 % confidence interval of the mean of values [n], by the bootstrap over videos [n] (which each belongs to).

    Whole videos are drawn with replacement, with all their values: what is asked of one video is not independent. For
    two systems on the same questions give the differences of their values: then the bootstrap is paired.
    """
    values = np.asarray(values, float)
    _, video = np.unique(np.asarray(videos), return_inverse=True)
    count = int(video.max()) + 1
    sums, sizes = np.bincount(video, values, count), np.bincount(video, minlength=count)
    totals = _drawn(count, seed).astype(np.float32) @ np.stack([sums, sizes], axis=1).astype(np.float32)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=32)  # many means are of the same videos
def _drawn(count: int, seed: int) -> np.ndarray:
    """uint8 [RESAMPLES, count]: how often each video is drawn."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.uint8)
