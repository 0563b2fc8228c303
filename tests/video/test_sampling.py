"""Sampling rules against the indices that published tools take (1394 frames at 10 a second, 8 wanted)."""

import numpy as np
import pytest

from longvid_jax.errors import OptionError
from longvid_jax.video.sampling import SAMPLERS, sample

TIMES = np.arange(1394) / 10


def take(sampler, times=TIMES, **options):
    return sample(times, len(times) * times[1], sampler=sampler, **options).tolist()


@pytest.mark.parametrize(
    ("sampler", "indices"),
    [
        ("linspace", [0, 199, 398, 597, 796, 995, 1194, 1393]),
        ("qwen", [0, 199, 398, 597, 796, 995, 1194, 1393]),
        ("retake", [0, 199, 398, 597, 796, 995, 1194, 1393]),
        ("vlmevalkit", [154, 309, 464, 619, 774, 929, 1084, 1239]),
        ("lvb", [0, 174, 348, 522, 696, 870, 1044, 1218]),
        ("mid", [87, 261, 435, 609, 783, 958, 1132, 1306]),
        ("moviechat", [0, 174, 348, 522, 697, 871, 1045, 1219]),
    ],
)
def test_published_indices(sampler, indices):
    assert take(sampler, max_frames=8) == indices


def test_linspace_truncates_and_qwen_rounds():
    assert take("linspace", max_frames=4) == [0, 464, 928, 1393]
    assert take("qwen", max_frames=4) == [0, 464, 929, 1393]


def test_retake_at_4_fps():
    indices = take("retake", fps=4)
    assert len(indices) == 556  # 139.4 s * 4 = 557.6, made even
    assert indices == np.linspace(0, 1393, 556).astype(int).tolist()
    assert len(take("retake", fps=4, max_frames=99)) == 98


def test_qwen_counts():
    assert len(take("qwen")) == 278  # 139.4 s * 2 = 278.8
    assert len(take("qwen", times=np.arange(10) / 10)) == 4  # never under 4
    assert len(take("qwen", times=np.arange(3) / 10)) == 2  # but never more than there are, floored to even


def test_fps_is_by_time():
    assert take("fps", fps=1) == list(range(0, 1394, 10))
    assert take("fps") == list(range(0, 1394, 5))
    uneven = np.array([0, 0.04, 0.9, 1.1, 1.9, 2.6, 5.0])
    assert sample(uneven, 5.1, fps=1).tolist() == [0, 2, 4, 5, 6]  # 3 s and 4 s show what 2.6 s began: not taken again
    assert sample(uneven, 5.1, fps=1, max_frames=3).tolist() == [0, 4, 6]


def test_fps_tolerates_times_rounded_to_milliseconds():
    times = np.floor(np.arange(240) / 24 * 1000 + 0.5) / 1000
    assert sample(times, 10, fps=24).tolist() == list(range(240))
    assert sample(times, 10, fps=8).tolist() == list(range(0, 240, 3))


def test_fps_above_the_source_takes_every_frame_once():
    assert take("fps", fps=60) == list(range(1394))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_on_every_length(sampler):
    for total in range(1, 40):
        times = np.arange(total) / 10
        for options in (
            {},
            {"fps": 0.5},
            {"fps": 30},
            {"max_frames": 1},
            {"max_frames": 7},
            {"fps": 5, "max_frames": 4},
        ):
            indices = sample(times, total / 10, sampler=sampler, **options)
            assert 1 <= len(indices) <= options.get("max_frames", total)
            assert 0 <= indices[0] and indices[-1] < total and (np.diff(indices) > 0).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"sampler": "random"},
            "sampler is 'random', expected one of fps, linspace, qwen, retake, vlmevalkit, lvb, mid, moviechat.",
        ),
        ({"fps": 0}, "fps is 0, expected a number of frames a second above 0."),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": "2"}, "fps is '2'"),
        ({"max_frames": 0}, "max_frames is 0, expected a whole number of at least 1."),
        ({"max_frames": 2.5}, "max_frames is 2.5"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(OptionError) as error:
        sample(TIMES, 139.4, **options)
    assert text in str(error.value)
