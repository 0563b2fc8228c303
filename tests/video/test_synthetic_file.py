"""The made-up world as a video file with its JSON."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest

from longvid_jax.errors import OptionError
from longvid_jax.video import Video
from longvid_jax.video.synthetic import COLOURS, World, write_video


def decoded(path, fps, size):
    frames = list(Video(path, fps=fps).stream(32, size))
    pixels = np.concatenate([frame.pixels[frame.valid] for frame in frames])
    return pixels, np.concatenate([frame.times[frame.valid] for frame in frames]).astype(float)


@pytest.mark.parametrize("level", ["clear", "wild"])
def test_a_file_shows_the_world(tmp_path, level):
    world = World(8, level=level, seconds=6.25)
    path = write_video(world, tmp_path / "world.mp4", size=(112, 144), fps=10, crf=10)
    assert path == tmp_path / "world.mp4" and sorted(p.name for p in tmp_path.iterdir()) == ["world.json", "world.mp4"]
    probe = Video(path).probe
    assert (probe.width, probe.height, probe.fps, probe.codec) == (144, 112, 10, "h264")
    assert probe.num_frames == 63 and probe.duration == pytest.approx(6.3)
    pixels, times = decoded(path, 10, (112, 144))
    np.testing.assert_allclose(times, np.arange(63) / 10, atol=1e-6)
    drawn = world.render(np.arange(63) / 10, (112, 144)).astype(float)
    error = np.abs(pixels - drawn).mean((1, 2, 3))
    assert error.max() < (4 if level == "clear" else 12)
    assert np.abs(pixels[1:] - drawn[:-1]).mean() > error.mean()  # no frame is off by one


def test_a_needle_is_in_the_file_when_the_json_says(tmp_path):
    """Its colour, which nothing else has, is in the decoded frames of its span and in no others."""
    worlds = (World.needle(seed, seconds=20, depth=0.6) for seed in range(50))
    world = next(w for w in worlds if all(thing.colour != w.events[0].colour for thing in w.script.cast))
    path = write_video(world, tmp_path / "needle.mp4", size=(112, 112), fps=Fraction(25, 2))
    (event,) = json.loads(path.with_suffix(".json").read_text())["events"]
    pixels, times = decoded(path, 12.5, (56, 56))
    distances = ((pixels.astype(np.float32) - COLOURS[event["colour"]]) ** 2).sum(-1)
    start, end = event["span"]
    assert len(times) == 250
    assert (((distances < 60**2).sum((1, 2)) > 30) == ((start <= times) & (times < end))).all()


def test_the_json(tmp_path):
    world = World(5, level="busy", seconds=12, split="test")
    path = write_video(world, tmp_path / "a.mp4", size=(64, 64), fps=4, questions=10)
    about = json.loads((tmp_path / "a.json").read_text())
    assert {name: about[name] for name in ("seed", "level", "seconds", "split")} == {
        "seed": 5,
        "level": "busy",
        "seconds": 12,
        "split": "test",
    }
    assert about["video"] == {"file": path.name, "size": [64, 64], "fps": 4, "crf": 20}
    assert [event["span"] for event in about["events"]] == [[event.start, event.end] for event in world.events]
    assert [event["kind"] for event in about["events"]] == [event.kind for event in world.events]
    change = next(event for event in about["events"] if event["kind"] == "change")
    assert change["span"][0] < change["at"] < change["span"][1] and change["becomes"] in COLOURS
    assert about["questions"] == json.loads(json.dumps([dataclasses.asdict(q) for q in world.questions(10)]))
    again = World(about["seed"], level=about["level"], seconds=about["seconds"], split=about["split"])
    assert again.events == world.events


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    """An error on the way leaves neither file nor a trace, and what was there before."""
    (tmp_path / "a.mp4").write_bytes(b"old")

    def broken(world, path, *rest):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("longvid_jax.video.synthetic_file._encode", broken)
    with pytest.raises(KeyboardInterrupt):
        write_video(World(0, seconds=2), tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


def test_a_long_world_is_written_in_pieces(tmp_path, monkeypatch):
    """However long, no call renders more than a fixed number of pixels."""
    rendered = []
    original = World.render

    def render(self, times, size):
        rendered.append(len(times) * size[0] * size[1])
        return original(self, times, size)

    monkeypatch.setattr(World, "render", render)
    monkeypatch.setattr("longvid_jax.video.synthetic_file.AT_ONCE", 32 * 24 * 24)
    path = write_video(World(0, seconds=120), tmp_path / "long.mp4", size=(24, 24), fps=2)
    assert max(rendered) == 32 * 24 * 24 and sum(rendered) == 240 * 24 * 24
    assert Video(path).probe.num_frames == 240


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("a.avi", {}, "name is a.avi"),
        ("no/a.mp4", {}, "there is no folder .*no"),
        ("a.mp4", {"size": (63, 64)}, r"size is \(63, 64\), expected even"),
        ("a.mp4", {"size": (8, 8)}, r"size is \(8, 8\)"),
        ("a.mp4", {"fps": 0}, "fps is 0"),
        ("a.mp4", {"fps": "10"}, "fps is '10'"),
        ("a.mp4", {"crf": 60}, "crf is 60"),
    ],
)
def test_bad_files(tmp_path, name, options, text):
    with pytest.raises(OptionError, match=text):
        write_video(World(0, seconds=2), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())
