"""Work done ahead on a thread, so that decoding and computing overlap."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Generator[T, None, None], depth: int = 2) -> Iterator[T]:
    """Iterate `items` on a thread that is at most `depth` items ahead.

    An exception there is raised here. Closing this iterator early (or Ctrl-C while it waits) stops the thread, which
    closes `items`.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def work():
        error = None
        try:
            with contextlib.closing(items):
                for item in items:
                    ready.put((item, False, None))
                    if stop.is_set():
                        return
        except BaseException as e:
            error = e
        ready.put((None, True, error))

    def finish():
        stop.set()
        # A slot for the put that the thread may be waiting in; it sees `stop` before the next one.
        with contextlib.suppress(queue.Empty):
            while True:
                ready.get_nowait()
        thread.join()

    thread = threading.Thread(target=work, name="longvid-decode", daemon=True)
    thread.start()
    # An iterator left half-way at exit would be closed when threads no longer run, and wait for ever.
    atexit.register(finish)
    try:
        while True:
            item, done, error = ready.get()
            if done:
                if error is not None:
                    raise error
                return
            yield item
    finally:
        finish()
        atexit.unregister(finish)
