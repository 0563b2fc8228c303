"""What of a made-up world answers a question, as facts: for a Q-Former to learn to find it before it has to be said."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from longvid_jax.data.batches import Batch, Example
from longvid_jax.data.facts import FACT_WIDTH, features
from longvid_jax.data.instructed import InstructedBatches
from longvid_jax.data.world import WorldSource
from longvid_jax.errors import OptionError
from longvid_jax.video.synthetic import Event, Question, World


def relevant(world: World, question: Question) -> list[Event]:
    """The events that a question is about, in the order in which they begin: those it names, and those of its span."""

    def is_meant(event: Event) -> bool:
        if question.family == "state":
            return event.kind == "change" and event.shape in question.text
        return str(event.thing) in question.text or (event.start, event.end) == question.span

    return [event for event in world.events if is_meant(event)]


def told(
    world: World, questions: Sequence[Question], slots: int, offset: float, stride: float
) -> dict[str, np.ndarray]:
    """What answers each question: facts float32 [A, slots, FACT_WIDTH], the n-th event in slot n, zeros behind."""
    facts = np.zeros((len(questions), slots, FACT_WIDTH), np.float32)
    for row, question in zip(facts, questions, strict=True):
        for slot, event in zip(row, relevant(world, question), strict=False):
            slot[:] = features(event, offset, stride)
    return {"facts": facts}


def shows(event: Event, times: np.ndarray) -> np.ndarray:
    """bool [T]: at which times [T] an event is on screen."""
    return (event.start <= times) & (times < event.end)


def noted(
    world: World, questions: Sequence[Question], times: np.ndarray, clip_frames: int, each: int
) -> dict[str, np.ndarray]:
    """What answers each question, noted down as the video is watched clip by clip, in frames of these times [T].

    facts float32 [A, T, each, FACT_WIDTH]: an event is told in the first frame that shows it, as far as its clip does:
    what comes later is not known yet. Of more events than a frame has slots the last are left out. seen bool [A, T]:
    frames that show one.
    """
    facts = np.zeros((len(questions), len(times), each, FACT_WIDTH), np.float32)
    seen = np.zeros(facts.shape[:2], bool)
    for row, question in enumerate(questions):
        used = np.zeros(len(times), int)
        for event in relevant(world, question):
            shown = np.flatnonzero(shows(event, times))
            seen[row, shown] = True
            moment = times[shown] if event.kind == "visit" else times[shown][times[shown] >= event.at]
            if not len(moment):
                continue
            frame = int(np.searchsorted(times, moment[0]))
            clip_ends = times[min(len(times), (frame // clip_frames + 1) * clip_frames) - 1]
            if used[frame] < each:
                known = dataclasses.replace(event, end=min(event.end, max(clip_ends, event.start)))
                facts[row, frame, used[frame]] = features(known)
                used[frame] += 1
    return {"facts": facts, "seen": seen}


@dataclasses.dataclass(frozen=True)
class TellingSource(WorldSource):
    """As WorldSource, of which each example can also tell what answers its questions.

    The n-th event in slot n, see told; or with clip_frames noted down frame by frame, in so many slots each, see noted.
    """

    slots: int = 32
    clip_frames: int = 0

    def __getitem__(self, i: int) -> Example:
        example, world = super().__getitem__(i), self.world(i)
        questions = world.questions(self.questions, self.families)
        if self.clip_frames:
            times = np.arange(example.num_frames) / self.fps
            tell = partial(noted, world, questions, times, self.clip_frames, self.slots)
        else:
            later = example.offset * self.temporal / self.fps
            tell = partial(told, world, questions, self.slots, later, example.stride)
        return dataclasses.replace(example, told=tell)


class TellingBatches(InstructedBatches):
    """As InstructedBatches, of TellingSource: a batch has besides what its examples tell.

    facts float32 [B, A, slots, FACT_WIDTH]; where they are noted down frame by frame, so many slots a frame, one frame
    after the other, and seen bool [B, A, T].
    """

    def __getitem__(self, b: int) -> Batch:
        batch = super().__getitem__(b)
        asked = batch.arrays["tokens"].shape[1]
        mine = [batch.examples[row] for row in self.mine]
        if any(example.told is None for example in mine):
            raise OptionError("the source does not know what answers its questions; give one of kind 'telling'.")
        each, frames = [example.told() for example in mine], batch.arrays["frames"].shape[1]
        each = [_by_frame(one, frames) if "seen" in one else one for one in each]
        rows = {
            name: np.stack([np.pad(one[name], [(0, asked - len(one[name]))] + [(0, 0)] * (x.ndim - 1)) for one in each])
            for name, x in each[0].items()
        }
        return dataclasses.replace(batch, arrays={**batch.arrays, **rows})


def _by_frame(told: dict[str, np.ndarray], frames: int) -> dict[str, np.ndarray]:
    """What `noted` gives, filled up to so many frames, and the facts' slots one behind the other."""
    told = {name: np.pad(x, [(0, 0), (0, frames - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) for name, x in told.items()}
    count, _, slots, width = told["facts"].shape
    return told | {"facts": told["facts"].reshape(count, frames * slots, width)}
