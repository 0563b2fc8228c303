"""Paints a script's frames at any times and any size.

A frame is a function of its time alone. All frames of a call are painted together: n frames, I instances (a thing in a
frame), in boxes of b x b pixels. Edges are smoothed by the signed distance to the shape's outline, in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from longvid_jax.video.synthetic_motion import Scene, centres
from longvid_jax.video.synthetic_script import Script
from longvid_jax.video.synthetic_things import SHAPES

AT_ONCE = 1 << 17  # pixels: what is painted together stays in the processor's cache
GRAIN = 56  # cells of noise from top to bottom: the same noise at any size
WIDEST = 4  # times as wide as high


def render(script: Script, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [n, H, W, 3] at times float64 [n] in seconds; size is (H, W)."""
    height, width = size
    pixels = np.empty((len(times), height, width, 3), np.uint8)
    order = np.argsort(times, kind="stable")
    step = max(1, AT_ONCE // (height * width))
    for i in range(0, len(times), step):
        rows = order[i : i + step]
        pixels[rows] = _paint(script, times[rows], height, width)
    return pixels


def _paint(script: Script, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [n, H, W, 3] at ascending times; colours stay apart till the end, so that inner loops run along rows."""
    canvas = np.empty((len(times), 3, height, width), np.float32)
    scenes = np.array([script.scene_at(time) for time in times])
    tracks, end = [], 0
    while end < len(times):
        start, index = end, int(scenes[end])
        end = int(np.searchsorted(scenes, index, side="right"))
        scene = script.scene(index)
        _background(canvas[start:end], scene, times[start:end])
        tracks.append(scene.tracks)
    _things(canvas, np.concatenate([*tracks, script.tracks]), times)
    _noise(canvas, times, script.noise, script.seed)
    canvas += 0.5  # as conversion rounds down
    np.clip(canvas, 0.0, 255.0, out=canvas)
    return np.stack(list(canvas.astype(np.uint8).swapaxes(0, 1)), axis=-1)


def _background(canvas: np.ndarray, scene: Scene, times: np.ndarray) -> None:
    """Fills canvas, seen through a camera that sways."""
    height, width = canvas.shape[2:]
    rate, phase = scene.sway
    down, right = (scene.drift * np.sin(times[:, None] * rate + phase)).T
    if len(scene.waves) or len(scene.clutter):
        picture, margin = _picture(scene, height, width)
        for frame, y, x in zip(canvas, margin[0] + down * height, margin[1] + right * width, strict=True):
            _crop(picture, float(y), float(x), frame)
        return
    ys = ((np.arange(height) + 0.5) / height - 0.5 + down[:, None])[:, None, :, None]
    xs = ((np.arange(width) + 0.5) / width - 0.5 + right[:, None])[:, None, None, :]
    base, (vertical, horizontal) = scene.base[:, None, None], scene.gradient[:, :, None, None]
    np.add((base + ys * vertical).astype(np.float32), (xs * horizontal).astype(np.float32), out=canvas)


def _crop(picture: np.ndarray, y: float, x: float, out: np.ndarray) -> None:
    """Bilinear: the part of a picture [3, ...] whose first pixel is at (y, x)."""
    (i, y), (j, x) = divmod(y, 1.0), divmod(x, 1.0)
    height, width = out.shape[1:]
    part = picture[:, int(i) : int(i) + height + 1, int(j) : int(j) + width + 1]
    rows = part[:, :-1] * np.float32(1 - y) + part[:, 1:] * np.float32(y)
    np.multiply(rows[:, :, :-1], np.float32(1 - x), out=out)
    out += rows[:, :, 1:] * np.float32(x)


@functools.lru_cache(maxsize=4)
def _picture(scene: Scene, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A background with texture and clutter [3, ...], and by how much (down, right) it is wider on each side."""
    margin = int(scene.drift * height) + 1, int(scene.drift * width) + 1
    shape = height + 2 * margin[0] + 1, width + 2 * margin[1] + 1
    ys = ((np.arange(shape[0]) - margin[0] + 0.5) / height - 0.5).astype(np.float32)[:, None]
    xs = ((np.arange(shape[1]) - margin[1] + 0.5) / width - 0.5).astype(np.float32)[None, :]
    vertical, horizontal = scene.gradient.astype(np.float32)[:, :, None, None]
    picture = scene.base.astype(np.float32)[:, None, None] + ys * vertical + xs * horizontal
    for down, right, phase, *rgb in scene.waves.astype(np.float32):
        picture += np.sin(ys * down + xs * right + phase) * np.array(rgb)[:, None, None]
    # Clutter is spread over the whole picture, in the size that it has in the frame.
    _things(picture[None], scene.clutter, np.zeros(1), unit=min(height, width), always=True)
    return picture, margin


def _things(
    canvas: np.ndarray, tracks: np.ndarray, times: np.ndarray, *, unit: int | None = None, always: bool = False
) -> None:
    """Paints over canvas float32 [n, 3, H, W] what is on screen, later rows of tracks over earlier ones."""
    height, width = canvas.shape[2:]
    shown = (tracks["start"] <= times[:, None]) & (times[:, None] < tracks["end"]) | always
    frame, which = np.nonzero(shown)
    if not len(frame):
        return
    layer = (np.cumsum(shown, 1) - 1)[frame, which]
    order = np.argsort(layer, kind="stable")  # within a layer no frame has two instances
    frame, layer = frame[order], layer[order]
    track, time = tracks[which[order]], times[frame]
    place, cover, shade = _boxes(track, time, height, width, unit or min(height, width))
    place += (frame * (3 * height * width))[:, None, None]
    rgb = np.where((time >= track["at"])[:, None], track["rgb_after"], track["rgb"]).T[:, :, None, None]

    flat = canvas.reshape(-1)
    ends = np.searchsorted(layer, np.arange(layer[-1] + 1), side="right")
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        part = slice(start, end)
        for i in range(3):
            there = place[part] + i * (height * width)
            under = flat[there]
            colour = rgb[i, part] if shade is None else rgb[i, part] * shade[part]
            flat[there] = under + cover[part] * (colour - under)


def _boxes(
    track: np.ndarray, time: np.ndarray, height: int, width: int, unit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The boxes round I instances [I, b, b]: index into a plane H x W, cover float32 0 to 1, brightness or None."""
    centre = centres(track, time) * (height, width)
    radius = track["radius"] * unit
    box = min(int(2.2 * radius.max()) + 3, height, width)
    corner = np.clip(np.rint(centre - box / 2).astype(np.int64), 0, (height - box, width - box))
    rows, columns = corner[:, :1] + np.arange(box), corner[:, 1:] + np.arange(box)  # [I, b]
    y = ((rows + 0.5 - centre[:, :1]) / radius[:, None]).astype(np.float32)[:, :, None]
    x = ((columns + 0.5 - centre[:, 1:]) / radius[:, None]).astype(np.float32)[:, None, :]
    angle = track["angle"] + track["spin"] * (time - track["start"])
    cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    x, y = x * cos + y * sin, y * cos - x * sin

    cover, pixels = np.empty(x.shape, np.float32), radius.astype(np.float32)[:, None, None]
    for shape in np.unique(track["shape"]):
        of = np.flatnonzero(track["shape"] == shape)
        cover[of] = 0.5 - DISTANCE[SHAPES[shape]](x[of], y[of]) * pixels[of]
    np.clip(cover, 0.0, 1.0, out=cover)
    shade = None
    if track["stripes"].any():
        x *= np.float32(1.3)
        x -= np.rint(x)
        shade = 1 - np.abs(x) * (2 * track["stripes"].astype(np.float32)[:, None, None])  # a zigzag across the thing
    return rows[:, :, None] * width + columns[:, None, :], cover, shade


def _noise(canvas: np.ndarray, times: np.ndarray, deviation: float, seed: int) -> None:
    """Adds noise that depends on seed and time, in cells of 1 / GRAIN of the height, at its pixels' centres."""
    height, width = canvas.shape[2:]
    rows, columns = (((np.arange(length) + 0.5) * GRAIN / height).astype(int) for length in (height, width))
    tile, same, strength = _tile(), height == GRAIN, np.float32(deviation)
    for frame, place in zip(canvas, _scatter(times, seed), strict=True):
        i, j = divmod(int(place) % (256 * 256), 256)
        cells = tile[:, i : i + rows[-1] + 1, j : j + columns[-1] + 1]
        frame += (cells if same else cells[:, rows[:, None], columns]) * strength


def _scatter(times: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [n]: well-mixed bits of times to the microsecond (splitmix64)."""
    bits = np.rint(times * 1e6).astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@functools.cache
def _tile() -> np.ndarray:
    """float32 [3, 256 + GRAIN, 256 + GRAIN * WIDEST] of normal noise."""
    shape = (3, 256 + GRAIN, 256 + GRAIN * WIDEST)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.95


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.82


def _triangle(x, y):
    return np.maximum(np.abs(x) * 0.866 - y * 0.5, y) - 0.56


def _star(x, y):
    """Five points: folded twice into a tenth of it, then one straight edge."""
    x, y = np.abs(x), -y
    for kx, ky in ((0.809017, -0.587785), (-0.809017, -0.587785)):
        over = 2 * np.maximum(kx * x + ky * y, 0)
        x, y = x - over * kx, y - over * ky
    x = np.abs(x)
    return (y - 1.12) * 0.384 + x * 0.923  # the edge from the tip (0, 1.12) to the notch


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1.0, np.minimum(x, y) - 0.34)


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - 0.72) - 0.26


# Signed distance to the outline of a shape of radius about 1 round (0, 0), x right and y down; negative inside.
DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
