"""The timeline figure: which frames it shows, where things lie, and that a whole file is written or none."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import timeline
from longvid_jax.evaluate import timeline_panels as panels
from longvid_jax.evaluate import timeline_questions as asked
from longvid_jax.evaluate.timeline import Span
from longvid_jax.video import Video

MINUTE = panels.Axis(0.0, 60.0)


@pytest.fixture
def video():
    """5 seconds, upright format; frame i has brightness 50 i."""
    return Video(np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 40 * 20 * 3).reshape(5, 40, 20, 3))


@pytest.fixture
def draw(trace, video, tmp_path):
    """Draws a figure and returns its pixels, as int."""

    def draw(trace=trace, video=video, **options):
        with Image.open(timeline.plot(trace, video, tmp_path / "drawn.png", **options)) as image:
            return np.asarray(image.convert("RGB")).astype(int)

    return draw


def near(pixels, colour):
    """bool [H, W]: where the figure has a colour."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(pixels - rgb).sum(-1) < 6


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_writes_one_file(trace, video, tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    assert timeline.plot(trace, video, path) == path
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size > 5000


def test_size_and_colours(draw):
    pixels = draw()
    assert pixels.shape[1] == panels.WIDTH and 600 < pixels.shape[0] < 1200
    for brightness in (50, 150):  # of frames that are not shown
        assert (pixels == brightness).all(-1).sum() < 500
    for brightness in (0, 100, 200):  # of the frames of the three key frames
        assert (pixels == brightness).all(-1).sum() > 5000
    assert (pixels[:, :8] == 255).all() and (pixels[:, -8:] == 255).all()  # nothing is cut off


def test_dots_are_at_the_key_frames(draw):
    columns = np.flatnonzero(near(draw(), panels.ACCENT)[200:].sum(0))
    places = [int(columns[np.abs(columns - x) < 20].mean().round()) for x in panels.Axis(0, 5)(np.array([2.0, 4.0]))]
    assert places == pytest.approx(panels.Axis(0, 5)(np.array([2.0, 4.0])), abs=1)


def test_colours_are_what_was_kept(trace, draw):
    """Of patch 0 layer 1 keeps one of six tokens and layer 0 six; of patch 4 layer 1 keeps one and layer 0 two."""
    pixels = draw()
    x = panels.Axis(0, 5)(np.array([0.5, 4.5])).round().astype(int)
    bottom = pixels.shape[0] - 76
    shown = pixels[[bottom - 60, bottom - 20]][:, x]
    expected = panels.mix(panels.KEPT, np.array([[1 / 6, 1 / 6], [1, 1 / 3]])).astype(int)
    assert np.abs(shown - expected).max() <= 1


def test_bars_are_as_long_as_the_caches(draw):
    pixels = draw()[:110]
    kept, full = (near(pixels, colour).sum(1).max() for colour in (panels.KEPT[3], panels.FAINT))
    assert full == pytest.approx(260, abs=2) and kept == pytest.approx(130, abs=2)  # 2,000 of 4,000 bytes


def test_without_dpselect(plain_trace, draw):
    plain, full = draw(plain_trace), draw()
    assert plain.shape[0] == full.shape[0] - panels.CHANGE
    assert near(full, panels.ACCENT).any() and not near(plain, panels.ACCENT).any()


def test_shows_the_key_frames_of_most_change(trace, plain_trace, monkeypatch):
    assert timeline._moments(trace).tolist() == [0, 2, 4]
    assert timeline._moments(plain_trace).tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(timeline, "THUMBNAILS", 2)
    assert timeline._moments(trace).tolist() == [0, 2]
    assert timeline._moments(plain_trace).tolist() == [0, 4]


def test_frames_are_near_their_moments_and_apart():
    place = panels._side_by_side
    assert place(np.array([10.0, 200, 400]), 50, 0, 500).tolist() == [10, 200, 400]
    assert place(np.array([-20.0, 10, 490, 510]), 50, 0, 500).tolist() == [0, 50, 450, 500]
    assert place(np.array([1.0, 2, 3]), 50, 0, 100).tolist() == [0, 50, 100]


def test_questions(draw):
    """Each span is as long as it lasts, in the colour of its truth; without questions the lane takes no room."""
    questions = [Span("What?", 1, 2, True), Span("When?", 3, 4.5, False), Span("Who is it?", None, None, None)]
    pixels, without = draw(questions=questions), draw()
    assert pixels.shape[0] - without.shape[0] == asked.height([[], []])  # the first two share a row
    for span in questions:
        _, inside = asked.TRUTH[span.right]
        assert span.right is None or not near(without, inside).any()
        left, right = panels.Axis(0, 5)(span.start or 0), panels.Axis(0, 5)(span.end or 5)
        longest = near(pixels, inside).sum(1).max()
        assert longest == pytest.approx(right - left, abs=12)  # less its edge and round corners


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 1), (0, 1), (0, 1)],
        [(59.9, 60), (0, 0.01), (30, 30)],
        [(0, 60), (20, 40), (41, 59)],
        [(-5, 400), (70, 80), (50, 10)],  # not of this video
    ],
)
@pytest.mark.parametrize("label", ["", "?", "What is it?", "Which word is said on a day of rain? " * 30])
def test_questions_do_not_overlap(spans, label):
    rows = asked.rows([Span(label, *spans[i], (True, False, None)[i]) for i in range(3)], MINUTE)
    assert sum(map(len, rows)) == 3
    for row in rows:
        reaches = sorted(placed.reach for placed in row)
        assert reaches[0][0] >= panels.LEFT and reaches[-1][1] <= panels.RIGHT + 1
        assert all(one[1] < other[0] for one, other in zip(reaches, reaches[1:], strict=False))


