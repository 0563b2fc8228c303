"""What a run tells of itself: a line of metrics.jsonl and TensorBoard's scalars for every few steps."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter

from longvid_jax.data.batches import Batch
from longvid_jax.train.workdir import keep_lines

FILE = "metrics.jsonl"
KNOWN = ("loss", "weight", "right", "tokens")  # sums that are told in their own way; others are divided by the weight


class Meter:
    """Adds up steps, and the time that they take, until they are asked for. waited: seconds that batches came late."""

    def __init__(self, peak: float | None):
        self._peak = peak
        self._clear()

    def _clear(self) -> None:
        self._start, self._paused, self.waited = time.perf_counter(), 0.0, 0.0
        self._steps, self._sums, self._last, self._counts = 0, {}, {}, dict.fromkeys(("examples", "frames", "flops"), 0)

    def add(self, values: Mapping[str, float], batch: Batch, flops: float) -> None:
        """A step that is done: what make_train_step gave, its batch, and the operations it takes."""
        self._steps += 1
        self._last = values
        sums = {name: value for name, value in values.items() if name not in ("grad_norm", "learning_rate", "finite")}
        sums["loss"] = values["loss"] * values["weight"]
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts["examples"] += len(batch.examples)
        self._counts["frames"] += sum(example.num_frames for example in batch.examples)
        self._counts["flops"] += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not the steps'."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def take(self) -> dict | None:
        """The metrics since the last time; None without a step."""
        if not self._steps:
            return None
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        sums, counts, weight = self._sums, self._counts, max(self._sums["weight"], 1e-9)
        taken = {
            "loss": sums["loss"] / weight,
            **({"accuracy": sums["right"] / weight} if "right" in sums else {}),
            **{name: value / weight for name, value in sums.items() if name not in KNOWN},
            "grad_norm": self._last["grad_norm"],
            "learning_rate": self._last["learning_rate"],
            "steps": self._steps,
            "examples_per_s": counts["examples"] / seconds,
            "frames_per_s": counts["frames"] / seconds,
            "tokens_per_s": sums.get("tokens", 0.0) / seconds,
            "data_wait": min(1.0, self.waited / seconds),
            "memory_bytes": peak_memory(),
        }
        if self._peak:
            taken["mfu"] = counts["flops"] / seconds / self._peak
        self._clear()
        return taken


class Log:
    """Writes metrics into the workdir, after what a run that is taken up again at `step` had written until then."""

    def __init__(self, folder: Path, step: int):
        self._file = self._board = None
        if jax.process_index():
            return
        keep_lines(folder / FILE, lambda entry: entry["step"] <= step)
        self._file = open(folder / FILE, "a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=30)

    def write(self, step: int, values: Mapping) -> None:
        """A line, and a scalar for each number; what is nested has names such as eval/answers/count."""
        if self._file is None:
            return
        values = {name: value for name, value in values.items() if value is not None}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in _flat(values):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _flat(values: Mapping, within: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}/")
        elif np.isscalar(value) and not isinstance(value, str):
            yield within + name, value


def peak_memory() -> int:
    """The most bytes in use so far: of the first local device, or of this process where a device does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
