"""The account of a watched video, from a trace made by hand; the command line's tests have the real ones."""

import json

import numpy as np

from longvid_jax.evaluate.ask import describe_trace, kept_share


def test_share_kept_of_each_temporal_patch(trace):
    expected = np.array([[6, 0, 1, 1, 2], [1, 2, 4, 2, 1]]) / 6
    np.testing.assert_array_equal(kept_share(trace), expected)
    assert kept_share(trace).sum() * 6 == 2 * (7 + 3)


def test_trace_as_plain_data(trace):
    described = json.loads(json.dumps(describe_trace(trace), allow_nan=False))
    assert described == {
        "frames": 10,
        "tokens": 30,
        "tokens_kept": 10,
        "grid": [2, 3],
        "cache_length": 20,
        "cache_bytes": 2000,
        "cache_bytes_uncompressed": 4000,
        "cache_capacity": 64,
        "kept_count": [[7, 3], [7, 3]],
        "times": [0, 1, 2, 3, 4],
        "patches": [
            {"time": 0, "share": 1, "change": 1},
            {"time": 1, "share": 0, "change": 0.25},
            {"time": 2, "share": 0.5, "change": 0.75},
            {"time": 3, "share": 0, "change": 0.125},
            {"time": 4, "share": 1, "change": 0.5},
        ],
        "keyframes": [
            {"time": 0, "share": 1, "change": 1},
            {"time": 2, "share": 0.5, "change": 0.75},
            {"time": 4, "share": 1, "change": 0.5},
        ],
    }


def test_without_dpselect_there_are_no_patches(plain_trace):
    described = describe_trace(plain_trace)
    assert described["patches"] is None and described["keyframes"] is None
    assert described["times"] == [0, 1, 2, 3, 4]