def test_long_names_are_shortened(draw, video):
    short = draw()
    video.name = "folder/" + "\N{CJK UNIFIED IDEOGRAPH-6771}\n\udcff" * 2000 + ".mp4"
    long = draw()
    assert long.shape == short.shape
    bars = slice(None), slice(1180, None)
    assert (long[:110][bars] == short[:110][bars]).all() and (long != short).any()


def test_a_single_patch(trace, draw, video):
    chunk = trace.chunks[0]
    cut = {name: getattr(chunk, name)[:, :1] for name in ("times", "peaks", "change")}
    one = dataclasses.replace(chunk, patches=np.array([1]), kept=np.array([1]), **cut)
    pixels = draw(dataclasses.replace(trace, chunks=(one,), source=tuple(s[:, :5] for s in trace.source)))
    assert not near(pixels, panels.ACCENT)[200:, : panels.RIGHT - 200].any()  # nothing before it that it differs from


def test_hours(trace):
    """What a pixel shows of many patches is the most that changes and the mean of what was kept."""
    axis = panels.Axis(0.0, 10800.0)
    assert [axis.say(tick) for tick in axis.ticks()] == "0:00 30:00 1:00:00 1:30:00 2:00:00 2:30:00 3:00:00".split()
    times, change = np.arange(10800.0), np.full(10800, 0.01)
    change[5000] = 1
    share = np.zeros((2, 10800))
    share[0, ::2] = 1  # every other second
    canvas = panels.Canvas(panels.WIDTH, 800)
    panels.change(canvas, axis, 0, times, change, change > 0.5)
    panels.kept(canvas, axis, 400, np.append(times, 10800), share)
    pixels = np.asarray(canvas.finished()).astype(int)
    x, y = round(float(axis(5000))), round(float(panels.level(0, change)[5000]))
    assert near(pixels, panels.ACCENT)[y, x] and (pixels[y + 20 : y + 100, x - 1 : x + 2].min((1, 2)) < 150).all()
    row = pixels[400 + panels.TITLE + 60, panels.LEFT + 5 : panels.RIGHT - 5]
    assert np.ptp(row, axis=0).max() < 60  # not black and white


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (0.12, ["0.0 s", "0.1 s"]),
        (3, "0.0 s,0.5 s,1.0 s,1.5 s,2.0 s,2.5 s,3.0 s".split(",")),
        (5, 11),
        (10, 11),
        (4e5, 6),
    ],
)
def test_ticks(end, expected):
    axis = panels.Axis(0.0, end)
    ticks = [axis.say(tick) for tick in axis.ticks()]
    assert (ticks if isinstance(expected, list) else len(ticks)) == expected
    assert len(set(ticks)) == len(ticks)


def test_clock():
    assert [timeline.clock(s) for s in (0, 7.4, 187, 3599.6, 3723)] == ["0:00", "0:07", "3:07", "1:00:00", "1:02:03"]


@pytest.mark.parametrize("name", ["figure.gif", "figure.svg", "figure", "missing/figure.png", "folder.png"])
def test_where_nothing_can_be_written(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OptionError, match=name):
        timeline.check(tmp_path / name)


def test_a_failure_leaves_what_was_there(trace, video, tmp_path, monkeypatch):
    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "figure.png"
    path.write_bytes(b"the one before")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        timeline.plot(trace, video, path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"the one before"
