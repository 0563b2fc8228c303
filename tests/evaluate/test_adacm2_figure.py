"""The figure of what AdaCM2 holds: colours lie where and when tokens were kept."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from longvid_jax.evaluate import adacm2_figure, timeline
from longvid_jax.evaluate import timeline_panels as panels
from longvid_jax.evaluate.timeline import Span
from longvid_jax.systems.results import AdaCM2Trace
from longvid_jax.video import Video

FRAMES, GRID, TOKENS = 5, (2, 3), 7
HELD = (  # (frame, token) of each layer
    [(0, 1), (0, 2), (0, 3), (4, 0), (4, 1), (4, 6)],
    [(2, 6), (3, 6), (4, 6)],
)


@pytest.fixture
def trace():
    source = np.full((2, 1, 10), -1, np.int32)
    for layer, tokens in enumerate(HELD):
        source[layer, 0, : len(tokens)] = [frame * TOKENS + token for frame, token in tokens]
    return AdaCM2Trace(
        frames=np.array([FRAMES]),
        grid=GRID,
        capacity=10,
        cache_bytes=2000,
        cache_bytes_uncompressed=7000,
        length=np.array([[6], [3]]),
        source=source,
        times=np.arange(FRAMES, dtype=np.float32)[None],
    )


@pytest.fixture
def draw(trace, tmp_path):
    video = Video(np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 40 * 60 * 3).reshape(FRAMES, 40, 60, 3))

    def draw(trace=trace, **options):
        path = tmp_path / "drawn.png"
        assert timeline.plot(trace, video, path, **options) == path and list(tmp_path.iterdir()) == [path]
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")).astype(int)

    return draw


def test_colours_are_what_is_held_when(trace, draw):
    pixels = draw()
    bottom = pixels.shape[0] - adacm2_figure._maps_height(trace) - 76
    y = np.array([bottom - 60, bottom - 20]).round().astype(int)  # of layers 1 and 0
    x = panels.Axis(0, FRAMES)(np.arange(FRAMES) + 0.5).round().astype(int)
    share = np.array([[0, 0, 1, 1, 1], [3, 0, 0, 0, 3]]) / 3  # of the most, which is 3 of 7
    assert np.abs(pixels[y][:, x] - panels.mix(panels.KEPT, share**0.5)).max() <= 1


def test_maps_are_what_is_held_where(trace, draw):
    pixels = draw()
    _, wide, tall = adacm2_figure._maps_size(2, GRID)
    top = pixels.shape[0] - adacm2_figure._maps_height(trace) + panels.TITLE
    share = np.array([[2, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 6]]).reshape(2, *GRID) / 6  # of what a layer holds
    for layer in range(2):
        left = panels.LEFT + layer * (wide + adacm2_figure.BETWEEN)
        x = (left + (np.arange(3) + 0.5) * wide / 3).round().astype(int)
        y = (top + (np.arange(2) + 0.5) * tall / 2).round().astype(int)
        assert np.abs(pixels[y][:, x] - panels.mix(panels.KEPT, share[layer])).max() <= 1


def test_bars_are_as_long_as_the_caches(draw):
    pixels = draw()[:110]
    rgb = [np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in (panels.KEPT[3], panels.FAINT)]
    kept, full = ((np.abs(pixels - colour).sum(-1) < 6).sum(1).max() for colour in rgb)
    assert full == pytest.approx(260, abs=2) and kept == pytest.approx(260 * 900 / 7000, abs=2)  # 9 of 20 places


def test_shows_the_moments_of_which_most_is_held():
    share = np.array([0, 5, 4, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 9])
    assert adacm2_figure.moments(share, 2).tolist() == [1, 15]
    assert adacm2_figure.moments(share, 3).tolist() == [1, 7, 15]  # 2 is next to 1
    assert adacm2_figure.moments(share[:2], 7).tolist() == [0, 1]


@pytest.mark.parametrize(("layers", "grid"), [(1, (1, 1)), (6, (16, 16)), (40, (9, 16))])
def test_any_number_of_layers_and_patches(trace, draw, layers, grid):
    """Nothing is cut off, and questions take a lane of their own."""
    some = dataclasses.replace(
        trace, grid=grid, length=np.full((layers, 1), 1), source=np.tile(trace.source[:1, :, :1] % 2, (layers, 1, 1))
    )
    pixels = draw(some)
    assert (pixels[:, :8] == 255).all() and (pixels[:, -8:] == 255).all() and (pixels[-8:] == 255).all()
    assert draw(some, questions=[Span("What?", 1, 2, True)]).shape[0] > pixels.shape[0]
