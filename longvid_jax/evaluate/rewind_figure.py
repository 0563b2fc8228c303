"""What ReWind looked back at in a watched video, as a figure: how relevant each moment is, and the frames it chose.

All lengths are pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longvid_jax.evaluate import timeline_panels as panels
from longvid_jax.evaluate import timeline_questions as asked
from longvid_jax.evaluate.canvas import Canvas, check
from longvid_jax.evaluate.timeline_panels import Axis, clock
from longvid_jax.evaluate.timeline_questions import Span
from longvid_jax.systems.results import RewindTrace
from longvid_jax.video import Video


def plot(trace: RewindTrace, video: Video, path: str | os.PathLike, *, questions: Sequence[Span] = ()) -> Path:
    """Writes the figure of one watched video (B = 1) as .png or .pdf and returns its path.

    From the top: the size of the memory; the frames that were looked at in detail; where the answers to `questions`
    are to be seen; how much of the question's attention each frame draws, with a dot on each candidate. Raises
    OptionError as `check` does.
    """
    check(path)
    times, relevance = trace.times[0][: int(trace.frames[0])], trace.relevance[0]
    axis = Axis(float(times[0]), max(video.probe.duration, float(times[-1]) + 1e-3))
    shown, rows = times[trace.selected[0]], asked.rows(questions, axis)
    wide, tall = panels.thumbnail(video.probe.width / video.probe.height, max(4, len(shown)))
    heights = [panels.HEAD, tall + panels.LINK, asked.height(rows)]
    frames_top, asked_top, curve_top = np.cumsum(heights).tolist()
    marked = np.zeros(len(times), bool)
    marked[trace.candidates[0]] = True

    canvas = Canvas(panels.WIDTH, curve_top + panels.CHANGE + 40)
    panels.head(canvas, Path(video.name).name, _summary(trace, video), trace)
    ends = panels.level(curve_top, relevance)[trace.selected[0]]
    pictures = video.read(shown, (panels.pixels(tall), panels.pixels(wide)))
    panels.frames(canvas, axis, frames_top, (wide, tall), pictures, list(zip(shown, ends - 8, strict=True)))
    asked.draw(canvas, asked_top, rows)
    says = "Attention of the question to each frame in memory (all heads together)"
    panels.change(canvas, axis, curve_top, times, relevance, marked, says, "candidate")
    panels.ticks(canvas, axis, curve_top + panels.TITLE + panels.CURVE)
    return canvas.save(path)


def _summary(trace: RewindTrace, video: Video) -> str:
    frames = int(trace.frames[0])
    parts = f"{clock(video.probe.duration)}", f"{frames:,} frames", f"{frames * trace.tokens:,} tokens in memory"
    return " · ".join([*parts, f"{len(trace.selected[0])} of {len(trace.candidates[0])} candidates in detail"])
