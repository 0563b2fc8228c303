"""A needle in a haystack: one short event at a depth of a video of a length, and whether the model can tell of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import world
from longvid_jax.evaluate.results import Results
from longvid_jax.evaluate.world import APART, Asked, Setup
from longvid_jax.systems.retake import ReTaKe, RetakeModel
from longvid_jax.video.synthetic import COLOURS, SHAPES, World

LENGTHS = (1, 2, 4, 8, 16, 32)  # times the plain model's
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
KEEP_RATIO = 0.25
WAYS = ("plain", "retake", "budget")
KINDS = 3  # of questions on a needle, at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: `needles` worlds of a setup at each depth and length, a question on each."""

    setup: Setup  # of length 1
    needles: int = 32
    lengths: Sequence[int] = LENGTHS
    depths: Sequence[float] = DEPTHS

    def at(self, length: int) -> tuple[Setup, list[World]]:
        """The worlds of a length, those of one depth side by side."""
        setup = dataclasses.replace(self.setup, seconds=self.setup.seconds * length)
        worlds = [
            World.needle(
                setup.seed * APART + n,
                seconds=setup.seconds,
                depth=depth,
                level=setup.level,
                split=setup.split,
            )
            for depth in self.depths
            for n in range(self.needles)
        ]
        return setup, worlds

    def __len__(self) -> int:
        """Questions to answer."""
        return len(WAYS) * len(self.lengths) * len(self.depths) * self.needles


def run(model: RetakeModel, plan: Plan, results: Results, progress: Callable[[str, int], None]) -> dict:
    """Accuracy [depths][lengths] of the plain model, of ReTaKe, and of ReTaKe with the cache of the shortest video."""
    methods = {"plain": None, "retake": ReTaKe(keep_ratio=KEEP_RATIO), "budget": ReTaKe(budget=_budget(model, plan))}
    accuracy = {way: np.zeros((len(plan.depths), len(plan.lengths))) for way in methods}
    for column, length in enumerate(plan.lengths):
        setup, worlds = plan.at(length)
        asked = questions(worlds)
        for way, method in methods.items():
            key = {
                "benchmark": "needles",
                "way": way,
                "length": length,
                "depths": list(plan.depths),
                "needles": plan.needles,
            }
            have = results.get(key)
            if have is None:
                told = world.answers(
                    world.with_method(model, method),
                    worlds,
                    asked,
                    setup.times,
                    setup.size,
                    progress=lambda count, what=f"needles {length}x {way}": progress(what, count),
                )
                have = results.put(key, {"told": told})
            else:
                progress("needles", len(asked))
            right = np.array([text == one.answer for one, text in zip(asked, have["told"], strict=True)])
            accuracy[way][:, column] = right.reshape(len(plan.depths), plan.needles).mean(1)
    return {
        "seconds": [plan.setup.seconds * length for length in plan.lengths],
        "depths": list(plan.depths),
        "needles": plan.needles,
        "keep_ratio": KEEP_RATIO,
        "budget": methods["budget"].budget,
        "chance": float(np.mean([1 / len(one.question.choices) for one in asked])),
        "accuracy": {way: values.tolist() for way, values in accuracy.items()},
    }


def questions(worlds: Sequence[World]) -> list[Asked]:
    """A question on each: which colour or which shape the needle has. What it is altogether can be asked only where
    nothing else happens, and so is no question of any other world."""
    asked = []
    for n, one in enumerate(worlds):
        question = next((q for q in one.questions(KINDS, ("needle",)) if q.answer in (*COLOURS, *SHAPES)), None)
        if question is None:
            raise OptionError(f"worlds of {one.seconds:g} seconds give too few questions; make them longer.")
        asked.append(Asked(n, question, question.text, question.answer))
    return asked


def _budget(model: RetakeModel, plan: Plan) -> int:
    """Tokens that the plain model has in its cache for a video of the shortest length: text and video."""
    setup, worlds = plan.at(min(plan.lengths))
    asked = questions(worlds[:1])
    memory = model.begin(asked[0].text)
    text = int(memory.start[0]) + int((memory.prompt[0] >= 0).sum())
    vision = model.model.config.vision
    side = vision.patch * vision.merge
    patches = -(-len(setup.times(worlds[0])) // vision.temporal)
    return text + patches * (setup.size[0] // side) * (setup.size[1] // side)
