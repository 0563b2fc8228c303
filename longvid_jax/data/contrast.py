"""Videos beside their captions, for models that learn which belong together.

Letters: B videos of a batch, T frames, S tokens of the longest caption.
"""

from collections.abc import Sequence

import grain
import numpy as np

from longvid_jax.data.batches import Batch, Shards, bucket
from longvid_jax.data.instructed import STEP, blank, shown
from longvid_jax.errors import DataError, VideoError


class ContrastBatches(Shards):
    """A grain source of batches without an end. The first answer about a video is its caption.

    A batch has frames uint8 [B, T, H, W, 3] and shown bool [B, T]; captions int32 [B, S], in the tokens of `words`
    (-1: padding; what is longer than `reads` loses its end). frames: buckets of T, ascending.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        words,
        batch_size: int,
        *,
        frames: Sequence[int],
        reads: int,
        process: int = 0,
        processes: int = 1,
    ):
        super().__init__(examples, batch_size, process, processes)
        self.words, self.frames, self.reads = words, frames, reads

    def __getitem__(self, b: int) -> Batch:
        examples = self.of(b)
        frames = bucket(self.frames, *max((e.num_frames, e.id) for e in examples), "frames")
        if silent := [example.id for example in examples if not example.conversations]:
            raise DataError(f"{silent[0]} has no caption; give examples that have one.")
        told = [self.words(example.conversations[0][0][1])["input_ids"] for example in examples]
        length = min(self.reads, -(-max(map(len, told)) // STEP) * STEP)
        rows, undecodable = [], {}
        for row in self.mine:
            captions = np.full(length, -1, np.int32)
            captions[: len(told[row])] = told[row][:length]
            try:
                arrays = shown(examples[row], frames)
            except VideoError as error:
                undecodable[examples[row].id] = str(error)
                arrays = blank(examples[row], frames)
            rows.append({"frames": arrays["frames"], "shown": arrays["shown"], "captions": captions})
        return Batch(b, {name: np.stack([row[name] for row in rows]) for name in rows[0]}, tuple(examples), undecodable)
