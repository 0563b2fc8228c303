"""How a run is asked to stop."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Within it the first Ctrl-C or SIGTERM is kept in `.signal` for the loop to see; a second one acts at once.

    With several processes there is no handler of ours for SIGTERM: jax's own tells all of them the step to stop at.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            handled = SIGNALS if jax.process_count() == 1 else ()
            self._before = {number: signal.signal(number, self._ask) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step: the same on all processes."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
