"""A watched video as a figure: what DPSelect marked, how much the picture changed, what each layer kept when."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longvid_jax.evaluate.ask import MARKED, kept_share
from longvid_jax.evaluate.canvas import Canvas, check, mix, shorten, text_width
from longvid_jax.systems.results import Trace
from longvid_jax.video import Video

# All lengths are pixels.
WIDTH, LEFT, RIGHT = 1800, 84, 1740  # of the figure; from where to where time goes
HEAD, TITLE, GAP = 172, 56, 34  # above the frames; of a panel's heading; between panels
LINK, LANE, CHANGE = 56, 40, 210  # from frames to their moments; a row of questions; the curve
THUMBNAILS, BETWEEN = 7, 14
LARGE, BODY, SMALL = 36, 24, 22  # of text
INK, MUTED, FAINT, PALE = "#2b3036", "#69727c", "#aeb5bc", "#e6e9ec"
ACCENT = "#dd6b20"  # key frames
KEPT = ("#f0f2f5", "#bcd3e8", "#6fa5d0", "#2c6cab", "#10355f")  # from none to most
SPANS = {True: ("#2f855a", "#d7ecdf"), False: ("#c53030", "#f8dcdc"), None: (MUTED, PALE)}  # edge and inside
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)  # seconds between ticks


@dataclasses.dataclass(frozen=True)
class Span:
    """A question, and the seconds in which its answer is to be seen (None: anywhere); `right` if that is known."""

    label: str
    start: float | None
    end: float | None
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where moments of the video lie."""

    start: float  # seconds
    end: float

    def __call__(self, seconds):
        return LEFT + (RIGHT - LEFT) * (np.clip(seconds, self.start, self.end) - self.start) / (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """At most eleven places and their times."""
        span = self.end - self.start
        step = next((step for step in STEPS if span / step <= 10), span / 5)
        places = np.arange(np.ceil(self.start / step), self.end / step + 1e-6) * step
        return [(self(place), clock(place) if step >= 1 else f"{place:.1f} s") for place in places]


def plot(trace: Trace, video: Video, path: str | os.PathLike, *, questions: Sequence[Span] = ()) -> Path:
    """Writes the timeline of one watched video (B = 1) as .png or .pdf and returns its path.

    From the top: the sizes of the cache; frames at the strongest key frames; where the answers to questions are to be
    seen; DPSelect's distance of each temporal patch to its predecessor, with dots where at least half of a patch is
    marked; the share of each patch's tokens that each layer kept. Without DPSelect the frames are evenly spaced and the
    distance is left out. Raises OptionError as `check` does.
    """
    check(path)
    axis = Axis(trace.times[0][0], max(video.probe.duration, trace.times[0][-1] + 1e-3))
    shown, share, rows = _moments(trace), kept_share(trace), _rows(questions, axis)
    wide, tall = _thumbnail_size(video)
    cell = float(np.clip(210 / len(share), 3, 36))  # a layer's height
    tops = [HEAD, tall + LINK]  # of the frames, of the questions, of the curve, of what was kept
    tops += [TITLE + LANE * len(rows) + GAP if rows else 0, TITLE + CHANGE + GAP if trace.change is not None else 0]
    frames, asked, changed, kept = np.cumsum(tops).tolist()
    bottom = kept + TITLE + cell * len(share)

    canvas = Canvas(WIDTH, bottom + 62)
    _draw_head(canvas, trace, video)
    ends = np.full(len(shown), kept + TITLE - 4)
    if trace.change is not None:
        place = _draw_change(canvas, axis, changed + TITLE, trace)
        ends = place(trace.change[0][np.searchsorted(trace.times[0], shown)]) - 12
    _draw_frames(canvas, axis, frames, (wide, tall), video, shown, ends)
    if rows:
        _draw_questions(canvas, asked, rows)
    if trace.change is not None:
        _title(canvas, changed, "Change of the picture (1 - cosine to the moment before)")
        _legend(canvas, changed, [(ACCENT, "key frame")])
    _draw_kept(canvas, axis, kept, cell, share, np.append(trace.times[0], axis.end))
    return canvas.save(path)


def clock(seconds: float) -> str:
    """3:07, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _moments(trace: Trace) -> np.ndarray:
    """Ascending seconds of the frames to show: the key frames where most changes, or evenly spread ones."""
    times = trace.times[0]
    if trace.keyframes is None:
        return times[np.unique(np.linspace(0, len(times) - 1, THUMBNAILS).round().astype(int))]
    marked = np.flatnonzero(trace.keyframes[0] >= MARKED)
    marked = marked[marked > 0]  # the first patch has no predecessor: its distance is 1 by definition
    strongest = marked[np.argsort(-trace.change[0][marked], kind="stable")[: THUMBNAILS - 1]]
    return times[np.sort(np.append(strongest, 0))]
