"""The examples whose video cannot be decoded: counted, listed, and not to be too many."""

import json
from pathlib import Path

import jax

from longvid_jax.data.batches import Batch
from longvid_jax.errors import TrainError
from longvid_jax.train.workdir import keep_lines

FEWEST = 100  # examples before the share is judged by less: one of the first four is no quarter of all


class Skipped:
    """A line of skipped.jsonl for each (of another process than the first: skipped-1.jsonl, ...)."""

    def __init__(self, folder: Path, seen: int, step: int, most: float):
        """seen: examples until `step`, of all processes. most: the share of examples so far that may be skipped."""
        process = jax.process_index()
        self.file = folder / (f"skipped-{process}.jsonl" if process else "skipped.jsonl")
        self._seen, self._most = seen // jax.process_count(), most
        self.count = len(keep_lines(self.file, lambda entry: entry["step"] <= step))

    def add(self, step: int, batch: Batch) -> None:
        """Lists those of a batch; TrainError if there are too many now."""
        self._seen += len(batch.examples) // jax.process_count()
        if not batch.undecodable:
            return
        self.count += len(batch.undecodable)
        with open(self.file, "a", encoding="utf-8") as stream:
            for id, why in batch.undecodable.items():
                stream.write(json.dumps({"step": step, "id": id, "why": why}) + "\n")
        if self.count > self._most * max(self._seen, FEWEST):
            raise TrainError(
                f"{self.count} of {self._seen} examples so far have a video that cannot be decoded, the last one "
                f"{id} ({why.rstrip('.')}), which is more than the share {self._most:g} of config.max_undecodable; "
                f"mend those that {self.file} lists, or raise it."
            )
