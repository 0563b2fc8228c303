"""Asking ReWind many questions at once, and the simpler ways that it is compared with."""

import jax.numpy as jnp
import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax.evaluate import rewind_watch, world
from longvid_jax.evaluate.rewind_watch import Variant
from longvid_jax.evaluate.world import Setup
from tests.systems.small_rewind import CHOICES, make

SETUP = Setup(seed=3, examples=4, seconds=4, fps=3, questions=3, size=(28, 28))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lv.load(make(tmp_path_factory.mktemp("rewind")), method=lv.ReWind(**CHOICES))


def test_questions_side_by_side_are_answered_as_each_alone(model, monkeypatch):
    monkeypatch.setattr(world, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(rewind_watch, "TOGETHER", 2)
    worlds, asked = world.ask(SETUP)
    times, alone = SETUP.times(worlds[0]), []
    for one in asked:
        pixels = worlds[one.video].render(times, SETUP.size)[None]
        frames = lv.Frames(pixels, np.float32(times)[None], np.ones((1, len(times)), bool))
        alone.append(model.answer(model.watch(model.begin(one.text), frames), max_new_tokens=6).text)
    counted = []
    told = world.answers(model, worlds, asked, SETUP.times, SETUP.size, progress=counted.append)
    assert told == [text.strip() for text in alone] and sum(counted) == len(asked) == 4 and len(set(told)) > 1
    shorter = world.answers(world.glimpse(model), worlds, asked, world.middle, SETUP.size)
    assert len(shorter) == len(asked)  # a single frame


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ("uniform", [[2, 6, 10], [2, 6, 10]]),
        ("oracle", [[3, 4, 9], [2, 6, 10]]),  # the second row's question is about nothing that is seen
        ("relevant", None),
    ],
)
def test_other_frames_are_looked_at(model, frames, expected):
    variant, (worlds, asked) = Variant(model, model.choices, frames=frames), world.ask(SETUP)
    memory = rewind_watch.watched(
        variant, worlds[0], [one.text for one in asked[:2]], SETUP.times(worlds[0]), SETUP.size
    )
    variant.seen = np.zeros((2, 12), bool)
    variant.seen[0, [3, 4, 9]] = True
    trace = variant.answer(memory, max_new_tokens=2).trace
    if expected is None:
        expected = [sorted(np.argsort(-scores, kind="stable")[:3].tolist()) for scores in trace.relevance]
    assert [row.tolist() for row in trace.selected] == expected


def test_frames_that_show_what_is_asked_about():
    worlds, asked = world.ask(SETUP)
    times = SETUP.times(worlds[0])
    for one in asked:
        if one.question.family in ("needle", "when"):
            start, end = one.question.span
            shown = rewind_watch.shows(worlds[one.video], one.question, times)
            np.testing.assert_array_equal(shown, (start <= times) & (times < end))


def test_spread():
    from longvid_jax.memory.frame_selection import spread

    valid = np.array([[1] * 10, [0, 1, 1, 0, 0, 0, 1, 0, 0, 0], [0] * 10, [0, 1, 1, 1, 1, 1, 0, 1, 0, 1]], bool)
    chosen = spread(jnp.asarray(valid), 4)
    got = [row[real].tolist() for row, real in zip(np.asarray(chosen.indices), np.asarray(chosen.valid), strict=True)]
    assert got == [[1, 3, 6, 8], [1, 2, 6], [], [1, 3, 5, 9]]
    assert spread(jnp.ones((1, 3), bool), 8).indices.shape == (1, 8)
