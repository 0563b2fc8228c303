"""A watched video as a figure: what DPSelect marked, how much the picture changed, what each layer kept when."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longvid_jax.evaluate import adacm2_figure, rewind_figure
from longvid_jax.evaluate import timeline_panels as panels
from longvid_jax.evaluate import timeline_questions as asked
from longvid_jax.evaluate.ask import MARKED, kept_share
from longvid_jax.evaluate.canvas import Canvas, check
from longvid_jax.evaluate.timeline_panels import Axis, clock
from longvid_jax.evaluate.timeline_questions import Span
from longvid_jax.systems.results import AdaCM2Trace, RewindTrace, Trace
from longvid_jax.video import Video

__all__ = ["Span", "check", "clock", "plot"]

THUMBNAILS = 7


def plot(
    trace: Trace | AdaCM2Trace | RewindTrace,
    video: Video,
    path: str | os.PathLike,
    *,
    questions: Sequence[Span] = (),
) -> Path:
    """Writes the timeline of one watched video (B = 1) as .png or .pdf and returns its path.

    AdaCM2's is as adacm2_figure has it, ReWind's as rewind_figure; this is ReTaKe's.
    From the top: the sizes of the cache; frames at the strongest key frames; where the answers to `questions` are to be
    seen (objects with what a `Span` has); DPSelect's distance of each temporal patch to its predecessor, with dots
    where at least half of a patch is marked; the share of each patch's tokens that each layer kept. Without DPSelect
    the frames are evenly spaced and the distance is left out. Raises OptionError as `check` does.
    """
    if isinstance(trace, AdaCM2Trace):
        return adacm2_figure.plot(trace, video, path, questions=questions)
    if isinstance(trace, RewindTrace):
        return rewind_figure.plot(trace, video, path, questions=questions)
    check(path)
    times, share, change = trace.times[0], kept_share(trace), None
    axis = Axis(times[0], max(video.probe.duration, times[-1] + 1e-3))
    shown, rows = _moments(trace), asked.rows(questions, axis)
    wide, tall = panels.thumbnail(video.probe.width / video.probe.height, THUMBNAILS)
    if trace.change is not None:
        change = np.append(0, trace.change[0][1:])  # the first patch has no predecessor
    heights = [panels.HEAD, tall + panels.LINK, asked.height(rows), 0 if change is None else panels.CHANGE]
    frames_top, asked_top, change_top, kept_top = np.cumsum(heights).tolist()
    ends = panels.level(change_top, change) - 10 if change is not None else np.full(len(times), kept_top + panels.TITLE)

    canvas = Canvas(panels.WIDTH, kept_top + panels.kept_height(len(share)))
    panels.head(canvas, Path(video.name).name, _summary(trace, video), trace)
    places = list(zip(shown, ends[np.searchsorted(times, shown)], strict=True))
    pictures = video.read(shown, (panels.pixels(tall), panels.pixels(wide)))
    panels.frames(canvas, axis, frames_top, (wide, tall), pictures, places)
    asked.draw(canvas, asked_top, rows)
    if change is not None:
        marked = (trace.keyframes[0] >= MARKED) & (np.arange(len(times)) > 0)
        panels.change(canvas, axis, change_top, times, change, marked)
    panels.kept(canvas, axis, kept_top, np.append(times, axis.end), share)
    return canvas.save(path)


def _moments(trace: Trace) -> np.ndarray:
    """Ascending seconds of the frames to show: the key frames where most changes, or evenly spread ones."""
    times = trace.times[0]
    if trace.keyframes is None:
        return times[np.unique(np.linspace(0, len(times) - 1, THUMBNAILS).round().astype(int))]
    marked = np.flatnonzero(trace.keyframes[0] >= MARKED)
    marked = marked[marked > 0]  # the first patch has no predecessor: its distance is 1 by definition
    strongest = marked[np.argsort(-trace.change[0][marked], kind="stable")[: THUMBNAILS - 1]]
    return times[np.sort(np.append(strongest, 0))]


def _summary(trace: Trace, video: Video) -> str:
    kept, tokens = sum(int(chunk.kept[0]) for chunk in trace.chunks), int(trace.tokens[0])
    parts = f"{clock(video.probe.duration)}", f"{int(trace.frames[0]):,} frames", f"{tokens:,} tokens"
    return " · ".join([*parts, f"{kept:,} kept in each layer ({kept / max(tokens, 1):.0%})"])
