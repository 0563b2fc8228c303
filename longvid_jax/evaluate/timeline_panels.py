"""The parts of the timeline figure, each drawn over the whole width below a given height. All lengths are pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from longvid_jax.evaluate.canvas import SCALE, Canvas, mix, shorten, text_width
from longvid_jax.systems.results import Account

WIDTH, LEFT, RIGHT = 1800, 88, 1744  # of the figure; from where to where time goes
HEAD, LINK = 176, 52  # of the head; from the frames to the moments they are of
TITLE, GAP = 50, 40  # of a panel's title; below a panel
CURVE = 200  # of the curve of change
CHANGE = TITLE + CURVE + GAP
LARGE, BODY, SMALL = 38, 24, 22  # of text
INK, MUTED, FAINT, PALE = "#2b3036", "#69727c", "#aeb5bc", "#e6e9ec"
ACCENT = "#dd6b20"  # key frames
KEPT = ("#f0f2f5", "#bcd3e8", "#6fa5d0", "#2c6cab", "#10355f")  # from none to most
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)  # seconds between ticks


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where moments of the video lie."""

    start: float  # seconds
    end: float

    def __call__(self, seconds):
        share = (np.clip(seconds, self.start, self.end) - self.start) / (self.end - self.start)
        return LEFT + (RIGHT - LEFT) * share

    def say(self, seconds: float) -> str:
        return clock(seconds) if self.end - self.start > 5 else f"{seconds:.1f} s"

    def ticks(self) -> np.ndarray:
        """Seconds, eleven at most."""
        span = self.end - self.start
        step = next((step for step in STEPS if span / step <= 10), span / 5)
        return np.arange(np.ceil(self.start / step), self.end / step + 1e-6) * step


def clock(seconds: float) -> str:
    """3:07, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def pixels(length: float) -> int:
    """As many as are drawn for a length."""
    return round(length * SCALE)


# --- the head ---------------------------------------------------------------------------------------------------------


def head(canvas: Canvas, name: str, summary: str, trace: Account) -> None:
    """The video's name, what became of it, and bars for the bytes of its cache."""
    bars = [("cache", trace.cache_bytes, KEPT[3])]
    if trace.cache_bytes != trace.cache_bytes_uncompressed:
        bars = [("cache in full", trace.cache_bytes_uncompressed, FAINT), ("cache kept", trace.cache_bytes, KEPT[3])]
    most, long = max(size for _, size, _ in bars), 260
    left = RIGHT - 120 - long
    for n, (label, size, colour) in enumerate(bars):
        y = 58 + 40 * n
        canvas.text((left - 16, y), label, BODY, MUTED, "rs")
        canvas.box((left, y - 19, left + max(long * size / max(most, 1), 2), y + 1), colour, radius=3)
        canvas.text((RIGHT, y), _bytes(size), BODY, INK, "rs")
    room = left - 190 - LEFT
    canvas.text((LEFT, 60), shorten(name, LARGE, room), LARGE, INK)
    canvas.text((LEFT, 98), shorten(summary, BODY, room), BODY, MUTED)


