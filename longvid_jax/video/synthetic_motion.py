"""Where the things of a made-up world are at any time, and what the scenes behind them look like."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from longvid_jax.video.synthetic_things import COLOURS, SHAPES, Level, Thing, stream

# One row for everything that moves. Its centre (down, right, in parts of the frame) at age a = time - start is
# base + slope * a + swing * sin(rate * a + phase).
TRACK = np.dtype(
    [
        ("start", "f8"),  # on screen from here, in seconds,
        ("end", "f8"),  # until just before here
        ("at", "f8"),  # when rgb becomes rgb_after
        ("shape", "i8"),  # index into SHAPES
        ("rgb", "f4", 3),
        ("rgb_after", "f4", 3),
        ("radius", "f8"),  # in parts of the frame's shorter side
        ("base", "f8", 2),
        ("slope", "f8", 2),
        ("swing", "f8", 2),
        ("rate", "f8", 2),
        ("phase", "f8", 2),
        ("angle", "f8"),
        ("spin", "f8"),  # radians a second
        ("stripes", "f8"),  # how dark they are, 0 to 1
    ]
)
STILL_FROM = 60.0  # seconds: longer videos have scenes in which nothing but the camera moves
STILL = 0.6  # how many of the scenes
HIDING = 0.9  # radii: a thing hides another one whose centre is as near to its own
TRIES = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """What is between two cuts: a background and its actors."""

    base: np.ndarray  # float64 [3], of 255
    gradient: np.ndarray  # float64 [2, 3], added from top to bottom and from left to right
    waves: np.ndarray  # float64 [n, 6]: radians down and right over a frame, phase, red, green, blue
    clutter: np.ndarray  # TRACK [n], still
    cast: tuple[Thing, ...]
    tracks: np.ndarray  # TRACK [n] of movers, then of the cast
    sway: np.ndarray  # float64 [2, 2]: rate and phase of the camera, down and right
    drift: float  # parts of a frame, at most


@functools.lru_cache(maxsize=32)
def scene(
    split: str, seed: int, index: int, level: Level, cast: tuple[Thing, ...], start: float, end: float, long: bool
) -> Scene:
    """A scene from start to end; long: of a video that may stand still."""
    rng = stream(split, 1, index, seed)
    still = long and rng.random() < STILL
    low, high = level.brightness
    base = rng.uniform(low, high) + rng.uniform(-14, 14, 3)
    gradient = rng.uniform(-30, 30, (2, 1)) + rng.uniform(-10, 10, (2, 3))
    waves = np.concatenate(
        [rng.uniform(4, 40, (level.waves, 2)), rng.uniform(0, 6.3, (level.waves, 1)), np.zeros((level.waves, 3))], 1
    )
    waves[:, 1] *= rng.choice([-1.0, 1.0], level.waves)
    waves[:, 3:] = rng.uniform(-9, 9, (level.waves, 1)) + rng.uniform(-3, 3, (level.waves, 3))
    order = rng.permutation(len(cast))[: rng.integers(level.cast[0], level.cast[1] + 1)]
    actors = tuple(cast[i] for i in order)
    players = _tracks(rng, actors, level, [(start, end)] * len(actors))
    _swing(rng, players, level, still)
    movers = _colourless(rng, level.movers, level, (start, end))
    _swing(rng, movers, level, still)
    return Scene(
        base=base,
        gradient=gradient,
        waves=waves,
        clutter=_colourless(rng, level.clutter, level, (start, end)),
        cast=actors,
        tracks=np.concatenate([movers, players]),
        sway=np.stack([rng.uniform(0.15, 0.5, 2), rng.uniform(0, 6.3, 2)]),
        drift=level.drift,
    )


def centres(tracks: np.ndarray, times: np.ndarray) -> np.ndarray:
    """float64 [..., 2]: centres (down, right) of tracks at times, broadcast."""
    age = (times - tracks["start"])[..., None]
    return tracks["base"] + tracks["slope"] * age + tracks["swing"] * np.sin(tracks["rate"] * age + tracks["phase"])


def events(
    rng: np.random.Generator,
    changed: Sequence[tuple[Thing, Thing]],
    turns: Sequence[tuple[float, float, float]],
    visited: Sequence[Thing],
    spans: Sequence[tuple[float, float]],
    level: Level,
) -> np.ndarray:
    """TRACK rows of changes (start, at, end) and then of visits (start, end), none hidden behind a later row."""
    for _ in range(TRIES):
        upper = bool(rng.integers(2)) if level.apart else None
        tracks = np.concatenate(
            [_changes(rng, changed, turns, level, upper), _visits(rng, visited, spans, level, upper)]
        )
        if not _hidden(tracks):
            break
    return tracks


def _hidden(tracks: np.ndarray) -> bool:
    """Whether an event, or one of its two colours, shows in fewer than two frames at 2 frames a second."""
    for i, row in enumerate(tracks[:-1]):
        turn = min(row["at"], row["end"])
        for start, end in ((row["start"], turn), (turn, row["end"])):
            if start == end:
                continue
            times = np.arange(np.ceil(start * 2), np.ceil(end * 2))[:, None] / 2
            over = tracks[i + 1 :]
            there = (over["start"] <= times) & (times < over["end"])
            far = np.linalg.norm(centres(over, times) - centres(row, times), axis=-1) > HIDING * over["radius"]
            if (far | ~there).all(1).sum() < 2:
                return True
    return False


def _visits(rng, things, spans, level, upper) -> np.ndarray:
    """Along straight lines; where they keep apart, in the left or right of one half of the frame by turns."""
    tracks = _tracks(rng, things, level, spans)
    count, margin = len(tracks), tracks["radius"][:, None] * 1.1
    low, high = np.repeat(margin, 2, 1), np.repeat(1 - margin, 2, 1)
    if upper is not None:
        left = (np.arange(count) + rng.integers(2)) % 2 == 0
        for axis, first in ((0, np.full(count, upper)), (1, left)):
            high[first, axis] = 0.5 - 0.8 * margin[first, 0]
            low[~first, axis] = 0.5 + 0.8 * margin[~first, 0]
    stay = (tracks["end"] - tracks["start"])[:, None]
    first = rng.uniform(low, high)
    way = rng.uniform(0.4, 1.0, (count, 1)) * level.speed * stay * _direction(rng, count)
    last = first + way
    last = np.where((last < low) | (last > high), first - way, last)  # turned back at the border
    tracks["base"], tracks["slope"] = first, (np.clip(last, low, high) - first) / stay
    return tracks


def _changes(rng, things, times, level, upper) -> np.ndarray:
    """Actors that turn from one thing into the other; in the half of the frame that visits leave them."""
    tracks = _tracks(rng, [before for before, _ in things], level, [(start, end) for start, _, end in times])
    for row, (_, after), (_, at, _) in zip(tracks, things, times, strict=True):
        row["rgb_after"], row["at"] = COLOURS[after.colour], at
    _swing(rng, tracks, level, False)
    if upper is not None:
        tracks["base"][:, 0] = 0.73 if upper else 0.27
        tracks["swing"][:, 0] = np.minimum(tracks["swing"][:, 0], 0.1)
    return tracks


def _tracks(rng, things, level, spans) -> np.ndarray:
    tracks = np.zeros(len(things), TRACK)
    for row, thing, span in zip(tracks, things, spans, strict=True):
        row["rgb"], row["shape"], (row["start"], row["end"]) = COLOURS[thing.colour], SHAPES.index(thing.shape), span
    tracks["rgb_after"], tracks["at"] = tracks["rgb"], np.inf
    tracks["radius"] = rng.uniform(*level.radius, len(tracks))
    # Slightly turned where things hardly spin: a square on its corner would be hard to name.
    tracks["angle"] = rng.uniform(-1, 1, len(tracks)) * min(level.spin, 3.0)
    tracks["spin"] = rng.uniform(-1, 1, len(tracks)) * level.spin * (level.spin > 0.5)
    tracks["stripes"] = level.stripes
    return tracks


def _swing(rng, tracks, level, still) -> None:
    """Lets actors swing to and fro, side by side, inside the frame."""
    count, margin = len(tracks), tracks["radius"][:, None] * 1.1
    swing = rng.uniform(0.15, 0.6, (count, 2)) * (0.5 - margin)
    place = rng.random((count, 2))
    place[:, 1] = (place[:, 1] + rng.permutation(count)) / max(count, 1)
    tracks["base"] = margin + swing + place * (1 - 2 * margin - 2 * swing)
    tracks["phase"] = rng.uniform(0, 6.3, (count, 2))
    tracks["rate"] = 0.0 if still else np.minimum(rng.uniform(0.4, 1.0, (count, 2)) * level.speed / swing, 2.0)
    tracks["swing"] = swing


def _colourless(rng, count, level, span) -> np.ndarray:
    """TRACK [count] of clutter: nearly grey, of all shapes and sizes."""
    tracks = np.zeros(count, TRACK)
    tracks["start"], tracks["end"] = span
    grey = rng.uniform(level.brightness[0], level.brightness[1] * 1.35, (count, 1))
    tracks["rgb"] = tracks["rgb_after"] = grey + rng.uniform(-10, 10, (count, 3))
    tracks["at"] = np.inf
    tracks["shape"] = rng.integers(0, len(SHAPES), count)
    tracks["radius"] = rng.uniform(0.3, 1.2, count) * level.radius[1]
    tracks["base"] = rng.uniform(0, 1, (count, 2))
    tracks["angle"] = rng.uniform(0, 6.3, count)
    return tracks


def _direction(rng, count) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi, count)
    return np.stack([np.sin(angle), np.cos(angle)], 1)
