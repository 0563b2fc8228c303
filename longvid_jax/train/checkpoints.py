"""Checkpoints of a run: what changes from step to step, the config, and the position in the data, which is the step.

The frozen parameters are not among it: they are made again from the config.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from longvid_jax.checkpoint import Series
from longvid_jax.convert.folder import first_line
from longvid_jax.errors import TrainError
from longvid_jax.train.config import as_json
from longvid_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints in `folder`; say(line) tells the user what was found."""

    def __init__(self, folder: Path, config, say: Callable[[str], None]):
        self.folder, self._config, self._say = folder, as_json(config), say
        self._series = Series(folder, keep_last=config.save.keep_last, keep_best=config.save.keep_best)

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        return max(self._series.scores(), default=None)

    @property
    def best(self) -> tuple[int, float | None]:
        """The step of the checkpoint with the highest score, and it; without scores the last one."""
        scores = self._series.scores()
        scored = {step: score for step, score in scores.items() if score is not None}
        step = max(scored or scores, key=lambda step: (scored.get(step, 0.0), step))
        return step, scored.get(step)

    def save(self, step: int, state: TrainState, score: float | None = None) -> None:
        """Writes the state while the run goes on; a checkpoint of this step that is there already stays."""
        if step != self.latest:
            about = {"config": self._config, "step": step}
            self._series.save(step, _named(state), about, score)

    def resume(self, state: TrainState) -> TrainState:
        """The state of the last checkpoint that can be read; the given one, which is the first, where there is none."""
        steps = sorted(self._series.scores(), reverse=True)
        if unfinished := self._series.unfinished:
            then = f"going on from step {steps[0]}" if steps else "starting anew"
            self._say(f"the checkpoint of step {unfinished[-1]} was never finished and is removed; {then}")
        if not steps:
            return state
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _changing(state))
        for array in jax.tree.leaves(_changing(state)):
            array.delete()  # else there are two states at once
        for n, step in enumerate(steps):
            try:
                state = self._restored(step, wanted, state)
            except Exception as error:  # Orbax has no common base for what a damaged folder makes it raise
                self._say(f"the checkpoint of step {step} cannot be read ({first_line(error)}); trying the one before")
                continue
            for damaged in steps[:n]:
                self._series.delete(damaged)  # its step comes again
            return state
        raise TrainError(f"no checkpoint in {self.folder} can be read; remove the folder to start anew.")

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state of a checkpoint."""
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _changing(state))
        return self._restored(step, wanted, state)

    def _restored(self, step: int, wanted: TrainState, state: TrainState) -> TrainState:
        arrays = self._series.restore(step, _named(wanted))
        leaves = [arrays[name] for name in _named(wanted)]
        changing = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
        return dataclasses.replace(changing, frozen=state.frozen)

    def wait(self) -> None:
        """Until all is written."""
        self._series.wait()

    def close(self) -> None:
        """Waits, and makes an end."""
        self._series.close()


def _changing(state: TrainState) -> TrainState:
    return dataclasses.replace(state, frozen={})


def _named(state: TrainState) -> dict[str, jax.Array]:
    """The leaves of what changes by path, `opt_state/1/0/mu/text/norm/scale`, in the order of jax.tree.leaves."""
    found, _ = jax.tree_util.tree_flatten_with_path(_changing(state))
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): value for keys, value in found}