def _bytes(size: int) -> str:
    exponent = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**exponent:.{1 if exponent else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"


# --- frames -----------------------------------------------------------------------------------------------------------


def thumbnail(aspect: float, most: int) -> tuple[float, float]:
    """Width and height such that `most` of them fit side by side."""
    wide = (RIGHT - LEFT - 14 * (most - 1)) / most
    tall = min(max(wide / aspect, 4), 260)
    return min(max(tall * aspect, 4), wide), tall


def frames(canvas: Canvas, axis: Axis, top: float, size: tuple[float, float], pictures: np.ndarray, places) -> None:
    """Pictures [n, H, W, 3] as near to their moments as there is room, with lines down to their places (seconds, y)."""
    wide, tall = size
    bottom = top + tall
    lefts = _side_by_side(np.array([axis(time) for time, _ in places]) - wide / 2, wide + 14, LEFT, RIGHT - wide)
    for left, picture, (time, end) in zip(lefts, pictures, places, strict=True):
        middle, x = left + wide / 2, axis(time)
        canvas.line([(middle, bottom), (x, bottom + LINK - 8), (x, max(end, bottom + LINK - 8))], FAINT, 1.5)
        canvas.picture((left, top, left + wide, bottom), picture)
        canvas.box((left, top, left + wide, bottom), edge=INK, width=1)
        canvas.text((middle, top - 10), axis.say(time), BODY, INK, "ms")


def _side_by_side(wanted: np.ndarray, step: float, first: float, last: float) -> np.ndarray:
    """Places near the ascending wanted ones, at least step apart, between first and last."""
    index = np.arange(len(wanted)) * step
    right = np.maximum.accumulate(np.maximum(wanted, first) - index) + index
    return np.minimum.accumulate((np.minimum(right, last) - index)[::-1])[::-1] + index


# --- the curve of change ----------------------------------------------------------------------------------------------


def level(top: float, change: np.ndarray) -> np.ndarray:
    """The heights of the curve's points."""
    return top + TITLE + CURVE - CURVE / 1.06 * change / max(change.max(), 1e-6)


def change(
    canvas: Canvas,
    axis: Axis,
    top: float,
    times: np.ndarray,
    change: np.ndarray,
    marked: np.ndarray,
    says: str = "Change of the picture (1 - cosine to the moment before)",
    name: str = "key frame",
) -> None:
    """The curve, and a dot on each marked moment."""
    title(canvas, top, says, [(ACCENT, name)])
    base, xs, ys = top + TITLE + CURVE, axis(times), level(top, change)
    if len(times) > 1:
        # Of points that share half a pixel the highest is drawn.
        at = np.round(2 * xs[1:]).astype(int) if len(times) > RIGHT - LEFT else np.arange(len(times) - 1)
        _, first = np.unique(at, return_index=True)
        points = list(zip(xs[1:][first], np.minimum.reduceat(ys[1:], first), strict=True))
        canvas.area([(points[0][0], base), *points, (points[-1][0], base)], PALE)
        canvas.line(points, INK, 2)
    canvas.line([(LEFT, base), (RIGHT, base)], FAINT, 1.5)
    for tick in _ticks(1.06 * change.max()):
        y = base - CURVE / 1.06 * tick / max(change.max(), 1e-6)
        canvas.line([(LEFT - 6, y), (LEFT, y)], FAINT, 1.5)
        canvas.text((LEFT - 12, y), f"{tick:g}", SMALL, MUTED, "rm")
    radius = float(np.clip(60 / np.sqrt(len(times)), 3, 6))
    for x, y in zip(xs[marked], ys[marked], strict=True):
        canvas.dot((x, y), radius, ACCENT)


def _ticks(most: float) -> list[float]:
    """Zero and up to four round numbers above it."""
    if most <= 0:
        return [0.0]
    power = 10.0 ** np.floor(np.log10(most))
    step = next(step for step in (0.2 * power, 0.5 * power, power, 2 * power, 5 * power) if most / step < 4)
    return [float(tick) for tick in np.arange(0, most + 1e-9, step)]


# --- what was kept ----------------------------------------------------------------------------------------------------


def kept_height(layers: int) -> float:
    return TITLE + _cell(layers) * layers + 76


def kept(
    canvas: Canvas,
    axis: Axis,
    top: float,
    edges: np.ndarray,
    share: np.ndarray,
    says: str = "Share of the tokens that each layer keeps",
    power: float = 1.0,
) -> None:
    """The share [L, T] of tokens that each layer kept of the patches between edges [T + 1], as colours over time.

    power: of the share, to which the colours are proportional; below 1, small ones are told apart.
    """
    title(canvas, top, says)
    top, cell, layers = top + TITLE, _cell(len(share)), len(share)
    # Each column of pixels shows the mean over the time it stands for: of many patches in it none is left out.
    columns = np.linspace(edges[0], edges[-1], RIGHT - LEFT + 1)
    total = np.pad(np.cumsum(share * np.diff(edges), axis=1), ((0, 0), (1, 0)))
    mean = np.stack([np.diff(np.interp(columns, edges, layer)) for layer in total]) / np.diff(columns)
    most = max(mean.max(), 1e-6)
    bottom = top + cell * layers
    canvas.picture((LEFT, top, RIGHT, bottom), mix(KEPT, (mean[::-1] / most) ** power), smooth=False)
    every = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if step * cell >= 32)
    for layer in range(layers):
        y = bottom - cell * (layer + 0.5)
        if layer % every == 0:
            canvas.text((LEFT - 12, y), f"{layer}", SMALL, MUTED, "rm")
        if layer and cell > 20:
            canvas.line([(LEFT, y + cell / 2), (RIGHT, y + cell / 2)], "#ffffff", 1)
    ticks(canvas, axis, bottom)
    scale(canvas, top - TITLE, most, power)


def ticks(canvas: Canvas, axis: Axis, bottom: float) -> None:
    """The clock, below a panel that ends there."""
    for time in axis.ticks():
        x = axis(time)
        canvas.line([(x, bottom), (x, bottom + 7)], FAINT, 1.5)
        canvas.text((x, bottom + 34), axis.say(time), SMALL, INK, "ms")


def _cell(layers: int) -> float:
    """The height of a layer."""
    return float(np.clip(220 / layers, 3, 40))


def scale(canvas: Canvas, top: float, most: float, power: float = 1.0) -> None:
    """What the colours mean, at the right of a title."""
    label, long, y = f"{most:.0%}" if most >= 0.1 else f"{most:.1%}", 220, top + TITLE - 18
    right = RIGHT - text_width(label, SMALL) - 12
    canvas.text((RIGHT, y), label, SMALL, MUTED, "rs", clear=True)
    colours = mix(KEPT, np.linspace(0, 1, long) ** power)
    canvas.picture((right - long, y - 16, right, y), colours[None])
    canvas.text((right - long - 12, y), "0%", SMALL, MUTED, "rs", clear=True)


def title(canvas: Canvas, top: float, title: str, legend: Sequence = ()) -> None:
    """A panel's title, and at its right what its colours mean: (colour, name) for a dot, ((edge, inside), name)."""
    y = top + TITLE - 18
    canvas.text((LEFT, y), title, BODY, INK, clear=True)
    x = RIGHT
    for colour, name in reversed(legend):
        x -= text_width(name, SMALL)
        canvas.text((x, y), name, SMALL, MUTED, clear=True)
        if isinstance(colour, str):
            canvas.dot((x - 16, y - 8), 6, colour)
        else:
            canvas.box((x - 34, y - 16, x - 10, y), colour[1], colour[0], 1.5, radius=3)
        x -= 62
