"""Asking a model about worlds that it was never trained on: which worlds, which questions, and what it answers."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from longvid_jax.errors import OptionError
from longvid_jax.memory.state import RetakeMemory, rows
from longvid_jax.systems.base import VideoModel
from longvid_jax.systems.retake import PLAIN, ReTaKe, RetakeModel
from longvid_jax.video import Frames
from longvid_jax.video.synthetic import Question, World, multiple_choice

APART = 1_000_000  # between the first worlds of two seeds
WATCHED, ANSWERED = 32, 32  # rows at a time, at most
ALIKE = 8
MAX_NEW_TOKENS = 96  # more than the longest caption has
FRUITLESS = 100  # worlds without a question, one after the other
GLANCE = dataclasses.replace(PLAIN, chunk_frames=2)  # the plain model for a single temporal patch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Which worlds are watched and how.

    seed: its worlds begin at seed * 1,000,000. examples: questions in all. seconds, level, split: of the worlds.
    fps: sampled frames a second. size: (height, width) of the frames in pixels. questions: of a world, at most.
    families: None is all. letters: questions are asked as multiple choice.
    """

    seed: int = 0
    examples: int = 400
    level: str = "clear"
    seconds: float = 16.0
    split: str = "test"
    fps: float = 2.0
    size: tuple[int, int] = (56, 56)
    questions: int = 8
    families: tuple[str, ...] | None = None
    letters: bool = False

    def __post_init__(self):
        for name, least in (("seed", 0), ("examples", 1), ("questions", 1)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < least:
                raise OptionError(f"{name} is {value!r}, but must be a whole number of at least {least}.")
        if not (isinstance(self.fps, numbers.Real) and 0 < self.fps <= 1000):
            raise OptionError(f"fps is {self.fps!r}, but must be above 0 and at most 1000.")

    def world(self, i: int) -> World:
        return World(self.seed * APART + i, level=self.level, seconds=self.seconds, split=self.split)

    def times(self, world: World) -> np.ndarray:
        """float64 [T] seconds of the sampled frames."""
        return np.arange(max(1, int(world.seconds * self.fps))) / self.fps


class Rendered:
    """A world whose frames at the times of a setup are rendered once, however often it is watched."""

    def __init__(self, world: World, setup: Setup):
        self.seconds = world.seconds
        self._world, self._times, self._size = world, setup.times(world), setup.size

    @cached_property
    def _frames(self) -> np.ndarray:
        return self._world.render(self._times, self._size)

    def render(self, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """uint8 [T, H, W, 3] at times [T], all of them the setup's and of its size."""
        here = np.searchsorted(self._times, times)
        if size != self._size or not np.array_equal(self._times[np.minimum(here, len(self._times) - 1)], times):
            raise OptionError("only the frames of the setup are rendered; ask the world itself for others.")
        return self._frames[here]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as it is put to a model, and the one right answer."""

    video: int  # which of the worlds it is about
    question: Question
    text: str
    answer: str
    letters: bool = False  # the answer is the letter of a choice


def ask(setup: Setup) -> tuple[list[World], list[Asked]]:
    """The worlds of a setup and exactly its number of questions on them, in order.

    Raises OptionError where worlds of this length give no questions.
    """
    chosen, asked = [], []
    while len(asked) < setup.examples:
        number = len(chosen)
        world = setup.world(number)
        chosen.append(world)
        for n, question in enumerate(world.questions(setup.questions, setup.families)):
            text, answer = question.text, question.answer
            if setup.letters:
                text, answer = multiple_choice(question, np.random.default_rng([setup.seed, number, n]))
            asked.append(Asked(number, question, text, answer, setup.letters))
        if number - (asked[-1].video if asked else 0) > FRUITLESS:
            raise OptionError(f"worlds of {setup.seconds:g} seconds give too few questions; make them longer.")
    return chosen, asked[: setup.examples]


def answers(
    model: RetakeModel,
    worlds: Sequence[World],
    asked: Sequence[Asked],
    times: Callable[[World], np.ndarray],
    size: tuple[int, int],
    *,
    progress: Callable[[int], None] = lambda count: None,
    watched: Callable[[RetakeMemory, int], None] = lambda memory, count: None,
) -> list[str]:
    """What the model answers, greedily, to each question after watching its world's frames at `times`.

    Worlds are rendered as they are watched, several side by side; each is watched once for all its questions, or once
    a question where these guide what is kept. progress(count) is told of questions that have been answered,
    watched(memory, count) of each memory, whose first `count` rows are different ones.
    """
    check_size(model, size)
    guided = model.asks_once
    order = [one.video for one in asked] if guided else sorted({one.video for one in asked})
    told: list[str] = [""] * len(asked)
    even = -(-len(order) // -(-len(order) // WATCHED))  # no more batches than needed, and few rows for nothing
    if even > ALIKE:  # but of few sizes, each of which is compiled
        even = -(-even // ALIKE) * ALIKE
    for batch in _batches(range(len(order)), even):
        videos = [order[i] for i in batch]
        instructions = [asked[i].text for i in batch] if guided else [asked[0].text] * len(videos)
        memory = _watch(model, [worlds[video] for video in videos], instructions, times, size)
        watched(memory, len(set(batch)))
        if guided:
            groups = [(list(batch), range(len(batch)))]
        else:
            here = [i for i, one in enumerate(asked) if one.video in videos]
            # Those with long answers together, so that the others need not wait for them.
            here.sort(key=lambda i: len(asked[i].answer))
            groups = [
                (group, [videos.index(asked[i].video) for i in group])
                for group in _batches(here, min(ANSWERED, len(asked)))
            ]
        for group, row in groups:
            texts = _said(model, memory, [asked[i].text for i in group], row)
            for i, text in zip(group, texts, strict=True):
                told[i] = text.strip()
            progress(len(set(group)))
    return told


def glimpse(model: RetakeModel) -> RetakeModel:
    """The same model for a single frame, without compression."""
    return with_method(model, GLANCE)


def middle(world: World) -> np.ndarray:
    """The time of the frame in the middle."""
    return np.array([world.seconds / 2])


def with_method(model: RetakeModel, method: ReTaKe | None) -> RetakeModel:
    """The same weights with other run-time choices; yarn_factor is fixed where a model is loaded."""
    return type(model)(model.model, model.settings, method=method, tokenizer=model.tokenizer)


def check_size(model: RetakeModel, size: tuple[int, int]) -> None:
    """Raises OptionError for frames that the model cannot cut into patches."""
    vision = model.model.config.vision
    side = vision.patch * vision.merge
    if size[0] % side or size[1] % side:
        raise OptionError(f"size is {size[0]} x {size[1]} pixels, but this model needs multiples of {side}.")


def _watch(model: VideoModel, worlds: list[World], instructions: list[str], times, size: tuple[int, int]):
    """A memory that has read all frames, a row a world."""
    when = [times(world) for world in worlds]
    memory = model.begin(instructions, expected_frames=[len(one) for one in when], frame_size=size)
    for start in range(0, max(map(len, when)), model.window):
        frames = Frames.empty(len(worlds), model.window, size)
        for row, (world, one) in enumerate(zip(worlds, when, strict=True)):
            now = one[start : start + model.window]
            frames.pixels[row, : len(now)] = world.render(now, size)
            frames.times[row, : len(now)] = now
            frames.valid[row, : len(now)] = True
        memory = model.watch(memory, frames)
    return model.finish(memory)


def _said(model: VideoModel, memory, questions: list[str], row: Sequence[int]) -> list[str]:
    """Answers to questions on rows of a memory, which stays."""
    text = model.answer(rows(memory, row), questions, max_new_tokens=MAX_NEW_TOKENS).text
    return [text] if isinstance(text, str) else text


def _batches(items: Sequence, size: int) -> list[list]:
    """Batches of one size, so that one program serves all: the last is filled up with its last item."""
    batches = [list(items[start : start + size]) for start in range(0, len(items), size)]
    return [batch + batch[-1:] * (size - len(batch)) for batch in batches]
