"""A canvas for figures: Pillow's shapes and its own font, drawn large and made smaller, so that edges are smooth."""

from __future__ import annotations

import bisect
import os
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longvid_jax.errors import OptionError

SCALE = 3  # pixels drawn for one of the figure, each way
SUFFIXES = (".png", ".pdf")


class Canvas:
    """A white page. Lengths and places are pixels of the finished figure, from its upper left corner; (x, y) or boxes
    (left, top, right, bottom), which may be fractions. Colours are "#rrggbb"."""

    def __init__(self, width: float, height: float):
        self._image = Image.new("RGB", (round(width) * SCALE, round(height) * SCALE), "white")
        self._draw = ImageDraw.Draw(self._image)

    def text(
        self, place: tuple[float, float], text: str, size: float, colour: str, anchor: str = "ls", clear: bool = False
    ) -> None:
        """One line of text; Pillow's anchors: l, m, r, and s for the baseline, m for the middle. Clear: on white."""
        place, text, font = _large(place), legible(text), _font(size)
        if clear:
            left, top, right, bottom = self._draw.textbbox(place, text, font, anchor)
            self._draw.rectangle((left - 6 * SCALE, top - 3 * SCALE, right + 6 * SCALE, bottom + 3 * SCALE), "white")
        self._draw.text(place, text, colour, font, anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        self._draw.line([tuple(_large(point)) for point in points], colour, round(width * SCALE), joint="curve")

    def area(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """A filled polygon."""
        self._draw.polygon([tuple(_large(point)) for point in points], colour)

    def dot(self, place: tuple[float, float], radius: float, colour: str) -> None:
        self._draw.circle(_large(place), radius * SCALE, colour)

    def box(
        self,
        box: Sequence[float],
        fill: str | None = None,
        edge: str | None = None,
        width: float = 1,
        radius: float = 0,
    ) -> None:
        """A rectangle with an edge inside of it and round corners; never thinner than a pixel."""
        left, top, right, bottom = _large(box)
        box = left, top, max(left + SCALE, right) - 1, max(top + SCALE, bottom) - 1  # Pillow paints the last pixel too
        self._draw.rounded_rectangle(box, radius * SCALE, fill, edge, round(width * SCALE) if edge else 0)

    def picture(self, box: Sequence[float], pixels: np.ndarray, smooth: bool = True) -> None:
        """An image uint8 [H, W, 3], stretched over a box; its pixels as sharp rectangles unless smooth."""
        left, top, right, bottom = _large(box)
        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        self._image.paste(Image.fromarray(pixels).resize((right - left, bottom - top), how), (left, top))

    def finished(self) -> Image.Image:
        """The figure at its own size."""
        return self._image.reduce(SCALE)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the figure, under another name first, so that no half figure is ever there."""
        path = Path(path)
        unfinished = path.with_name(f".{path.stem[:40]}.{os.getpid()}{path.suffix}")
        try:
            self.finished().save(unfinished, quality=95, resolution=200)
            os.replace(unfinished, path)
        except OSError as error:
            raise OptionError(f"{path} cannot be written: {error.strerror or error}.") from error
        finally:
            unfinished.unlink(missing_ok=True)
        return path


def check(path: str | os.PathLike) -> None:
    """Raises OptionError unless a figure can be written to `path`: to be asked before hours of work are done."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{path} cannot be a figure: its name must end in {' or '.join(SUFFIXES)}.")
    if not path.parent.is_dir() or path.is_dir():
        raise OptionError(
            f"{path} cannot be written: {path.parent} must be a folder that exists, and {path} a file in it."
        )


def legible(text: str) -> str:
    """The text in the letters that Pillow's font has, which are ASCII's: accents are dropped, others become "?"."""
    bare = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c == "·" or (c.isascii() and c.isprintable()) else "?" for c in bare)


def text_width(text: str, size: float) -> float:
    return _font(size).getlength(legible(text)) / SCALE


def shorten(text: str, size: float, room: float) -> str:
    """The text if it fits into so many pixels, else its beginning and end around an ellipsis."""
    if text_width(text, size) <= room:
        return text

    def cut(letters: int) -> str:
        end = letters // 3  # more of the beginning: names and questions tell themselves apart there
        return text[: letters - end].rstrip() + "..." + text[len(text) - end :].lstrip()

    return cut(bisect.bisect(range(1, len(text)), room, key=lambda letters: text_width(cut(letters), size)))


def mix(colours: Sequence[str], share: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: the colours at shares [...] of the way from the first colour to the last."""
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours])
    at = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(share, at, stop) for stop in stops.T], axis=-1).round().astype(np.uint8)


@cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size * SCALE)


def _large(lengths: Sequence[float]) -> list[int]:
    return [round(length * SCALE) for length in lengths]
