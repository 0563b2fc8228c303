"""Batches on their way to the device."""

import threading
import time

import jax
import numpy as np
import pytest

from longvid_jax.data.batches import Batch
from longvid_jax.errors import OptionError, PromptError
from longvid_jax.scale.mesh import make_mesh
from longvid_jax.train.feed import Feed, on_device


class Numbers:
    """Batches that hold their number; making number `broken` fails, and each takes so many seconds."""

    def __init__(self, broken=None, seconds=0.0):
        self.broken, self.seconds = broken, seconds

    def __len__(self):
        return 20

    def __getitem__(self, b):
        if b == self.broken:
            raise PromptError(f"batch {b} is broken.")
        time.sleep(self.seconds)
        return Batch(b, {"x": np.full((4, 2), b)}, (), {})


def feed(batches, start=0, **how):
    return Feed(batches, start, **{"mesh": None, "workers": 2, "ahead": 3, **how})


def test_in_order_from_any_start():
    with feed(Numbers(), 5) as batches:
        for b in range(5, 20):
            batch, _ = batches.next(())
            assert batch.index == b and int(batch.arrays["x"][0, 0]) == b
            assert isinstance(batch.arrays["x"], jax.Array)


def test_an_error_comes_where_the_batch_would_have():
    with feed(Numbers(broken=3)) as batches:
        for _ in range(3):
            batches.next(())
        with pytest.raises(PromptError, match="batch 3 is broken"):
            batches.next(())


def test_what_was_waited_is_told():
    with feed(Numbers(seconds=0.1), workers=1) as batches:
        waited = sum(batches.next(())[1] for _ in range(5))
    assert waited > 0.2


def test_no_thread_is_left():
    before = threading.active_count()
    for _ in range(3):
        with feed(Numbers()) as batches:
            batches.next(())
    with feed(Numbers(broken=0)):
        pass
    assert threading.active_count() <= before + 8  # Grain's own pool
    assert not [thread for thread in threading.enumerate() if thread.name == "feed"]


def test_spread_over_a_mesh():
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    x = on_device({"x": np.arange(8).reshape(4, 2)}, mesh)["x"]
    assert {shard.data.shape for shard in x.addressable_shards} == {(1, 2)} and len(x.addressable_shards) == 4
    with pytest.raises(OptionError, match="a batch of 6 cannot be spread over 4 devices"):
        on_device({"x": np.zeros((6, 2))}, mesh)
