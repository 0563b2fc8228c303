"""Asking a model about worlds that it was never trained on: which worlds, which questions, and what it answers."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from functools import cached_property

import jax
import numpy as np

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import adacm2_watch, rewind_watch
from longvid_jax.memory.state import rows as taken
from longvid_jax.systems.adacm2 import AdaCM2, AdaCM2Model
from longvid_jax.systems.base import Memory, VideoModel
from longvid_jax.systems.prompted import PromptedModel
from longvid_jax.systems.retake import PLAIN, ReTaKe
from longvid_jax.systems.rewind import ReWind, RewindModel
from longvid_jax.video import Frames
from longvid_jax.video.synthetic import Question, World, multiple_choice

APART = 1_000_000  # between the first worlds of two seeds
WATCHED, ANSWERED = 32, 32  # rows at a time, at most
TOGETHER = 64  # questions that videos are watched with at a time, at most, where these are part of the memory
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
        self.seconds, self.events = world.seconds, world.events
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
    model: VideoModel,
    worlds: Sequence[World],
    asked: Sequence[Asked],
    times: Callable[[World], np.ndarray],
    size: tuple[int, int],
    *,
    progress: Callable[[int], None] = lambda count: None,
    watched: Callable[[Memory, int], None] = lambda memory, count: None,
) -> list[str]:
    """What the model answers, greedily, to each question after watching its world's frames at `times`.

    Worlds are rendered as they are watched, several side by side; each is watched once for all its questions, or once
    a question where these guide what ReTaKe keeps, or one after the other by ReWind. progress(count) is told of
    questions that have been answered, watched(memory, count) of each memory of ReTaKe's, whose first `count` rows are
    different ones.
    """
    check_size(model, size)
    if isinstance(model, RewindModel):
        how = {"max_new_tokens": MAX_NEW_TOKENS, "progress": progress}
        return rewind_watch.answers(model, worlds, asked, times, size, **how)
    if isinstance(model, AdaCM2Model) and model.asks_once:
        return _together(model, worlds, asked, times, size, progress)
    guided = model.asks_once or isinstance(model, AdaCM2Model)
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
            groups = [(list(batch), None)]
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


def glimpse(model: VideoModel) -> VideoModel:
    """The same model for a single frame, without compression."""
    return with_method(model, None if isinstance(model, PromptedModel) else GLANCE)


def middle(world: World) -> np.ndarray:
    """The time of the frame in the middle."""
    return np.array([world.seconds / 2])


def with_method(model: VideoModel, method: ReTaKe | AdaCM2 | ReWind | None) -> VideoModel:
    """The same weights with other run-time choices; yarn_factor is fixed where a model is loaded."""
    words = {"words": model.words} if isinstance(model, PromptedModel) else {}
    return type(model)(model.model, model.settings, method=method, tokenizer=model.tokenizer, **words)


def check_size(model: VideoModel, size: tuple[int, int]) -> None:
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


def _said(model: VideoModel, memory, questions: list[str], row: Sequence[int] | None) -> list[str]:
    """Answers to questions on rows of a memory (None: all of them), which stays."""
    memory = memory if row is None else taken(memory, row)
    text = model.answer(memory, questions, max_new_tokens=MAX_NEW_TOKENS).text
    return [text] if isinstance(text, str) else text


def _together(model: AdaCM2Model, worlds, asked: Sequence[Asked], times, size, progress) -> list[str]:
    """The same for AdaCM2: each world is watched once, side by side for all its questions."""
    prompts = model.begin([one.text for one in asked])
    told: list[str] = [""] * len(asked)
    patch = model.model.config.vision.patch
    model.warn_of_positions([side // patch for side in size], 0, max(len(times(worlds[one.video])) for one in asked))
    for group in _groups(worlds, asked, times):
        features = [adacm2_watch.encode(model, worlds[asked[here[0]].video].render(when, size)) for here, when in group]
        here = np.array([questions for questions, _ in group]).ravel()
        seen = adacm2_watch.outputs(
            model.model,
            np.stack(features),
            prompts.instruction[here],
            policy=model.policy,
            carry_queries=model.carry_queries,
            random=jax.random.key(model.method.seed) if model.policy.scores == "random" else None,
        )
        seen, first = np.asarray(seen), np.unique(here, return_index=True)[1]
        first = sorted(first.tolist(), key=lambda row: len(asked[here[row]].answer))  # as above
        for row in _batches(first, min(ANSWERED, len(asked))):
            mine = here[row]
            texts = adacm2_watch.answers(model, seen[row], prompts.ids[mine], prompts.places[mine], MAX_NEW_TOKENS)
            for i, text in zip(mine, texts, strict=True):
                told[i] = text
            progress(len(set(row)))
    return told


def _groups(worlds, asked: Sequence[Asked], times) -> list[list[tuple[list[int], np.ndarray]]]:
    """Batches of worlds of one length, of each all questions, whose number is the same, and the times of its frames.

    A world with fewer questions repeats its last, and a batch with fewer worlds its last: so few programs serve all.
    """
    of_video: dict[int, list[int]] = {}
    for i, one in enumerate(asked):
        of_video.setdefault(one.video, []).append(i)
    most = max(map(len, of_video.values()))
    of_length: dict[int, list[tuple[list[int], np.ndarray]]] = {}
    for video, here in of_video.items():
        when = times(worlds[video])
        of_length.setdefault(len(when), []).append((here + here[-1:] * (most - len(here)), when))
    return [batch for rows in of_length.values() for batch in _batches(rows, min(len(rows), max(1, TOGETHER // most)))]


def _batches(items: Sequence, size: int) -> list[list]:
    """Batches of one size, so that one program serves all: the last is filled up with its last item."""
    batches = [list(items[start : start + size]) for start in range(0, len(items), size)]
    return [batch + batch[-1:] * (size - len(batch)) for batch in batches]
