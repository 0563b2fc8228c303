"""The command line with AdaCM2, on a small random InstructBLIP: answers, accounts, and one sentence for bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.evaluate import ask, tiny
from longvid_jax.systems.adacm2 import AdaCM2Model
from longvid_jax.video.synthetic import World, write_video
from tests import adacm2_model
from tests.adacm2_model import LAYERS, TOKENS, WIDTH

QUESTIONS = ["What colour is the ring?", "How many circles are there?"]
FAST = ["--alpha", "0.2,0.4", "--beta", "0.5", "--max-new-tokens", "4"]
FRAMES = 12


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return adacm2_model.write(tmp_path_factory.mktemp("adacm2") / "model")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    sizes = {"width": 32, "depth": 1, "vision_width": 32, "vision_depth": 1}
    return tiny.write_checkpoint(tmp_path_factory.mktemp("qwen") / "tiny", **sizes)


@pytest.fixture(scope="module")
def movie(tmp_path_factory) -> Path:
    """6 seconds of the made-up world."""
    return write_video(World(0, seconds=6.0), tmp_path_factory.mktemp("video") / "world.mp4", size=(56, 56), fps=4)


@pytest.fixture
def edited(checkpoint, tmp_path):
    """A copy of the checkpoint without some of its files, and with another config."""

    def edit(*without, **config):
        folder = Path(shutil.copytree(checkpoint, tmp_path / "edited", dirs_exist_ok=True))
        for name in without:
            shutil.rmtree(folder / name)
        content = json.loads((folder / "config.json").read_text())
        for part, values in config.items():
            content[part] |= values
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return edit


def held(alpha: float, beta: float, frames: int) -> int:
    """Tokens that stay of frames one after the other, counted by hand."""
    length = 0
    for _ in range(frames):
        length += TOKENS
        recent = max(1, int(np.floor(alpha * length + 0.5)))
        length = recent + max(1, int(np.ceil(beta * (length - recent) - 1e-9)))
    return length


# --- what it gives ----------------------------------------------------------------------------------------------------


def test_several_questions_after_one_watching(succeeds, checkpoint, movie, monkeypatch, tmp_path):
    """JSON, the lines for people and the figure all tell of what the model did."""
    streams, stream, figure = [], AdaCM2Model.stream, tmp_path / "figure.png"
    monkeypatch.setattr(AdaCM2Model, "stream", lambda self, video: streams.append(video) or stream(self, video))
    out, _ = succeeds("ask", movie, *QUESTIONS, "--model", checkpoint, "--json", *FAST)
    assert len(streams) == 1
    result = json.loads(out)
    model = lv.load(checkpoint, method=lv.AdaCM2(alpha=(0.2, 0.4), beta=0.5))
    answers = model.ask(lv.Video(movie), QUESTIONS, max_new_tokens=4)
    for question, answer, told in zip(QUESTIONS, answers, result["answers"], strict=True):
        assert told == {"question": question, "text": answer.text, "tokens": answer.tokens[0].tolist()}
    method, trace = result["method"], result["trace"]
    assert (method["name"], method["alpha"], method["beta"], method["carry_queries"]) == (
        "adacm2",
        [0.2, 0.4],
        0.5,
        False,
    )
    assert (trace["frames"], trace["tokens"], trace["grid"]) == (FRAMES, FRAMES * TOKENS, [2, 2])
    assert trace["tokens_held"] == [held(alpha, 0.5, FRAMES) for alpha in (0.2, 0.4)]
    assert np.sum([moment["tokens"] for moment in trace["held"]], axis=0).tolist() == trace["tokens_held"]
    assert all(moment["time"] == moment["frame"] / 2 for moment in trace["held"])
    a_token = 2 * WIDTH * 4  # keys and values, width, bytes
    assert trace["cache_bytes"] == sum(trace["tokens_held"]) * a_token
    assert trace["cache_bytes_uncompressed"] == FRAMES * TOKENS * LAYERS * a_token
    assert trace["cache_bytes_allocated"] == trace["cache_capacity"] * LAYERS * a_token

    out, err = succeeds("ask", movie, *QUESTIONS, "--model", checkpoint, "--plot", figure, *FAST)
    told = [line for one in result["answers"] for line in (f"> {one['question']}", cli.printable(one["text"]))]
    assert out == "\n".join([*told, ""])
    least, most = trace["tokens_held"]
    assert f"{FRAMES} frames became {FRAMES * TOKENS} tokens, {least} to {most} of which each layer holds" in err
    with Image.open(figure) as image:
        assert image.width == 1800 and np.asarray(image.convert("L")).std() > 10


def test_frames_of_another_size(succeeds, checkpoint, movie):
    out, err = succeeds("ask", movie, "What?", "--model", checkpoint, "--long-side", 56, "--max-new-tokens", 2)
    (warning,) = [line for line in err.splitlines() if line.startswith("longvid: warning: ")]
    assert "Frames of 4 x 4 patches: the model's positions are for 2 x 2, and are interpolated" in warning


def test_options_reach_what_they_are_for(monkeypatch, fails, checkpoint, qwen, movie):
    seen = {}

    def stop(model, video, questions, **decoding):
        seen.update(model=model, video=video, decoding=decoding)
        raise lv.OptionError("Enough seen.")

    monkeypatch.setattr(ask, "ask", stop)
    options = "--alpha 0.5 --beta 0.25,0.75 --carry-queries --num-beams 3 --length-penalty 0.5 --min-new-tokens 2"
    fails("ask", movie, "What?", "--model", checkpoint, *options.split())
    assert seen["model"].method == lv.AdaCM2(alpha=0.5, beta=(0.25, 0.75), carry_queries=True)
    beams = {name: seen["decoding"][name] for name in ("num_beams", "length_penalty", "min_new_tokens")}
    assert beams == {"num_beams": 3, "length_penalty": 0.5, "min_new_tokens": 2}
    for folder, method, default in (
        (checkpoint, "adacm2", lv.AdaCM2()),
        (qwen, "retake", lv.ReTaKe(keep_ratio=0.25)),
    ):
        for options, expected in (([], default), (["--method", method], default), (["--method", "none"], None)):
            fails("ask", movie, "What?", "--model", folder, *options)
            assert seen["model"].method == expected
            assert not {"num_beams", "length_penalty", "min_new_tokens"} & seen["decoding"].keys()


def test_eval(succeeds, checkpoint):
    words = ["--model", checkpoint, "--examples", 3, "--seconds", 4, "--size", 28, "--questions", 2, "--json"]
    result = json.loads(succeeds("eval", *words, "--no-baselines", "--alpha", 0.4, "--beta", 0.5)[0])
    assert result["method"]["alpha"] == 0.4 and result["families"]["all"]["questions"] == 3


# --- bad input: one sentence, exit code 2 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        ("checkpoint", "--alpha 0", "alpha is 0.0, but must be above 0 and at most 1"),
        ("checkpoint", "--beta 1.5", "beta is 1.5"),
        ("checkpoint", "--beta nan", "beta is nan"),
        ("checkpoint", "--alpha 0.1,2", "alpha is 2.0"),
        ("checkpoint", "--alpha 0.1,0.2,0.3", "alpha has 3 values, but this Q-Former has 2 such layers"),
        ("checkpoint", "--method retake", "--method retake is for ReTaKe (on a Qwen2-VL)"),
        ("checkpoint", "--keep-ratio 0.5 --budget 9", "--keep-ratio, --budget is for ReTaKe (on a Qwen2-VL)"),
        ("checkpoint", "--method adacm2 --no-reforge", "only ReTaKe (on a Qwen2-VL) takes --no-reforge"),
        ("checkpoint", "--method none --alpha 0.5", "so --alpha cannot be used with it"),
        ("checkpoint", "--num-beams 0", "num_beams is 0"),
        ("checkpoint", "--min-new-tokens 129", "min_new_tokens is 129"),
        ("checkpoint", "--length-penalty nan", "length_penalty is nan"),
        ("checkpoint", "--min-new-tokens 2 --temperature 1", "leave temperature at 0"),
        ("qwen", "--method adacm2", "--method adacm2 is for AdaCM2 (on an InstructBLIP)"),
        ("qwen", "--alpha 0.1 --no-carry-queries", "--alpha, --carry-queries is for AdaCM2 (on an InstructBLIP)"),
        ("qwen", "--num-beams 5", "--num-beams is for answers of an InstructBLIP"),
        ("qwen", "--keep-ratio 0.5 --beta 0.5", "--keep-ratio and --beta are of two systems"),
    ],
)
def test_options_out_of_range(fails, checkpoint, qwen, movie, monkeypatch, model, options, text):
    monkeypatch.setattr(AdaCM2Model, "stream", None)  # found out before anything is watched
    folder = {"checkpoint": checkpoint, "qwen": qwen}[model]
    line = fails("ask", movie, "What?", "--model", folder, *options.split())
    assert text in line and line.endswith("."), line


def test_a_list_that_is_none(checkpoint, movie, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ask", str(movie), "What?", "--model", str(checkpoint), "--alpha", "0.1;0.2"])
    assert stop.value.code == 2 and "neither a number nor a list" in capsys.readouterr().err


def test_questions_that_cannot_be_read(fails, checkpoint, movie, edited, monkeypatch):
    monkeypatch.setattr(AdaCM2Model, "stream", None)
    command = ["ask", movie, "What?", " ".join(["Why?"] * 60), "--model"]
    assert "The question has 242 tokens, but the Q-Former reads 64; shorten it" in fails(*command, checkpoint)
    short = edited(text_config={"max_position_embeddings": 40})
    line = fails("ask", movie, "What colour is it?", "--model", short, "--max-new-tokens", 30)
    assert "too long" in line and "40 positions" in line
    line = fails("ask", movie, "What?", "--model", edited("qformer_tokenizer"))
    assert "has no tokenizer for its Q-Former" in line
    assert "question is empty" in fails("ask", movie, " ", "--model", checkpoint)
    monkeypatch.undo()
    with pytest.raises(lv.PromptError, match="Nothing was watched yet"):
        model = lv.load(checkpoint)
        model.answer(model.begin("What?"))
