"""What of a made-up world answers a question, as facts: for a Q-Former to learn to find it before it has to be said."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from longvid_jax.data.batches import Batch, Example
from longvid_jax.data.facts import FACT_WIDTH, features
from longvid_jax.data.instructed import InstructedBatches
from longvid_jax.data.world import WorldSource
from longvid_jax.video.synthetic import Event, Question, World


def relevant(world: World, question: Question) -> list[Event]:
    """The events that a question is about, in the order in which they begin: those it names, and those of its span."""

    def is_meant(event: Event) -> bool:
        if question.family == "state":
            return event.kind == "change" and event.shape in question.text
        return str(event.thing) in question.text or (event.start, event.end) == question.span

    return [event for event in world.events if is_meant(event)]


def told(world: World, questions: Sequence[Question], slots: int, offset: float, stride: float) -> np.ndarray:
    """float32 [A, slots, FACT_WIDTH]: what answers each question, the n-th event in slot n; zeros behind the last."""
    facts = np.zeros((len(questions), slots, FACT_WIDTH), np.float32)
    for row, question in zip(facts, questions, strict=True):
        for slot, event in zip(row, relevant(world, question), strict=False):
            slot[:] = features(event, offset, stride)
    return facts


@dataclasses.dataclass(frozen=True)
class TellingSource(WorldSource):
    """As WorldSource, of which each example can also tell what answers its questions."""

    slots: int = 32

    def __getitem__(self, i: int) -> Example:
        example, world = super().__getitem__(i), self.world(i)
        questions = world.questions(self.questions, self.families)
        later = example.offset * self.temporal / self.fps
        return dataclasses.replace(example, told=partial(told, world, questions, self.slots, later, example.stride))


class TellingBatches(InstructedBatches):
    """As InstructedBatches, of TellingSource: a batch has besides facts float32 [B, A, slots, FACT_WIDTH]."""

    def __getitem__(self, b: int) -> Batch:
        batch = super().__getitem__(b)
        asked = batch.arrays["tokens"].shape[1]
        share = self.batch_size // self.processes
        mine = batch.examples[self.process * share : (self.process + 1) * share]
        facts = [example.told() for example in mine]
        padded = [np.pad(one, ((0, asked - len(one)), (0, 0), (0, 0))) for one in facts]
        return dataclasses.replace(batch, arrays={**batch.arrays, "facts": np.stack(padded)})
