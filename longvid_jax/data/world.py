"""The made-up world as a source of examples, rendered as they are asked for."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from longvid_jax.data.batches import Example
from longvid_jax.errors import OptionError
from longvid_jax.video.synthetic import World, multiple_choice, retimed

TRIES = 32  # worlds that are looked at for a question; of some lengths there is none of a family


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """Worlds 0, 1, ..., count - 1 of a split, each with several questions; others for those that have none.

    seconds: lengths of the videos, world i has seconds[i % len]. fps: frames that are sampled a second. size: (H, W).
    letters: the share of questions that are asked as multiple choice.
    offset, stride, plain: but for a share `plain` of them, videos stand later and wider apart than they are: the n-th
        temporal patch of `temporal` frames at offset + n * stride, drawn from 0 to `offset` and from 1 to `stride`, as
        if that much had been left out before it and in between. Answers in seconds are told accordingly. So positions
        of videos far longer than the trained ones are seen in training.
    """

    count: int
    level: str = "clear"
    split: str = "train"
    seconds: Sequence[float] = (16.0,)
    fps: float = 2.0
    size: tuple[int, int] = (56, 56)
    questions: int = 8
    families: Sequence[str] | None = None
    letters: float = 0.0
    offset: int = 0
    stride: int = 1
    plain: float = 0.5
    temporal: int = 2

    def __len__(self) -> int:
        return self.count

    def world(self, i: int) -> World:
        """The world of example i: number i, or if nothing can be asked about it i + count, i + 2 * count, ...

        Raises OptionError where none of many has a question.
        """
        seconds = self.seconds[i % len(self.seconds)]
        for number in range(i, i + TRIES * self.count, self.count):
            world = World(number, level=self.level, seconds=seconds, split=self.split)
            if world.questions(1, self.families):
                return world
        raise OptionError(
            f"worlds of {seconds:g} seconds have no questions of {', '.join(self.families or ('any family',))}; make "
            "them longer."
        )

    def __getitem__(self, i: int) -> Example:
        world = self.world(i)
        rng = np.random.default_rng([i, 1])
        offset, stride = (
            (0, 1) if rng.random() < self.plain else rng.integers((0, 1), (self.offset + 1, self.stride + 1))
        )
        second = self.temporal / self.fps  # of a temporal patch
        questions = [
            retimed(question, offset * second, stride) for question in world.questions(self.questions, self.families)
        ]
        asked = [
            multiple_choice(q, rng) if rng.random() < self.letters and q.choices else (q.text, q.answer)
            for q in questions
        ]
        times = np.arange(max(1, int(world.seconds * self.fps))) / self.fps
        return Example(
            id=f"{self.level}/{self.split}/{world.seed}",
            conversations=tuple((turn,) for turn in asked),
            num_frames=len(times),
            size=self.size,
            frames=partial(world.render, times, self.size),
            tags=tuple(q.family for q in questions),
            offset=offset,
            stride=stride,
        )
