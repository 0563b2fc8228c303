"""Evaluation on the made-up world: the questions, the batches, the scores, and the command, on random weights."""

import dataclasses
import json

import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.errors import OptionError
from longvid_jax.evaluate import tiny, world
from longvid_jax.evaluate.world import Setup
from longvid_jax.evaluate.world_scores import ALL, by_family, details, report
from longvid_jax.video.synthetic import FAMILIES, parse_span

SETUP = Setup(examples=20, seconds=12, questions=8)
SHORT = Setup(seed=3, examples=5, seconds=6, questions=2, size=(28, 28))


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", width=32, depth=1, vision_width=32, vision_depth=1
    )


def test_questions_are_of_worlds_that_are_not_trained_on():
    worlds, asked = world.ask(SETUP)
    assert len(asked) == 20 and [one.video for one in asked] == sorted(one.video for one in asked)
    assert len(worlds) == 3 and all(one.split == "test" for one in worlds)
    for one in asked:
        assert one.question in worlds[one.video].questions(8) and one.answer == one.question.answer
    assert world.ask(SETUP) == (worlds, asked)
    others, _ = world.ask(dataclasses.replace(SETUP, seed=1))
    assert not {one.seed for one in worlds} & {one.seed for one in others}
    more, _ = world.ask(dataclasses.replace(SETUP, examples=40))
    assert more[:3] == worlds


def test_questions_in_letters():
    _, asked = world.ask(dataclasses.replace(SETUP, letters=True))
    for one in asked:
        assert f"\n{one.answer}. {one.question.answer}" in one.text and one.letters
    assert len({one.answer for one in asked}) > 1
    assert details(asked, [one.answer for one in asked]) == {"when": None, "caption": None}
    assert by_family(asked, [one.answer for one in asked])["when"]["chance"] == pytest.approx(0.25)


def test_worlds_that_are_rendered_once():
    (one, *_), _ = world.ask(SHORT)
    rendered = world.Rendered(one, SHORT)
    times = SHORT.times(one)[1::3]
    np.testing.assert_array_equal(rendered.render(times, SHORT.size), one.render(times, SHORT.size))
    for others, size in ((times + 0.1, SHORT.size), (times, (56, 56)), (times + 100, SHORT.size)):
        with pytest.raises(OptionError, match="only the frames of the setup"):
            rendered.render(others, size)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"examples": 0}, "examples is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"questions": 2.5}, "questions is 2.5"),
        ({"fps": 0}, "fps is 0"),
    ],
)
def test_bad_choices(choices, said):
    with pytest.raises(OptionError, match=said):
        Setup(**choices)


def test_worlds_without_questions():
    with pytest.raises(OptionError, match="1 seconds give too few questions"):
        world.ask(Setup(seconds=1, families=("order",)))


@pytest.mark.parametrize(
    "method",
    [lv.ReTaKe(keep_ratio=0.5, chunk_frames=4), lv.ReTaKe(keep_ratio=0.5, chunk_frames=4, prompt_guided=True)],
    ids=["retake", "guided"],
)
def test_answers_are_those_of_each_question_alone(checkpoint, method, monkeypatch):
    """Side by side in batches that are not full, as when one video is watched for one question."""
    monkeypatch.setattr(world, "WATCHED", 2)
    monkeypatch.setattr(world, "ANSWERED", 4)
    monkeypatch.setattr(world, "MAX_NEW_TOKENS", 6)
    model, (worlds, asked) = lv.load(checkpoint, method=method), world.ask(SHORT)
    assert len(worlds) == 3
    counted = []
    told = world.answers(model, worlds, asked, SHORT.times, SHORT.size, progress=counted.append)
    assert sum(counted) == len(asked) and len(set(told)) > 2
    for one, text in zip(asked, told, strict=True):
        times = SHORT.times(worlds[one.video])
        assert len(times) == 12
        memory = model.begin(one.text, expected_frames=len(times))
        pixels = worlds[one.video].render(times, SHORT.size)[None]
        memory = model.watch(memory, lv.Frames(pixels, times[None].astype(np.float32), np.ones((1, len(times)), bool)))
        assert model.answer(memory, max_new_tokens=6).text == text


def test_one_frame_is_the_one_in_the_middle(checkpoint, monkeypatch):
    monkeypatch.setattr(world, "MAX_NEW_TOKENS", 6)
    model, (worlds, asked) = lv.load(checkpoint), world.ask(SHORT)
    told = world.answers(world.glimpse(model), worlds, asked, world.middle, SHORT.size)
    for one, text in list(zip(asked, told, strict=True))[::2]:
        memory = model.watch(model.begin(one.text), _frames(worlds[one.video].render([3.0], SHORT.size)))
        assert model.answer(memory, max_new_tokens=6).text.strip() == text


def _frames(pixels):
    return lv.Frames(pixels[None], np.zeros((1, len(pixels)), np.float32), np.ones((1, len(pixels)), bool))


