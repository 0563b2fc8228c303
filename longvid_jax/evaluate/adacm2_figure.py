"""What AdaCM2 holds of a watched video, as a figure: layer by layer which moments survive, and which places of a frame.

All lengths are pixels.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longvid_jax.evaluate import timeline_panels as panels
from longvid_jax.evaluate import timeline_questions as asked
from longvid_jax.evaluate.ask import held_bytes, held_counts, held_places
from longvid_jax.evaluate.canvas import Canvas, check, mix
from longvid_jax.evaluate.timeline_panels import Axis, clock
from longvid_jax.evaluate.timeline_questions import Span
from longvid_jax.systems.results import AdaCM2Trace
from longvid_jax.video import Video

THUMBNAILS = 7
BETWEEN = 24  # from map to map
WIDEST, TALLEST = 250, 260  # of a map
CAPTION = 84  # below a map


def plot(trace: AdaCM2Trace, video: Video, path: str | os.PathLike, *, questions: Sequence[Span] = ()) -> Path:
    """Writes the figure of one watched video (B = 1) as .png or .pdf and returns its path.

    From the top: the sizes of the cache; frames of the moments of which most is held; where the answers to `questions`
    are to be seen; the share of each frame's tokens that each layer holds; how much is held of each place of a frame,
    a map a layer. Raises OptionError as `check` does.
    """
    check(path)
    frames, times = int(trace.frames[0]), trace.times[0][: int(trace.frames[0])]
    share = held_counts(trace) / trace.tokens
    axis = Axis(float(times[0]), max(video.probe.duration, float(times[-1]) + 1e-3))
    shown, rows = times[moments(share.mean(0), THUMBNAILS)], asked.rows(questions, axis)
    wide, tall = panels.thumbnail(video.probe.width / video.probe.height, THUMBNAILS)
    heights = [panels.HEAD, tall + panels.LINK, asked.height(rows), panels.kept_height(len(share))]
    frames_top, asked_top, held_top, maps_top = np.cumsum(heights).tolist()

    canvas = Canvas(panels.WIDTH, maps_top + _maps_height(trace))
    name, kept = Path(video.name).name, dataclasses.replace(trace, cache_bytes=held_bytes(trace))
    panels.head(canvas, name, _summary(trace, video), kept)
    places = [(time, held_top + panels.TITLE) for time in shown]
    panels.frames(
        canvas, axis, frames_top, (wide, tall), video.read(shown, (panels.pixels(tall), panels.pixels(wide))), places
    )
    asked.draw(canvas, asked_top, rows)
    edges = np.append(times, max(axis.end, times[-1] + (times[-1] - times[0]) / max(frames - 1, 1)))
    says = "Share of each frame's tokens that each layer holds"
    panels.kept(canvas, axis, held_top, edges, share, says, power=0.5)  # the last frames have far more than the others
    _maps(canvas, maps_top, held_places(trace), trace.grid)
    return canvas.save(path)


def moments(share: np.ndarray, most: int) -> np.ndarray:
    """Ascending indices into share [T] of at most so many of the largest, none close to another; ties to the first."""
    apart, chosen = max(1, len(share) // (2 * most)), []
    for index in np.argsort(-share, kind="stable"):
        if len(chosen) < most and all(abs(index - other) >= apart for other in chosen):
            chosen.append(int(index))
    return np.sort(chosen)


def _summary(trace: AdaCM2Trace, video: Video) -> str:
    held, tokens = np.asarray(trace.length)[:, 0], int(trace.frames[0]) * trace.tokens
    some = f"{held.max():,}" if held.min() == held.max() else f"{held.min():,} to {held.max():,}"
    parts = f"{clock(video.probe.duration)}", f"{int(trace.frames[0]):,} frames", f"{tokens:,} tokens"
    return " · ".join([*parts, f"{some} held in each layer ({held.mean() / max(tokens, 1):.1%})"])


# --- places of a frame ------------------------------------------------------------------------------------------------


def _maps_size(layers: int, grid: tuple[int, int]) -> tuple[int, float, float]:
    """Maps side by side, and their width and height."""
    across = min(layers, max(1, int((panels.RIGHT - panels.LEFT + BETWEEN) // (WIDEST / 2 + BETWEEN))))
    room = (panels.RIGHT - panels.LEFT + BETWEEN) / across - BETWEEN
    cell = min(min(room, WIDEST) / grid[1], TALLEST / grid[0])
    return across, cell * grid[1], cell * grid[0]


def _maps_height(trace: AdaCM2Trace) -> float:
    layers = len(trace.length)
    across, _, tall = _maps_size(layers, trace.grid)
    return panels.TITLE + -(-layers // across) * (tall + CAPTION) + 24


def _maps(canvas: Canvas, top: float, counts: np.ndarray, grid: tuple[int, int]) -> None:
    """For each layer its share, of what it holds, that comes from each place: counts int [L, P], the class token first.

    One scale for all layers.
    """
    layers = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    most = max(share[:, 1:].max(), 1e-6)
    panels.title(canvas, top, "Where in a frame the tokens come from that each layer holds")
    panels.scale(canvas, top, most)
    across, wide, tall = _maps_size(layers, grid)
    for layer in range(layers):
        row, column = divmod(layer, across)
        left, above = panels.LEFT + column * (wide + BETWEEN), top + panels.TITLE + row * (tall + CAPTION)
        colours = mix(panels.KEPT, share[layer, 1:].reshape(grid) / most)
        canvas.picture((left, above, left + wide, above + tall), colours, smooth=False)
        canvas.text((left, above + tall + 30), f"layer {layer}", panels.SMALL, panels.INK)
        canvas.text((left, above + tall + 58), f"class {share[layer, 0]:.0%}", panels.SMALL, panels.MUTED)
