"""Videos made on the spot whose frames show their own number, as black and white bars that survive compression."""

from fractions import Fraction

import av
import numpy as np
import pytest

BITS = 10
SIZE = (48, 16 * BITS)  # height, width


def draw(number: int) -> np.ndarray:
    """uint8 [48, 160, 3] with the number's bits as bars, the lowest on the left."""
    bits = (number >> np.arange(BITS)) & 1
    return np.broadcast_to(np.repeat(bits * 200 + 28, 16)[None, :, None], (*SIZE, 3)).astype(np.uint8)


def number(pixels: np.ndarray) -> int:
    """The number that a frame shows, at any size."""
    bars = pixels.reshape(pixels.shape[0], BITS, -1, 3).mean((0, 2, 3))
    return int(((bars > 128) << np.arange(BITS)).sum())


def encode_video(
    path, times=None, *, count=None, fps=25, codec="libx264", gop=50, rotation=None, start=0, options=None
):
    """Write a video whose frame i shows i at times[i] milliseconds (or i / fps seconds)."""
    times = [round(1000 * i / fps) for i in range(count)] if times is None else times
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", gop
        if codec != "mpeg4":
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(i), "rgb24")
            frame.pts, frame.time_base = (
                (i, Fraction(1, fps)) if codec == "mpeg4" else (time + start, Fraction(1, 1000))
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def encode_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def encode(tmp_path):
    return lambda name, *args, **kwargs: encode_video(tmp_path / name, *args, **kwargs)


@pytest.fixture
def sound_only(tmp_path):
    return encode_sound(tmp_path / "sound.mp4")


@pytest.fixture
def shown():
    """The numbers that the valid frames of windows show, in order."""
    return lambda windows: [number(f.pixels[0, i]) for f in windows for i in np.flatnonzero(f.valid[0])]


@pytest.fixture
def shown_number():
    return number


@pytest.fixture
def drawn():
    return draw