def test_scores_of_known_answers():
    """All right, but each fourth, of which the spans are a second late and the captions lack their first event."""
    _, asked = world.ask(dataclasses.replace(SETUP, examples=400))
    told, wrong = [], []
    for i, one in enumerate(asked):
        wrong.append(i % 4 == 0)
        answer = one.answer
        if wrong[-1] and one.question.family == "when":
            start, end = parse_span(answer)
            answer = f"from {start + 1:.0f} to {end + 1:.0f} seconds"
        elif wrong[-1]:
            answer = answer.split(", then ", 1)[-1] if one.question.family == "caption" else "no idea"
        told.append(answer)
    families, scored = by_family(asked, told), details(asked, told)
    assert list(families) == [*FAMILIES, ALL]
    for name, result in families.items():
        mine = [bad for one, bad in zip(asked, wrong, strict=True) if name in (ALL, one.question.family)]
        assert result["questions"] == len(mine) and result["accuracy"] == pytest.approx(1 - np.mean(mine), abs=0.03)
        assert result["interval"][0] <= result["accuracy"] <= result["interval"][1]
        parts = result["held_out"], result["not_held_out"]
        assert sum(part["questions"] for part in parts) == len(mine)
        assert sum(part["questions"] * part["accuracy"] for part in parts) == pytest.approx(
            result["accuracy"] * len(mine)
        )
    assert families[ALL]["accuracy"] == pytest.approx(0.75, abs=0.01)
    held_out = [one for one in asked if one.question.held_out]
    assert families[ALL]["held_out"]["questions"] == len(held_out) > 40
    assert scored["when"]["without_span"] == 0
    assert 0.4 < scored["when"]["miou"] < scored["when"]["right_answers"]["miou"] < 0.9
    assert scored["caption"]["exact"] < scored["caption"]["events"] < 1


CONFIG = """
from longvid_jax.train.config import base, stage

def get_config():
    config = base()
    config.stages = (stage(steps=1),)
    config.benchmark = BENCHMARK
    return config
"""


def config_file(folder, **benchmark):
    path = folder / f"{'_'.join(benchmark)}.py"
    path.write_text(CONFIG.replace("BENCHMARK", repr(benchmark)))
    return f"{path}:"


def run(capsys, *words):
    assert cli.main(["eval", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_command(checkpoint, capsys):
    words = ["--model", checkpoint, "--examples", 9, "--seconds", 6, "--questions", 5, "--size", 28, "--seed", 2]
    result = json.loads(run(capsys, *words, "--json"))
    assert result["setup"]["seed"] == 2 and result["setup"]["seconds"] == 6 and result["method"] is None
    families = result["families"]
    assert families[ALL]["questions"] == 9 == sum(one["questions"] for one in families.values()) - 9
    assert result["videos"] == 2 and families[ALL]["accuracy"] < 0.5
    assert (
        set(result["baselines"]["text_only"]) == set(result["baselines"]["middle_frame"]["families"]) == set(families)
    )
    text = report(result)
    assert "9 questions on 2 worlds of 6 seconds" in text and all(name in text for name in families)


def test_the_command_with_a_config(checkpoint, capsys, tmp_path):
    """What the config says of the worlds holds, where nothing else is given; the model is that of its run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(checkpoint)
    config = config_file(tmp_path, seconds=4.0, size=28, questions=2, examples=5)
    words = ["--config", config, "--workdir", tmp_path / "run", "--no-baselines", "--examples", 3, "--json"]
    result = json.loads(run(capsys, *words))
    assert {name: result["setup"][name] for name in ("seconds", "size", "questions", "examples", "level")} == {
        "seconds": 4.0,
        "size": [28, 28],
        "questions": 2,
        "examples": 3,
        "level": "clear",
    }


def test_the_command_with_retake(checkpoint, capsys):
    words = ["--model", checkpoint, "--examples", 3, "--seconds", 4, "--size", 28, "--no-baselines", "--json"]
    result = json.loads(run(capsys, *words, "--keep-ratio", 0.5, "--letters"))
    assert result["method"]["keep_ratio"] == 0.5 and "baselines" not in result


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--model is missing"),
        (["--model", "MODEL", "--workdir", "x"], "--workdir is of a config's run"),
        (["--model", "MODEL", "--size", 30], "size is 30 x 30 pixels, but this model needs multiples of 28"),
        (["--model", "MODEL", "--seconds", 0.5], "seconds is 0.5"),
        (["--model", "MODEL", "--method", "none", "--keep-ratio", 0.5], "--keep-ratio cannot be used with it"),
        (["--config", "CONFIG", "--workdir", "nowhere"], "has made no model yet"),
        (["--config", "CONFIG"], "is shipped; give --workdir"),
        (["--config", "WRONG"], "config.benchmark has no 'lenght'; known are seed, examples"),
    ],
)
def test_bad_input(checkpoint, capsys, tmp_path, words, said):
    paths = {"MODEL": checkpoint, "CONFIG": config_file(tmp_path, seconds=6), "WRONG": config_file(tmp_path, lenght=6)}
    words = [str(paths.get(word, word)) for word in words]
    assert cli.main(["eval", *words]) == 2
    assert said in capsys.readouterr().err
