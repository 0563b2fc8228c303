"""What happens in a made-up video, and when: a pure function of split, seed, level, length and number of events.

Roles. The *cast* are actors that stay for a whole scene. A *visit* is a thing that appears for a few seconds, moves and
vanishes. A *change* is an actor that enters, turns into another colour and leaves. Of the visits one thing is the
*counted* one: it comes 1 to `most` times, each number equally often; nearly all others come once.

The visits' starts lie on a circle, so to speak: apart from each other and turned at random. So each of them is uniform
over the video, however many there are.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from longvid_jax.video import synthetic_motion as motion
from longvid_jax.video.synthetic_things import SHAPES, Level, Thing, allowed, stream

SHORTEST_STAY = 1.0  # seconds: two frames at 2 frames a second, wherever they fall
APART = 0.5  # seconds between two starts: one such frame
ABSENT = 0.75  # seconds between two visits of the counted thing
MOST = 5  # visits of the counted thing
ONCE = 8  # things that come once, at most
TURNS = 2  # changes, at most: each needs a shape of its own


@dataclasses.dataclass(frozen=True)
class Event:
    """A visit or a change; on screen from start until just before end, in seconds."""

    kind: str  # "visit" or "change"
    colour: str
    shape: str
    start: float
    end: float
    at: float | None = None  # of a change: when the colour turns ...
    becomes: str | None = None  # ... into this one

    @property
    def moment(self) -> float:
        """When it happens: the appearance, or the turn of colour."""
        return self.start if self.at is None else self.at

    @property
    def thing(self) -> Thing:
        return Thing(self.colour, self.shape)

    @property
    def things(self) -> tuple[Thing, ...]:
        """All that is seen of it."""
        return (self.thing,) if self.becomes is None else (self.thing, Thing(self.becomes, self.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Script:
    """All that happens in a world."""

    split: str
    seed: int
    level: Level
    seconds: float
    placed: bool  # the visits' times were given
    events: tuple[Event, ...]  # by moment
    cast: tuple[Thing, ...]
    counted: Thing | None
    most: int  # how often the counted thing could have come
    cuts: tuple[float, ...]  # seconds
    noise: float  # standard deviation, of 255
    tracks: np.ndarray  # TRACK rows of changes, then of visits

    def scene_at(self, time: float) -> int:
        return bisect.bisect_right(self.cuts, time)

    def scene(self, index: int) -> motion.Scene:
        start, end = (0.0, *self.cuts, math.inf)[index : index + 2]
        long = self.seconds >= motion.STILL_FROM
        return motion.scene(self.split, self.seed, index, self.level, self.cast, start, end, long)

    @functools.cached_property
    def things(self) -> tuple[Thing, ...]:
        """Everything that is ever seen, each once."""
        return tuple(dict.fromkeys([thing for event in self.events for thing in event.things] + list(self.cast)))


def room(seconds: float) -> int:
    """How many visits fit."""
    return 1 + int((seconds - SHORTEST_STAY) / (1.5 * APART))


def compose(
    split: str, seed: int, level: Level, seconds: float, visits: int | tuple | None, changes: int | None
) -> Script:
    """Draws a script; visits is their number, or the (start, end) of each, or None for what suits the length."""
    rng = stream(split, 0, seed)
    placed = isinstance(visits, tuple)
    times, most, once = (0, 0, len(visits)) if placed else _numbers(rng, seconds, visits)
    turning, comers, cast = _roles(rng, split, level, _turns(rng, seconds) if changes is None else changes, times, once)

    starts = [start for start, _ in visits] if placed else _starts(rng, seconds - SHORTEST_STAY, times, once)
    order = np.argsort(starts, kind="stable")
    visited, starts = [comers[i] for i in order], [round(float(starts[i]), 3) for i in order]
    ends = [visits[i][1] for i in order] if placed else _ends(rng, visited, starts, seconds, level)
    spans = list(zip(starts, ends, strict=True))
    turns: list[Event] = []
    for shape in turning:
        turns.append(_change(rng, split, shape, seconds, starts + [event.at for event in turns]))
    changed, change_times = [event.things for event in turns], [(event.start, event.at, event.end) for event in turns]
    events = [Event("visit", *thing, *span) for thing, span in zip(visited, spans, strict=True)] + turns
    return Script(
        split=split,
        seed=seed,
        level=level,
        seconds=seconds,
        placed=placed,
        events=tuple(sorted(events, key=lambda event: event.moment)),
        cast=tuple(cast),
        counted=comers[0] if times else None,
        most=most,
        cuts=_cuts(rng, seconds, events),
        noise=float(level.noise * rng.uniform(0.25, 1.0)),
        tracks=motion.events(rng, changed, change_times, visited, spans, level),
    )


def _numbers(rng, seconds: float, visits: int | None) -> tuple[int, int, int]:
    """How often the counted thing comes and could come, and how many visits there are beside."""
    most = min(MOST, max(1, int((seconds - SHORTEST_STAY) / 2)), MOST if visits is None else visits)
    times = int(rng.integers(1, most + 1)) if most else 0
    if visits is not None:
        return times, most, visits - times
    low, high = (0, 0) if seconds < 2 else (1, 1) if seconds < 6 else (1, 2) if seconds < 12 else (2, 3)
    more = rng.integers(1, 3) if seconds >= 40 else 0
    return times, most, int(rng.integers(low, high + 1) + more)


def _roles(
    rng, split: str, level: Level, turns: int, times: int, once: int
) -> tuple[list[str], list[Thing], list[Thing]]:
    """The shapes that turn, the thing of each visit (the counted one first), and the cast."""
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    turning, staying, coming = shapes[:turns], shapes[turns:][: level.cast_shapes], shapes[turns:][level.cast_shapes :]
    named = _things(rng, split, coming, min(once, ONCE) + (times > 0), level.alike)
    again = _things(rng, split, coming, 2, level.alike, named) if once > ONCE else []  # these come again and again
    cast = _things(rng, split, staying or coming, level.cast[1], level.alike, named + again)
    comers = named[:1] * times + named[times > 0 :] + [again[i % 2] for i in range(once - ONCE)]
    return turning, comers, cast


def _turns(rng, seconds) -> int:
    return 0 if seconds < 4 else 1 if seconds < 60 else int(rng.integers(1, TURNS + 1))


def _things(
    rng, split: str, shapes: Sequence[str], count: int, alike: float, others: Sequence[Thing] = ()
) -> list[Thing]:
    """Different things of these shapes; with probability alike one shares its colour or shape with an earlier one."""
    left = [thing for thing in allowed(split) if thing.shape in shapes and thing not in others]
    chosen = []
    for _ in range(count):
        if chosen and rng.random() < alike:
            part, other = rng.integers(2), chosen[rng.integers(len(chosen))]
            fitting = [thing for thing in left if thing[part] == other[part]]
        else:
            used_colours, used_shapes = ({thing[part] for thing in [*chosen, *others]} for part in (0, 1))
            fresh = [thing for thing in left if thing.colour not in used_colours]
            fitting = [thing for thing in fresh if thing.shape not in used_shapes] or fresh
        fitting = fitting or left
        chosen.append(fitting[rng.integers(len(fitting))])
        left.remove(chosen[-1])
    return chosen


def _starts(rng, length: float, times: int, once: int) -> np.ndarray:
    """float64 [times + once] in [0, length), those of the counted thing first."""
    if not length:
        return np.zeros(times + once)
    gap = min(SHORTEST_STAY + ABSENT, length / max(times, 1))
    starts = np.sort(rng.uniform(0, length - times * gap, times)) + np.arange(times) * gap
    for _ in range(once):
        tries = rng.uniform(0, length, 32)
        away = np.abs(tries[:, None] - starts)
        away = np.minimum(away, length - away).min(1, initial=length)
        starts = np.append(starts, tries[np.argmax(np.minimum(away, APART + 0.01))])  # the first that is far enough
    return (starts + rng.uniform(0, length)) % length


def _ends(rng, things, starts, seconds, level) -> list[float]:
    """Ends of visits whose starts ascend: no more than `together` at a time, and gaps between equal ones."""
    ends = []
    for i, start in enumerate(starts):
        end = start + rng.uniform(*level.stay)
        if i + level.together < len(starts):
            end = min(end, starts[i + level.together])
        again = [later for thing, later in zip(things[i + 1 :], starts[i + 1 :], strict=True) if thing == things[i]]
        if again:
            end = min(end, again[0] - ABSENT)
        ends.append(round(min(max(end, start + SHORTEST_STAY), seconds), 3))
    return ends


def _change(rng, split, shape, seconds, moments) -> Event:
    """An actor of a shape that nobody else has, apart from the other moments where there is room."""
    colours = [thing.colour for thing in allowed(split) if thing.shape == shape]
    before, after = (colours[i] for i in rng.permutation(len(colours))[:2])
    tries = rng.uniform(SHORTEST_STAY, seconds - SHORTEST_STAY, 32)
    away = np.abs(tries[:, None] - np.array(moments)).min(1, initial=seconds)
    at = round(float(tries[np.argmax(np.minimum(away, APART + 0.01))]), 3)
    reach = min(max(seconds / 5, SHORTEST_STAY), 10.0)
    start = at - rng.uniform(SHORTEST_STAY, max(SHORTEST_STAY, min(at, reach)))
    end = at + rng.uniform(SHORTEST_STAY, max(SHORTEST_STAY, min(seconds - at, reach)))
    return Event("change", before, shape, max(0.0, round(start, 3)), min(seconds, round(end, 3)), at, after)


def _cuts(rng, seconds, events) -> tuple[float, ...]:
    """Every 5 to 10 seconds in a short video, every 5 to 90 in a long one, and never just when something happens."""
    busy = np.array([time for event in events for time in (event.start, event.moment, event.end)])
    cuts, time = [], 0.0
    while True:
        long = seconds >= motion.STILL_FROM
        time += float(np.clip(rng.lognormal(math.log(14), 0.8), 5, 90) if long else rng.uniform(5, 10))
        if time > seconds - 1:
            return tuple(cuts)
        tries = time + rng.uniform(-1.5, 1.5, 8)
        free = tries[np.abs(tries[:, None] - busy).min(1, initial=seconds) > 0.4]
        free = free[free < seconds - 1]
        if len(free):
            cuts.append(round(float(free[0]), 3))
