"""The demonstration: runs, and what it says is true."""

import json

import numpy as np
import pytest
from PIL import Image

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.evaluate import demo


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The same demonstration with a shorter video."""
    monkeypatch.setattr(demo, "SCENES", tuple((4, *scene[1:]) for scene in demo.SCENES))
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


def test_json_is_true(capsys, tmp_path):
    folder = tmp_path / "kept"
    assert cli.main(["demo", "--json", "--keep", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["random_weights"] is True
    assert result["cuts"] == result["cuts_marked"] == [4, 8, 12, 16]
    assert {4, 8, 12, 16} <= {patch["time"] for patch in result["trace"]["keyframes"]}
    assert result["trace"]["tokens_kept"] == result["trace"]["tokens"] // 4
    assert result["plain"]["trace"]["tokens_kept"] == result["plain"]["trace"]["tokens"] == result["trace"]["tokens"]
    assert result["plain"]["trace"]["cache_bytes"] == result["trace"]["cache_bytes_uncompressed"]
    assert {path.name for path in folder.iterdir()} == {"checkpoint", "shapes.mp4", "timeline.png"}
    with Image.open(result["timeline"]) as figure:
        assert figure.width == 1800
    # Anyone who loads what was kept gets what was said.
    model = lv.load(folder / "checkpoint", method=lv.ReTaKe(keep_ratio=0.25))
    questions = [answer["question"] for answer in result["answers"]]
    answers = model.ask(lv.Video(folder / "shapes.mp4", fps=2), questions, max_new_tokens=32, temperature=0.2, seed=0)
    assert [answer.text for answer in answers] == [answer["text"] for answer in result["answers"]]

    report = demo.report(result)
    assert "weights are random" in report and "mean nothing" in report
    assert "0:04  0:08  0:12  0:16" in report and "4 of 4 changes are marked" in report
    assert all(f"> {question}" in report for question in questions)

    assert cli.main(["demo", "--keep", str(folder)]) == 2  # and nothing of it is overwritten
    assert "not an empty folder" in capsys.readouterr().err


def test_video_has_its_cuts(tmp_path):
    video = lv.Video(demo.write_video(tmp_path / "v.mp4"), fps=10)
    assert video.probe.duration == pytest.approx(20) and len(video) == 200
    frames = np.concatenate([f.pixels[f.valid] for f in video.stream(50, (36, 64))]).astype(int)
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert sorted((np.argsort(-change)[:4] + 1).tolist()) == [40, 80, 120, 160]
