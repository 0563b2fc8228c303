"""A trace made by hand: two layers, and two chunks of three and two temporal patches of 2 x 3 tokens."""

import numpy as np
import pytest

from longvid_jax.memory.state import Chunk
from longvid_jax.systems.results import Trace

# What stays of each chunk's 18 and 12 tokens, layer by layer; -1 is the padding of a row with fewer.
KEPT = (([0, 1, 2, 3, 4, 5, 12], [5, 6, 7]), ([0, 6, 7, 12, 13, 14, 17], [0, 1, 11]))


def make_trace(*, dpselect: bool = True) -> Trace:
    text = 4  # tokens before the video
    source = tuple(np.array([[-1] * text + first + second + [-1] * 10], np.int32)[..., None] for first, second in KEPT)

    def chunk(offset, patches, kept, times, peaks, change):
        line = (np.array([x], np.float32) for x in (times, peaks, change))
        times, peaks, change = line
        dpselect_line = (peaks, change) if dpselect else (None, None)
        return Chunk(np.array(offset), np.array([patches]), np.array([kept]), times, *dpselect_line)

    return Trace(
        frames=np.array([10]),
        tokens=np.array([30]),
        grid=(2, 3),
        cache_length=np.array([20]),
        cache_bytes=2000,
        cache_bytes_uncompressed=4000,
        cache_capacity=64,
        chunks=(
            chunk(4, 3, 7, [0, 1, 2], [1, 0, 0.5], [1, 0.25, 0.75]),
            chunk(11, 2, 3, [3, 4, 0], [0, 1, 0], [0.125, 0.5, 0]),  # the last of its three entries is padding
        ),
        source=source,
    )


@pytest.fixture
def trace() -> Trace:
    return make_trace()


@pytest.fixture
def plain_trace() -> Trace:
    """Without DPSelect."""
    return make_trace(dpselect=False)
