"""A trace of some steps, for TensorBoard or Perfetto."""

from pathlib import Path

import jax

from longvid_jax.errors import OptionError


def span(steps: str) -> range:
    """The steps of "10:15": 10 to 14, the first step of a run being 0; none of ""."""
    first, _, last = steps.partition(":")
    if not steps:
        return range(0)
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise OptionError(f"config.profile_steps is {steps!r}, but must be two step numbers such as 10:15, or empty.")
    return range(int(first), int(last))


class Profile:
    """Writes a trace of the span of steps into the folder."""

    def __init__(self, steps: str, folder: Path):
        self._span, self._folder, self._on = span(steps), folder, False

    def at(self, step: int, state) -> None:
        """Before each step: starts or stops, when the steps before are done."""
        if (step in self._span) == self._on:
            return
        jax.block_until_ready(state.step)
        jax.profiler.stop_trace() if self._on else jax.profiler.start_trace(str(self._folder))
        self._on = not self._on

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._on:
            jax.profiler.stop_trace()
