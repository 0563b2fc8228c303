"""What happens in made-up worlds as vectors, in place of their frames: to learn answering before seeing.

A fact tells one event: of which kind, colour and shape it is, what colour comes of it, when it begins and ends.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from longvid_jax.data.batches import Batch, Example, Shards, bucket, tokenized
from longvid_jax.data.packing import pack, packed_length, sizes
from longvid_jax.data.world import WorldSource
from longvid_jax.video.synthetic import COLOURS, SHAPES, Event, World

KINDS = ("visit", "change")
PERIODS = 2.0 * 2.0 ** (0.5 * np.arange(24))  # seconds: of the waves that tell a time
NAMED = len(KINDS) + 2 * len(COLOURS) + len(SHAPES)
FACT_WIDTH = NAMED + 4 * len(PERIODS)  # features of a fact
IGNORED = 0.15  # of a question's words are hidden, as BERT's were (arXiv 1810.04805)


def features(event: Event, offset: float = 0.0, stride: float = 1.0) -> np.ndarray:
    """float32 [FACT_WIDTH] of an event, as if the video had come `stride` times as slow and `offset` seconds later."""
    colours, named = list(COLOURS), np.zeros(NAMED, np.float32)
    named[KINDS.index(event.kind)] = 1
    named[len(KINDS) + colours.index(event.colour)] = 1
    named[len(KINDS) + len(COLOURS) + SHAPES.index(event.shape)] = 1
    if event.becomes is not None:
        named[len(KINDS) + len(COLOURS) + len(SHAPES) + colours.index(event.becomes)] = 1
    ends = (event.start, event.end) if event.kind == "visit" else (event.at, event.at)
    angles = 2 * np.pi * (offset + stride * np.array(ends))[:, None] / PERIODS
    return np.concatenate([named, np.sin(angles).ravel(), np.cos(angles).ravel()]).astype(np.float32)


def told(world: World, slots: int, seed: Sequence[int], offset: float, stride: float) -> np.ndarray:
    """float32 [slots, FACT_WIDTH]: a world's events in some of the slots, zeros in the others.

    Half of the worlds have them in the order in which they happen, the others in any. Of more events than slots the
    last are left out.
    """
    rng = np.random.default_rng([*seed, 2])
    facts = np.zeros((slots, FACT_WIDTH), np.float32)
    events = world.events[:slots]
    places = rng.choice(slots, len(events), replace=False)
    if rng.random() < 0.5:
        places.sort()
    for place, event in zip(places, events, strict=True):
        facts[place] = features(event, offset, stride)
    return facts


@dataclasses.dataclass(frozen=True)
class FactSource(WorldSource):
    """As WorldSource, with facts float32 [slots, FACT_WIDTH] for frames."""

    slots: int = 32

    def __getitem__(self, i: int) -> Example:
        example = super().__getitem__(i)
        second = self.temporal / self.fps
        read = partial(told, self.world(i), self.slots, (i,), example.offset * second, example.stride)
        return dataclasses.replace(example, frames=read, num_frames=self.slots)


class FactBatches(Shards):
    """As data.batches.Batches, of FactSource: facts float32 [B, Q, FACT_WIDTH] stand before the conversations.

    words: a tokenizer of BERT's kind; then a batch has besides `words` int32 [B, asked, S], the first `asked` questions
    of each row (-1: padding) and `hidden` bool [B, asked, S], which of their tokens are to be guessed.
    """

    def __init__(
        self,
        examples,
        tokenizer,
        video_token: int,
        text: Sequence[int],
        batch_size: int,
        *,
        words=None,
        asked: int = 4,
        length: int = 32,
        process: int = 0,
        processes: int = 1,
    ):
        super().__init__(examples, batch_size, process, processes)
        self.tokenizer, self.video_token, self.text = tokenizer, video_token, text
        self.words, self.asked, self.length = words, asked, length

    def __getitem__(self, b: int) -> Batch:
        examples = self.of(b)
        turns = [tokenized(example, self.tokenizer, self.video_token) for example in examples]
        slots = examples[0].num_frames
        longest = max((packed_length(one, slots), example.id) for one, example in zip(turns, examples, strict=True))
        length = bucket(self.text, *longest, "tokens")
        rows = [pack(turns[row], (slots, 1, 1), length, video_token=self.video_token) for row in self.mine]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        arrays["positions"] = arrays["positions"][..., :1]
        arrays["facts"] = np.stack([examples[row].frames() for row in self.mine])
        arrays["packed"] = sizes(turns, slots, length)
        if self.words is not None:
            words = self._words(examples, np.random.default_rng([b, 0, 3]))
            arrays |= {name: array[self.mine.start : self.mine.stop] for name, array in words.items()}
        return Batch(b, arrays, tuple(examples), {})

    def _words(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids = np.full((len(examples), self.asked, self.length), -1, np.int32)
        for row, example in zip(ids, examples, strict=True):
            questions = [turns[0][0] for turns in example.conversations[: self.asked]]
            for line, encoded in zip(row, self.words(questions)["input_ids"] if questions else (), strict=False):
                line[: len(encoded)] = encoded[: self.length]
        special = np.isin(ids, self.words.all_special_ids) | (ids < 0)
        return {"words": ids, "hidden": (rng.random(ids.shape) < IGNORED) & ~special}
