"""The canvas: text that always can be drawn and fits, boxes and colours where they were asked for."""

import numpy as np
import pytest

from longvid_jax.evaluate.canvas import Canvas, legible, mix, shorten, text_width


def test_legible():
    assert legible("Caf\u00e9 2\u00b2 a \u00b7 b") == "Cafe 22 a \u00b7 b"
    assert legible("\u6771\n\udcff\x1b") == "????"


@pytest.mark.parametrize("room", [0, 30, 60, 200, 1000])
def test_shorten(room):
    text = "A film with a long name.mp4"
    short = shorten(text, 24, room)
    assert text_width(short, 24) <= room or short == "..."
    if room == 200:
        assert short.startswith("A film") and short.endswith(".mp4")
    if room == 1000:
        assert short == text


def test_text_is_where_it_was_put():
    canvas = Canvas(200, 60)
    canvas.text((180, 40), "Hxl", 30, "#000000", "rs")
    rows, columns = np.nonzero(np.asarray(canvas.finished().convert("L")) < 128)
    assert rows.max() == pytest.approx(39, abs=1) and columns.max() == pytest.approx(178, abs=2)
    assert columns.min() == pytest.approx(180 - text_width("Hxl", 30), abs=4)


def test_boxes_have_their_size():
    canvas = Canvas(20, 10)
    canvas.box((2, 3, 7, 9), "#000000")
    canvas.box((10, 0, 10, 10), "#000000")  # as thin as can be seen
    canvas.picture((12, 0, 18, 10), np.zeros((1, 2, 3), np.uint8))
    dark = np.asarray(canvas.finished().convert("L")) == 0
    assert dark[3:9, 2:7].all() and dark[:, 10].all() and dark[:, 12:18].all() and dark.sum() == 30 + 10 + 60


def test_mix():
    mixed = mix(("#000000", "#ff0000", "#ffffff"), np.array([[0, 0.25], [0.5, 1]]))
    assert mixed.tolist() == [[[0, 0, 0], [128, 0, 0]], [[255, 0, 0], [255, 255, 255]]]
    assert mixed.dtype == np.uint8
