"""The demonstration: runs, and what it says is true."""

import dataclasses
import json

import pytest
from PIL import Image

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.evaluate import assets, demo
from longvid_jax.evaluate.metrics import span_iou
from longvid_jax.video.synthetic import World
from tests import adacm2_model
from tests.systems import small_rewind


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The same demonstrations with shorter videos."""
    for system, seconds in (("retake", 24.0), ("adacm2", 12.0), ("rewind", 12.0)):
        monkeypatch.setitem(demo.SHOWS, system, dataclasses.replace(demo.SHOWS[system], seconds=seconds))
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """Models of random weights in the place of shipped ones; they are quicker."""
    monkeypatch.setattr(assets, "FOLDER", tmp_path / "assets")
    adacm2_model.write(assets.FOLDER / demo.SHOWS["adacm2"].model)
    small_rewind.make(tmp_path / "rewind").rename(assets.FOLDER / demo.SHOWS["rewind"].model)


def test_json_is_true(capsys, tmp_path):
    folder = tmp_path / "kept"
    assert cli.main(["demo", "--json", "--keep", str(folder), "--seed", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    check(result, demo.SHOWS["retake"], folder)
    trace, plain = result["trace"], result["plain"]["trace"]
    assert trace["tokens_kept"] == trace["tokens"] // 4 and plain["tokens_kept"] == plain["tokens"] == trace["tokens"]
    assert plain["cache_bytes"] == trace["cache_bytes_uncompressed"] > 2 * trace["cache_bytes"]

    assert cli.main(["demo", "--keep", str(folder)]) == 2  # and nothing of it is overwritten
    assert "not an empty folder" in capsys.readouterr().err


def test_json_is_true_of_adacm2(capsys, tmp_path, untrained):
    folder = tmp_path / "kept"
    assert cli.main(["demo", "--system", "adacm2", "--json", "--keep", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    check(result, demo.SHOWS["adacm2"], folder)
    trace, plain = result["trace"], result["plain"]["trace"]
    assert trace["frames"] == 24 and plain["tokens_held"] == [trace["tokens"]] * adacm2_model.LAYERS
    assert plain["cache_bytes"] == trace["cache_bytes_uncompressed"] > 2 * trace["cache_bytes"]


def test_json_is_true_of_rewind(capsys, tmp_path, untrained):
    folder = tmp_path / "kept"
    assert cli.main(["demo", "--system", "rewind", "--json", "--keep", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    check(result, demo.SHOWS["rewind"], folder)
    trace, plain = result["trace"], result["plain"]["trace"]
    assert trace["tokens_kept"] == 2 * trace["frames"] == 48 and len(trace["selected"]) == 8
    assert trace["cache_bytes"] < trace["cache_bytes_uncompressed"]
    # Without selection it looks at frames spread evenly: of each eighth of the video the middle.
    assert (
        [one["frame"] for one in plain["selected"]]
        == list(range(1, 24, 3))
        != [one["frame"] for one in trace["selected"]]
    )


def check(result, show, folder):
    assert {path.name for path in folder.iterdir()} == {"world.mp4", "world.json", "timeline.png"}
    with Image.open(result["timeline"]) as figure:
        assert figure.width > 1000

    # The questions and truths are those of the world that it names, one of each family.
    world = World(**result["world"])
    truths = {question.text: question for question in world.questions()}
    assert [one["family"] for one in result["answers"]] == list(show.families)
    for one in result["answers"]:
        assert truths[one["question"]].answer == one["truth"]
        expected = one["text"] == one["truth"]
        if one["family"] == "when":
            assert one["iou"] == span_iou(one["text"], truths[one["question"]].span)
            expected = one["iou"] >= 0.5
        assert one["right"] is expected
    assert result["right"] == sum(one["right"] for one in result["answers"])
    assert result["right_without"] == sum(one["without"]["right"] for one in result["answers"])

    # Anyone who asks the shipped model about the file gets what was said.
    checkpoint, questions = assets.path(show.model), [one["question"] for one in result["answers"]]
    models = lv.load(checkpoint, method=show.method), show.without[0](checkpoint)
    for model, said in zip(models, (lambda one: one, lambda one: one["without"]), strict=True):
        answers = model.ask(lv.Video(folder / "world.mp4", fps=2), questions, max_new_tokens=demo.MAX_NEW_TOKENS)
        assert [answer.text.strip() for answer in answers] == [said(one)["text"] for one in result["answers"]]

    report = demo.report(result)
    assert f"{result['right']} of {len(show.families)} answers are right" in report and show.title in report
    for one in result["answers"]:
        assert one["question"] in report and one["text"] in report and (one["right"] or one["truth"] in report)


def test_all_systems_side_by_side(capsys, tmp_path):
    folder = tmp_path / "kept"
    assert cli.main(["demo", "--system", "all", "--json", "--keep", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {path.name for path in folder.iterdir()} == {
        "world.mp4", "world.json", *(f"{system}.png" for system in demo.SHOWS)
    }  # fmt: skip
    world = World(**result["world"])
    truths = {question.text: question for question in world.questions()}
    assert set(result["systems"]) == set(demo.SHOWS) and len(result["answers"]) == 6  # none is asked for a caption
    for system, show in demo.SHOWS.items():
        model = lv.load(assets.path(show.model), method=show.method)
        questions = [one["question"] for one in result["answers"]]
        answers = model.ask(lv.Video(folder / "world.mp4", fps=2), questions, max_new_tokens=demo.MAX_NEW_TOKENS)
        said = [one["said"][system] for one in result["answers"]]
        assert [answer.text.strip() for answer in answers] == [one["text"] for one in said]
        assert result["systems"][system]["right"] == sum(one["right"] for one in said)
        assert result["systems"][system]["trace"]["cache_bytes"] > 0
    for one in result["answers"]:
        assert truths[one["question"]].answer == one["truth"]
    text = demo.report(result)
    assert all(one["question"] in text for one in result["answers"])
    assert all(f"{show.title:7}" in text for show in demo.SHOWS.values())


def test_a_miss_is_told():
    """Answers that are wrong are said to be, with the truth beside them."""
    from longvid_jax.video.synthetic import Question

    question = Question("needle", "What colour is the ring?", "red", ("red", "blue"), (1.0, 2.0), False)
    one = demo.judged(question, {"text": "blue", "tokens": [1]})
    assert not one["right"] and one["tokens"] == [1] and demo.judged(question, {"text": "red "})["right"]
    assert "wrong: red" in demo._told(demo._asked(question) | one)
    when = Question("when", "When?", "from 2 to 4 seconds", (), (2.2, 4.1), False)
    near = demo.judged(when, {"text": "from 2 to 5 seconds"})
    assert near["right"] and near["iou"] == pytest.approx(1.9 / 3) and not demo.judged(when, {"text": "no"})["right"]
    assert "right: from 2 to 4 seconds is exact" in demo._told(demo._asked(when) | near)


def test_seeds_give_other_worlds():
    worlds = [demo._world(seed, 24.0, ("needle", "when"))[0] for seed in (0, 0, 1)]
    assert worlds[0] == worlds[1] != worlds[2]
