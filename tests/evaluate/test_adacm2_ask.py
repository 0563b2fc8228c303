"""Asking AdaCM2: one watching for many questions, and the account of it."""

import json

import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax.evaluate import ask, world
from longvid_jax.evaluate.world import Setup
from longvid_jax.systems.results import AdaCM2Trace
from tests import adacm2_model

SETUP = Setup(seed=3, examples=4, seconds=4, fps=3, questions=3, size=(28, 28))
METHODS = {"adacm2": lv.AdaCM2(alpha=0.3, beta=0.5), "none": None}
TOKENS = 6  # words of an answer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return adacm2_model.write(tmp_path_factory.mktemp("adacm2") / "model")


def frames(pixels, times):
    return lv.Frames(pixels[None], np.float32(times)[None], np.ones((1, len(times)), bool))


@pytest.mark.parametrize("name", METHODS)
def test_questions_side_by_side_are_answered_as_each_alone(checkpoint, name, monkeypatch):
    """By model.ask, which watches once, and in an evaluation, whose batches are not full."""
    monkeypatch.setattr(world, "TOGETHER", 3)
    monkeypatch.setattr(world, "ANSWERED", 3)
    monkeypatch.setattr(world, "MAX_NEW_TOKENS", TOKENS)
    model, (worlds, asked) = lv.load(checkpoint, method=METHODS[name]), world.ask(SETUP)
    times = SETUP.times(worlds[0])
    assert len(worlds) == 2 and len(times) == 12
    alone, videos = [], [one.render(times, SETUP.size) for one in worlds]
    for one in asked:
        memory = model.watch(model.begin(one.text), frames(videos[one.video], times))
        alone.append(model.answer(memory, max_new_tokens=TOKENS))
    counted, warned = [], []
    monkeypatch.setattr(model, "warn_of_positions", lambda *given: warned.append(given))  # as watching does
    told = world.answers(model, worlds, asked, SETUP.times, SETUP.size, progress=counted.append)
    assert told == [answer.text for answer in alone] and sum(counted) == len(asked) and len(set(told)) > 1

    monkeypatch.undo()
    assert warned == [([2, 2], 0, 12)]

    seen, questions = [], [one.text for one in asked if one.video == 0]
    video = lv.Video(videos[0], native_fps=3, fps=3)
    together = model.ask(video, questions, progress=seen.append, max_new_tokens=TOKENS)
    assert sum(seen) == len(times) and len(together) == len(questions) == 3
    for one, other in zip(together, alone, strict=False):
        assert one.text == other.text
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert ask.describe_trace(one.trace) == ask.describe_trace(other.trace)


def test_a_glance_at_the_frame_in_the_middle(checkpoint, monkeypatch):
    monkeypatch.setattr(world, "MAX_NEW_TOKENS", TOKENS)
    model, (worlds, asked) = lv.load(checkpoint, method=METHODS["adacm2"]), world.ask(SETUP)
    told = world.answers(world.glimpse(model), worlds, asked, world.middle, SETUP.size)
    plain = world.with_method(model, None)
    assert plain.words is model.words and plain.method is None
    for one, text in zip(asked, told, strict=True):
        memory = plain.watch(plain.begin(one.text), frames(worlds[one.video].render([2.0], SETUP.size), [0.0]))
        assert plain.answer(memory, max_new_tokens=TOKENS).text == text


@pytest.fixture
def trace():
    """Three frames of 1 x 2 patches and a class token, of which two layers hold 4 and 2 tokens."""
    source = np.array([[[0, 4, 7, 8, -1]], [[5, 8, -1, -1, -1]]], np.int32)
    return AdaCM2Trace(
        frames=np.array([3]),
        grid=(1, 2),
        capacity=5,
        cache_bytes=2 * 5 * 80,
        cache_bytes_uncompressed=2 * 9 * 80,
        length=np.array([[4], [2]]),
        source=source,
        times=np.array([[0, 0.5, 1]], np.float32),
        seconds={"watch": 1.0},
    )


def test_trace_as_plain_data(trace):
    assert json.loads(json.dumps(ask.describe_trace(trace), allow_nan=False)) == {
        "frames": 3,
        "tokens": 9,
        "tokens_held": [4, 2],
        "grid": [1, 2],
        "cache_bytes": 6 * 80,
        "cache_bytes_uncompressed": 18 * 80,
        "cache_bytes_allocated": 10 * 80,
        "cache_capacity": 5,
        "held": [
            {"frame": 0, "time": 0, "tokens": [1, 0]},
            {"frame": 1, "time": 0.5, "tokens": [1, 1]},
            {"frame": 2, "time": 1, "tokens": [2, 1]},
        ],
    }
    assert ask.held_places(trace).tolist() == [[1, 2, 1], [0, 0, 2]]
    assert ask.in_words(trace).startswith("3 frames became 9 tokens, 2 to 4 of which each layer holds: 0.000 MB")
