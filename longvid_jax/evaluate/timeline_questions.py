"""The part of the timeline figure that shows where the answers to questions are to be seen. All lengths are pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longvid_jax.evaluate.canvas import Canvas, shorten, text_width
from longvid_jax.evaluate.timeline_panels import GAP, INK, LEFT, MUTED, PALE, RIGHT, SMALL, TITLE, Axis, title

ROW = 44
TRUTH = {True: ("#2f855a", "#d7ecdf"), False: ("#c53030", "#f8dcdc"), None: (MUTED, PALE)}  # edge and inside


@dataclasses.dataclass(frozen=True)
class Span:
    """A question, and the seconds in which its answer is to be seen (None: anywhere); `right` if that is known."""

    label: str
    start: float | None
    end: float | None
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A question's span from left to right, and where its label begins and how it reads."""

    left: float
    right: float
    label_left: float
    label: str
    truth: bool | None

    @property
    def reach(self) -> tuple[float, float]:
        return min(self.left, self.label_left), max(self.right, self.label_left + _label_width(self.label, self.truth))

    def meets(self, other: _Placed) -> bool:
        (left, right), (start, end) = self.reach, other.reach
        return left < end + 20 and start < right + 20


def rows(questions: Sequence[Span], axis: Axis) -> list[list[_Placed]]:
    """The questions in time order, as few rows as come of taking the first row with room for each."""
    found: list[list[_Placed]] = []
    for placed in sorted((_place(question, axis) for question in questions), key=lambda placed: placed.left):
        row = next((row for row in found if not any(placed.meets(other) for other in row)), None)
        if row is None:
            found.append([placed])
        else:
            row.append(placed)
    return found


def height(rows: list[list[_Placed]]) -> float:
    return TITLE + ROW * len(rows) + GAP - 12 if rows else 0


def draw(canvas: Canvas, top: float, rows: list[list[_Placed]]) -> None:
    """Where the answers to questions are to be seen."""
    if not rows:
        return
    truths = {placed.truth for row in rows for placed in row}
    names = {True: "answered right", False: "answered wrong", None: "not judged"}
    legend = [(TRUTH[truth], names[truth]) for truth in names if truth in truths]
    title(canvas, top, "Where the answers are to be seen", legend if truths != {None} else [])
    for n, row in enumerate(rows):
        y = top + TITLE + ROW * n
        for placed in row:
            edge, inside = TRUTH[placed.truth]
            canvas.box((placed.left, y, placed.right, y + ROW - 10), inside, edge, 1.5, radius=4)
            x, inside_span = placed.label_left, placed.left < placed.label_left < placed.right
            if placed.truth is not None:
                _mark(canvas, x, y + ROW / 2 - 5, placed.truth)
                x += 26
            canvas.text((x, y + 25), placed.label, SMALL, INK, clear=not inside_span)


def _label_width(label: str, truth: bool | None) -> float:
    return text_width(label, SMALL) + (0 if truth is None else 26)


def _place(question: Span, axis: Axis) -> _Placed:
    """A span with its label inside, or else on the side with more room."""
    left = min(float(axis(axis.start if question.start is None else question.start)), RIGHT - 6)
    right = max(float(axis(axis.end if question.end is None else question.end)), left + 6)
    label = " ".join(question.label.split())
    room = max(right - left - 24, RIGHT - right - 12, left - LEFT - 12)
    label = shorten(label, SMALL, min(room, max(640, right - left - 24)) - (0 if question.right is None else 26))
    long = _label_width(label, question.right)
    if long <= right - left - 24:
        start = left + 12
    elif right + 12 + long <= RIGHT:
        start = right + 12
    else:
        start = left - 12 - long
    return _Placed(left, right, start, label, question.right)


def _mark(canvas: Canvas, x: float, y: float, truth: bool) -> None:
    """A tick or a cross, 16 pixels wide, around the height y."""
    colour = TRUTH[truth][0]
    if truth:
        canvas.line([(x, y + 1), (x + 6, y + 7), (x + 16, y - 7)], colour, 3)
    else:
        canvas.line([(x + 1, y - 7), (x + 15, y + 7)], colour, 3)
        canvas.line([(x + 1, y + 7), (x + 15, y - 7)], colour, 3)
