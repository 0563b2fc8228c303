"""`longvid ask` with a ReWind: its options, its account, its figure, and what does not go."""

import json

import numpy as np
import pytest
from PIL import Image

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.video.synthetic import World
from longvid_jax.video.synthetic_file import write_video
from tests.systems.small_adacm2 import QUESTIONS
from tests.systems.small_rewind import make

FEW = "--clip-frames 4 --num-candidates 6 --num-selected 3 --num-neighbors 2 --max-new-tokens 4 --fps 2".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(tmp_path_factory.mktemp("rewind"))


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    return write_video(World(3, seconds=10), tmp_path_factory.mktemp("clip") / "world.mp4", size=(28, 28), fps=4)


def test_an_account_and_a_figure(succeeds, checkpoint, movie, tmp_path):
    figure = tmp_path / "seen.png"
    asked = "ask", movie, *QUESTIONS[:2], "--model", checkpoint, *FEW
    result = json.loads(succeeds(*asked, "--json")[0])
    assert result["method"]["name"] == "rewind" and result["method"]["num_selected"] == 3
    trace = result["trace"]
    assert trace["frames"] == 20 and trace["tokens_kept"] == 40 and len(trace["relevance"]) == 20
    assert sum(trace["relevance"]) == pytest.approx(2, abs=1e-4)  # a softmax a head
    assert [len(trace[name]) for name in ("candidates", "selected")] == [6, 3]
    least = min(one["relevance"] for one in trace["candidates"])
    assert sorted(trace["relevance"])[-6] == pytest.approx(least)
    assert {one["frame"] for one in trace["selected"]} <= {one["frame"] for one in trace["candidates"]}
    out, err = succeeds(*asked, "--plot", figure)
    told = [line for one in result["answers"] for line in (f"> {one['question']}", cli.printable(one["text"]))]
    assert out == "\n".join([*told, ""]) and "transformers" not in err
    assert "20 frames became 40 tokens in a memory of" in err and "3 of them were looked at again in detail" in err
    with Image.open(figure) as image:
        assert image.width == 1800 and np.asarray(image.convert("L")).std() > 10
    again = json.loads(succeeds(*asked, "--detail", "redecode", "--json")[0])
    assert again["answers"] == result["answers"] and again["trace"]["detail_bytes"] == 0


def test_searched(succeeds, checkpoint, movie):
    words = "ask", movie, QUESTIONS[0], "--model", checkpoint, *FEW, "--num-beams", 2, "--min-new-tokens", 2, "--json"
    assert len(json.loads(succeeds(*words)[0])["answers"][0]["tokens"]) >= 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--clip-frames 0", "clip_frames is 0, but must be at least 1"),
        ("--num-candidates 4", "num_selected is 8, but must be at most the 4 candidates"),
        ("--method none", "is a ReWind, which does not run without its memory; leave out --method none"),
        ("--alpha 0.5", "--alpha is for AdaCM2 (on an InstructBLIP)"),
        ("--offload --budget 9", "--budget and --offload are of two systems"),
    ],
)
def test_options_that_are_refused(fails, checkpoint, movie, options, text):
    assert text in fails("ask", movie, "What?", "--model", checkpoint, *options.split())


def test_another_systems_choices(checkpoint):
    with pytest.raises(lv.OptionError, match="is a rewind model, for lv.ReWind"):
        lv.load(checkpoint, method=lv.AdaCM2())
