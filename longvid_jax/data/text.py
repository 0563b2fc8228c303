"""Conversations without a video, for decoders alone: in LLaVA's layout, and as batches."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from longvid_jax.data.batches import Batch, Example, Shards, bucket, tokenized
from longvid_jax.data.conversations import entries, turns_of
from longvid_jax.data.packing import pack, packed_length
from longvid_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class TextSource:
    """The entries {"id": ..., "conversations": [...]} of a .json or .jsonl file as examples without frames."""

    file: str | Path

    def __post_init__(self):
        examples = [self._example(entry, f"{self.file}: entry {n}") for n, entry in enumerate(entries(Path(self.file)))]
        object.__setattr__(self, "_examples", examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> Example:
        return self._examples[i]

    def _example(self, entry, where: str) -> Example:
        if not isinstance(entry, dict) or "conversations" not in entry:
            raise DataError(f"{where} has no conversations; see data.conversations for the layout.")
        turns = turns_of(entry["conversations"], where)
        return Example(str(entry.get("id", where)), (turns,), 0, (0, 0), None)


class TextBatches(Shards):
    """As data.batches.Batches, without frames: arrays tokens, groups, targets, weights [B, N], positions [B, N, axes].

    text: the buckets of lengths, ascending.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        tokenizer,
        text: Sequence[int],
        batch_size: int,
        *,
        axes: int = 1,
        process: int = 0,
        processes: int = 1,
    ):
        super().__init__(examples, batch_size, process, processes)
        self.tokenizer, self.text, self.axes = tokenizer, text, axes

    def __getitem__(self, b: int) -> Batch:
        examples = self.of(b)
        turns = [tokenized(example, self.tokenizer, None) for example in examples]
        longest = max((packed_length(one, 0), example.id) for one, example in zip(turns, examples, strict=True))
        length = bucket(self.text, *longest, "tokens of text")
        rows = [pack(turns[row], (0, 0, 0), length, video_token=-1) for row in self.mine]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "video_index"}
        arrays["positions"] = arrays["positions"][..., : self.axes]
        return Batch(b, arrays, tuple(examples), {})
