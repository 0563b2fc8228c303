"""A video world with exact ground truth: shapes come and go, change and are counted, and questions ask for it.

    world = World(seed=3, level="clear", seconds=16)
    frames = world.render(np.arange(32) / 2, size=(56, 56))   # uint8 [32, 56, 56, 3]
    for question in world.questions(8):
        question.text, question.answer
    write_video(world, "world.mp4", size=(224, 224))         # and world.json

Everything is a pure function of the arguments. Needs NumPy, and PyAV for files.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Sequence

import numpy as np

from longvid_jax.errors import OptionError
from longvid_jax.video.synthetic_baseline import text_only
from longvid_jax.video.synthetic_file import write_video
from longvid_jax.video.synthetic_questions import FAMILIES, Question, ask, multiple_choice, retimed
from longvid_jax.video.synthetic_render import WIDEST, render
from longvid_jax.video.synthetic_script import SHORTEST_STAY, TURNS, Event, Script, compose, room
from longvid_jax.video.synthetic_text import parse_caption, parse_span, sentences, vocabulary
from longvid_jax.video.synthetic_things import COLOURS, HELD_OUT, LEVELS, SHAPES, SPLITS, Thing

__all__ = [
    "COLOURS",
    "FAMILIES",
    "HELD_OUT",
    "LEVELS",
    "SHAPES",
    "SPLITS",
    "Event",
    "Question",
    "Thing",
    "World",
    "multiple_choice",
    "parse_caption",
    "parse_span",
    "retimed",
    "sentences",
    "text_only",
    "vocabulary",
    "write_video",
]

LONGEST = 7 * 86400.0  # seconds
SMALLEST = 24  # pixels: there the things of the hardest level are 4 pixels wide


@dataclasses.dataclass(frozen=True)
class World:
    """A made-up video and what happens in it.

    Args:
      seed: whole number of at least 0.
      level: "clear", "busy" or "wild".
      seconds: length, 1 to a week, to the millisecond. From 4 on questions need the video, from 11 on all that are in
        the world can be asked, with all their answers.
      split: "train", "validation" or "test": of disjoint random numbers. The pairs in `HELD_OUT` are not in "train".
      visits: how many things come and go; or the (start, end) seconds of each, at least 1 second long; None for what
        suits the length.
      changes: how many actors change colour, 0 to 2; None for what suits the length.

    Raises:
      OptionError: an option outside its range.
    """

    seed: int
    _: dataclasses.KW_ONLY
    level: str = "clear"
    seconds: float = 16.0
    split: str = "train"
    visits: int | Sequence[tuple[float, float]] | None = None
    changes: int | None = None

    def __post_init__(self):
        _check_world(self)
        object.__setattr__(self, "seconds", round(float(self.seconds), 3))
        if isinstance(self.visits, Sequence):
            object.__setattr__(
                self, "visits", tuple((round(float(start), 3), round(float(end), 3)) for start, end in self.visits)
            )

    @classmethod
    def needle(
        cls, seed: int, *, seconds: float, depth: float, level: str = "clear", split: str = "train", changes: int = 0
    ) -> World:
        """A world in which one thing comes once, its start at depth: 0 at the video's begin, 1 as late as it can."""
        if not (isinstance(depth, numbers.Real) and 0 <= depth <= 1):
            raise OptionError(f"depth is {depth!r}, expected a number from 0 to 1.")
        world = cls(seed, level=level, seconds=seconds, split=split, changes=changes)
        stay = min(sum(LEVELS[level].stay) / 2, world.seconds)
        start = round(depth * (world.seconds - stay), 3)
        return dataclasses.replace(world, visits=((start, min(round(start + stay, 3), world.seconds)),))

    @functools.cached_property
    def script(self) -> Script:
        return compose(self.split, self.seed, LEVELS[self.level], self.seconds, self.visits, self.changes)

    @property
    def events(self) -> tuple[Event, ...]:
        """All visits and changes, by the moment in which they happen; exact."""
        return self.script.events

    @property
    def cuts(self) -> tuple[float, ...]:
        """Seconds at which another scene begins."""
        return self.script.cuts

    def visible(self, time: float) -> tuple[Thing, ...]:
        """The things on screen at a time, the cast first."""
        things = list(self.script.scene(self.script.scene_at(time)).cast)
        for event in self.events:
            if event.start <= time < event.end:
                things.append(event.things[0] if event.at is None or time < event.at else event.things[1])
        return tuple(things)

    def render(self, times: Sequence[float] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Frames at any times in any order; a frame depends on its time alone.

        Args:
          times: [n] seconds from 0 to the world's.
          size: (H, W) in pixels.

        Returns:
          uint8 [n, H, W, 3].

        Raises:
          OptionError: a time outside the video, or a size that is too small or too wide.
        """
        times = np.asarray(times, np.float64)
        if times.ndim != 1 or not ((times >= 0) & (times <= self.seconds)).all():
            raise OptionError(f"times are not all a list of seconds from 0 to {self.seconds:g}; render no others.")
        return render(self.script, times, _checked(size))

    def questions(self, count: int | None = None, families: Sequence[str] | None = None) -> tuple[Question, ...]:
        """Questions on this world, none twice.

        Args:
          count: how many at most, the families in turn; None is one of each family that can be asked.
          families: of `FAMILIES`; None is all.

        Returns:
          Perhaps fewer than asked for; the first of many are the same as few.

        Raises:
          OptionError: an unknown family, or a count that is not a whole number of at least 0.
        """
        families = tuple(FAMILIES) if families is None else tuple(families)
        for family in families:
            if family not in FAMILIES:
                raise OptionError(f"the family is {family!r}, expected one of {', '.join(FAMILIES)}.")
        if count is not None and not (isinstance(count, numbers.Integral) and count >= 0):
            raise OptionError(f"count is {count!r}, expected a whole number of at least 0.")
        return ask(self.script, count, families)

    def describe(self, questions: int | None = None) -> dict:
        """Plain data for JSON: the options, every event with its [start, end] in seconds, and questions."""
        return {
            "seed": int(self.seed),
            "level": self.level,
            "split": self.split,
            "seconds": self.seconds,
            "cuts": list(self.cuts),
            "events": [_plain(event) for event in self.events],
            "questions": [dataclasses.asdict(question) for question in self.questions(questions)],
        }


def _plain(event: Event) -> dict:
    """An event with its [start, end] as one entry and without what it does not have."""
    plain = {name: value for name, value in dataclasses.asdict(event).items() if value is not None}
    return {**plain, "span": [plain.pop("start"), plain.pop("end")]}


def _check_world(world: World) -> None:
    def whole(value, low, high):
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= value <= high

    seconds = world.seconds
    if not whole(world.seed, 0, 2**63 - 1):
        raise OptionError(f"seed is {world.seed!r}, expected a whole number from 0 to 2**63 - 1.")
    for name, value, known in (("level", world.level, LEVELS), ("split", world.split, SPLITS)):
        if value not in known:
            raise OptionError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
    if not (isinstance(seconds, numbers.Real) and SHORTEST_STAY <= seconds <= LONGEST):
        raise OptionError(f"seconds is {seconds!r}, expected a number from {SHORTEST_STAY:g} to {LONGEST:g}.")
    most = TURNS if seconds >= 2 * SHORTEST_STAY else 0
    if world.changes is not None and not whole(world.changes, 0, most):
        raise OptionError(f"changes is {world.changes!r}, expected 0 to {most} in a world of {seconds:g} seconds.")
    if isinstance(world.visits, Sequence) and not isinstance(world.visits, str):
        for visit in world.visits:
            pair = isinstance(visit, Sequence) and [isinstance(time, numbers.Real) for time in visit] == [True, True]
            start, end = visit if pair else (0.0, 0.0)
            if not (0 <= start <= end - SHORTEST_STAY + 1e-9 and end <= seconds):
                raise OptionError(
                    f"a visit is {visit!r}, expected (start, end) in seconds, at least {SHORTEST_STAY:g} apart and"
                    f" between 0 and {seconds:g}."
                )
    elif world.visits is not None and not whole(world.visits, 0, room(seconds)):
        raise OptionError(
            f"visits is {world.visits!r}, expected 0 to {room(seconds)} in a world of {seconds:g} seconds, or their"
            " (start, end) times."
        )


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    fits = len(size) == 2 and all(isinstance(length, numbers.Integral) for length in size)
    if not fits or min(size) < SMALLEST or max(size) > WIDEST * min(size):
        raise OptionError(
            f"size is {tuple(size)}, expected (height, width) in pixels, each at least {SMALLEST}, one at most"
            f" {WIDEST} times the other."
        )
    return int(size[0]), int(size[1])
