"""ReWind on ten minutes of real film, in which kinds of scenes take turns."""

import json

import pytest

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.evaluate import assets
from tests.systems.small_rewind import described, written

QUESTIONS = ["When is the bird shown?", "Who comes to the table?"]
MODEL = described(64, 128, 2, size=56, patch=14, words=64, queries=8)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_features_select_more_than_one_kind_of_scene(clips, tmp_path, seed):
    """Nothing is trained: what is seen, read and asked is as the networks begin."""
    loaded = lv.load(written(tmp_path / "model", MODEL, seed=seed))
    film = lv.Video(clips / "haystack_10min.mp4", fps=1)
    segments = json.loads((clips / "haystack_10min.json").read_text())["segments"]
    for answer in loaded.ask(film, QUESTIONS, max_new_tokens=2):
        (times,) = answer.trace.times[:, answer.trace.selected[0]]
        assert len(set(times)) == 8
        kinds = {one["source"] for one in segments for at in times if one["start"] <= at < one["end"]}
        assert len(kinds) > 1, (seed, times)


def test_the_tiny_model_watches_it(clips, capsys):
    """It knows no such videos, but can watch and say something."""
    film = clips / "haystack_10min.mp4"
    words = ["ask", film, QUESTIONS[0], "--model", assets.path("rewind_world"), "--fps", 1, "--json"]
    assert cli.main([str(word) for word in words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answers"][0]["text"] and told["video"]["frames"] == 600
