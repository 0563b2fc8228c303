"""Answers to the same questions beside each other: means with their intervals, paired differences, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from longvid_jax.evaluate.metrics import event_score, interval, span_iou
from longvid_jax.evaluate.world import Asked
from longvid_jax.video.synthetic import FAMILIES

TIMELESS = "all but when"  # absolute time is lost where kept tokens move together
HOLDS, FAILS, OPEN = "holds", "does not hold", "is open"


def compare(
    asked: Sequence[Asked], videos: Sequence[str], told: Sequence[str], others: Mapping[str, Sequence[str] | None]
) -> list[dict]:
    """A row for each measure: its mean of `told`, and the paired differences to other answers (None: there are none).

    videos: by which questions hang together, for the bootstrap.
    """
    beside = {name: measures(asked, other) for name, other in others.items() if other is not None}
    rows = []
    for name, (here, values) in measures(asked, told).items():
        group = [videos[i] for i in here]
        row = {"measure": name, "questions": len(here), "value": float(values.mean())}
        row["low"], row["high"] = interval(values, group)
        for to, other in beside.items():
            difference = values - other[name][1]
            low, high = interval(difference, group)
            row |= {f"to_{to}": float(difference.mean()), f"to_{to}_low": low, f"to_{to}_high": high}
        rows.append(row)
    return rows


def measures(asked: Sequence[Asked], told: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By name: which questions it is a measure of, and its value for each of them, 0 to 1.

    "all" and each family: the exact answer. "all but when". "when IoU", "when R1@0.5" and "caption events": as
    `longvid eval` has them.
    """
    right = np.array([text == one.answer for one, text in zip(asked, told, strict=True)], float)
    family = np.array([one.question.family for one in asked])
    groups = {"all": family == family, TIMELESS: family != "when", **{name: family == name for name in FAMILIES}}
    found = {name: (np.flatnonzero(here), right[here]) for name, here in groups.items() if here.any()}
    for name, (kind, score) in {
        "when IoU": ("when", lambda one, text: span_iou(text, one.question.span)),
        "when R1@0.5": ("when", lambda one, text: float(span_iou(text, one.question.span) >= 0.5)),
        "caption events": ("caption", lambda one, text: event_score(text, one.answer)),
    }.items():
        here = np.flatnonzero(family == kind)
        if len(here):
            found[name] = here, np.array([score(asked[i], told[i]) for i in here])
    return found


def verdict(difference: float, low: float, high: float, least: float) -> dict:
    """Whether a difference is above `least`: it is, or is not, where all of its interval says so; else that is open."""
    says = HOLDS if low > least else FAILS if high < least else OPEN
    return {"difference": difference, "low": low, "high": high, "verdict": says}


def points(share: float) -> str:
    return f"{100 * share:+.1f}"
