"""The timeline figure: which frames it shows, and that a whole file is written or none."""

import numpy as np
import pytest
from PIL import Image

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import timeline
from longvid_jax.video import Video

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def video():
    """5 seconds, upright format; frame i has brightness 50 i."""
    return Video(np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 40 * 20 * 3).reshape(5, 40, 20, 3))


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_writes_one_file(trace, video, tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    assert timeline.plot(trace, video, path) == path
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size > 5000


def test_size_and_colours(trace, video, tmp_path):
    with Image.open(timeline.plot(trace, video, tmp_path / "a.png")) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1440 and 500 < pixels.shape[0] < 900
    accent = np.array([int(timeline.ACCENT[i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(pixels.astype(int) - accent).sum(-1) < 12).sum() > 50  # dots on key frames
    for brightness in (0, 100, 200):  # the frames of the three key frames
        assert (pixels == brightness).all(-1).sum() > 1000


def test_without_dpselect(plain_trace, trace, video, tmp_path):
    with (
        Image.open(timeline.plot(plain_trace, video, tmp_path / "plain.png")) as plain,
        Image.open(timeline.plot(trace, video, tmp_path / "full.png")) as full,
    ):
        assert plain.height < full.height


def test_shows_the_key_frames_of_most_change(trace, plain_trace, monkeypatch):
    assert timeline._moments(trace).tolist() == [0, 2, 4]
    assert timeline._moments(plain_trace).tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(timeline, "THUMBNAILS", 2)
    assert timeline._moments(trace).tolist() == [0, 2]
    assert timeline._moments(plain_trace).tolist() == [0, 4]


def test_clock():
    assert [timeline.clock(s) for s in (0, 7.4, 187, 3599.6, 3723)] == ["0:00", "0:07", "3:07", "1:00:00", "1:02:03"]


@pytest.mark.parametrize("name", ["figure.gif", "figure", "missing/figure.png", "folder.png"])
def test_where_nothing_can_be_written(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OptionError, match=name):
        timeline.check(tmp_path / name)


def test_a_failure_leaves_what_was_there(trace, video, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "figure.png"
    path.write_bytes(b"the one before")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        timeline.plot(trace, video, path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"the one before"
