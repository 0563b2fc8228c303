"""Batches on their way to the device, one step ahead."""

import dataclasses
import queue
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longvid_jax.data.batches import Batch, batches_from
from longvid_jax.errors import OptionError
from longvid_jax.ops.sharding import BATCH


def on_device(arrays: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
    """This process's rows on its devices, as part of the batch of all processes."""
    if mesh is None:
        return jax.device_put(dict(arrays))
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    rows = len(jax.tree.leaves(arrays)[0]) * jax.process_count()
    if rows % ways:
        raise OptionError(
            f"a batch of {rows} cannot be spread over {ways} devices (data x fsdp of the mesh); change batch_size."
        )
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), dict(arrays))


class Feed:
    """Batches start, start + 1, ... with their arrays on the device, made and moved there by threads of its own."""

    def __init__(self, batches, start: int, *, mesh: Mesh | None, workers: int, ahead: int):
        self._ready: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        arguments = (batches, start, mesh, workers, ahead)
        self._thread = threading.Thread(target=self._fill, args=arguments, name="feed", daemon=True)
        self._thread.start()

    def next(self, busy) -> tuple[Batch, float]:
        """The next batch, and for how many seconds there was none and nothing for the device to do.

        If it is not there yet, waiting counts from when the arrays `busy` have been computed.
        """
        if self._ready.empty():
            jax.block_until_ready(busy)
        start = time.perf_counter()
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch, time.perf_counter() - start

    def close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                pass

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _fill(self, batches, start: int, mesh, workers: int, ahead: int) -> None:
        try:
            for batch in batches_from(batches, start, workers=workers, ahead=ahead):
                if self._closed.is_set():
                    return
                self._ready.put(dataclasses.replace(batch, arrays=on_device(batch.arrays, mesh)))
        except BaseException as error:  # it is raised where the batch would have been
            self._ready.put(error)
