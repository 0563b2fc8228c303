"""What becomes of each step's metrics: they are fetched while the next step runs, checked, added up and written."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from longvid_jax.data.batches import Batch
from longvid_jax.errors import TrainError
from longvid_jax.train.checkpoints import Checkpoints
from longvid_jax.train.metrics import Log, Meter
from longvid_jax.train.skipped import Skipped

SHOWN = 6  # ids of a batch


class Record:
    """Follows the steps of a run. progress(step, metrics) is called for each that is done."""

    def __init__(
        self,
        log: Log,
        meter: Meter,
        skipped: Skipped,
        checkpoints: Checkpoints,
        every: int,
        progress: Callable[[int, dict], None],
    ):
        self._log, self._meter, self._skipped, self._checkpoints = log, meter, skipped, checkpoints
        self._every, self._progress = every, progress
        self._running: tuple[int, Batch, Any, float] | None = None

    def follow(self, step: int, batch: Batch, metrics, flops: float, waited: float) -> None:
        """Step number `step` has been started: it takes so many operations, and its batch came `waited` seconds late.

        Finishes the one before, so that at most two are under way; TrainError if that one was not finite.
        """
        self._finish()
        self._meter.waited += waited
        self._running = step, batch, metrics, flops

    def settle(self) -> None:
        """Finishes the step that runs, and writes the metrics that are not written yet."""
        step = self._finish()
        if step is not None:
            self._write(step)

    def evaluated(self, step: int, result: dict) -> None:
        self._log.write(step, {"eval": result})

    def paused(self) -> AbstractContextManager:
        """What is done within is not counted as time of the steps."""
        return self._meter.paused()

    def _finish(self) -> int | None:
        if self._running is None:
            return None
        (step, batch, metrics, flops), self._running = self._running, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values["finite"]:
            raise self._not_finite(step, batch, values)
        self._meter.add(values, batch, flops)
        self._skipped.add(step, batch)
        self._progress(step, values)
        if step % self._every == 0:
            self._write(step)
        return step

    def _write(self, step: int) -> None:
        if values := self._meter.take():
            self._log.write(step, values)

    def _not_finite(self, step: int, batch: Batch, values: dict) -> TrainError:
        ids = [example.id for example in batch.examples]
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        good = self._checkpoints.latest
        last = "there is no checkpoint yet" if good is None else f"the last good checkpoint is that of step {good}"
        return TrainError(
            f"step {step} has the loss {values['loss']:g} and a gradient of norm {values['grad_norm']:g}, with the "
            f"examples {', '.join(ids[:SHOWN])}{more}; {last} in {self._checkpoints.folder}; lower config.optim.lr or "
            "take those examples out."
        )
