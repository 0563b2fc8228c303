"""Streams of self-made and real videos: what is shown when, windows, rotation, threads."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvid_jax.errors import OptionError, VideoError
from longvid_jax.video import Video, decode, stream_batch
from longvid_jax.video.decode import MIN_JUMP

SIZE = (24, 80)
UNEVEN = [0, 40, 100, 500, 540, 1300, 1340, 2000, 2900, 2950, 3000]  # milliseconds


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "longvid-decode"]


@pytest.mark.parametrize("start", [0, 700])
@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "libx264"), ("v.mkv", "libx264"), ("v.webm", "libvpx")])
def test_true_times_of_a_variable_frame_rate(encode, shown, name, codec, start):
    video = Video(encode(name, UNEVEN, codec=codec, start=start), fps=1000)
    assert video.probe.num_frames == len(video) == len(UNEVEN)
    np.testing.assert_allclose(video.times, np.array(UNEVEN) / 1000, atol=1e-3)
    windows = list(video.stream(4, SIZE))
    assert shown(windows) == list(range(len(UNEVEN)))
    np.testing.assert_allclose(np.concatenate([f.times[f.valid] for f in windows]), np.array(UNEVEN) / 1000, atol=1e-3)
    assert shown(Video(video.name, fps=1).stream(4, SIZE)) == [0, 4, 7, 10]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts", "v.avi"])
@pytest.mark.parametrize("gop", [1, 12, 60, 600])
def test_sparse_and_dense_samples_show_what_they_should(encode, shown, shown_number, name, gop):
    codec = "mpeg4" if name == "v.avi" else "libx264"
    path = encode(name, count=400, fps=25, codec=codec, gop=gop)
    for options in (
        {"fps": 25},
        {"fps": 2},
        {"max_frames": 7, "sampler": "linspace"},
        {"max_frames": 40, "sampler": "mid"},
    ):
        video = Video(path, **options)
        assert video.probe.num_frames == 400
        assert abs(video.probe.fps - 25) < 0.1
        windows = list(video.stream(16, SIZE))
        assert shown(windows) == video.indices.tolist()
        np.testing.assert_allclose(np.concatenate([f.times[f.valid] for f in windows]), video.indices / 25, atol=2e-3)
        assert video.num_decoded == len(video) and not video.report.damaged
        if len(video) == 7 and gop == 12 and name != "v.avi":
            assert video.report.frames < 7 * (12 + MIN_JUMP)  # it jumped
    assert [shown_number(p) for p in Video(path).read([9.0, 0.01, 15.9, 9.0], SIZE)] == [225, 0, 397, 225]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts"])
def test_a_jump_lands_on_its_keyframe(encode, name):
    """And not one before, whose frames would all be decoded in vain."""
    path = str(encode(name, count=400, fps=25, gop=60))
    index = decode.read_index(path)
    assert len(index.keys) > 5
    with decode.opened(path) as (container, stream):
        for key in (5, 2, 3):
            packet = next(decode._packets_from(container, stream, index, key))
            assert packet.pts == index.pts[index.keys[key]]


def test_raw_stream_without_times(encode, shown):
    video = Video(encode("v.h264", count=60, fps=25, gop=20), fps=5)
    assert video.probe.num_frames == 60
    assert shown(video.stream(8, SIZE)) == list(range(0, 60, 5))


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation(encode, rotation):
    stored = Video(encode("stored.mp4", count=3))
    video = Video(encode("turned.mp4", count=3, rotation=rotation))
    turns = rotation // 90
    upright = (48, 160) if turns == 2 else (160, 48)
    assert (video.probe.height, video.probe.width) == upright
    assert video.probe.rotation == rotation
    (expected,), (got,) = stored.stream(1, (48, 160)), video.stream(1, upright)
    np.testing.assert_array_equal(got.pixels[0, 0], np.rot90(expected.pixels[0, 0], turns))


def test_windows_are_padded_and_masked(drawn):
    pixels = np.stack([drawn(i) for i in range(5)])
    windows = list(Video(pixels, native_fps=4, fps=4).stream(3, pixels.shape[1:3]))
    assert [f.valid.tolist() for f in windows] == [[[True] * 3], [[True, True, False]]]
    assert [f.times.tolist() for f in windows] == [[[0, 0.25, 0.5]], [[0.75, 1, 0]]]
    assert (
        windows[0].pixels.dtype == np.uint8 and windows[0].times.dtype == np.float32 and windows[0].valid.dtype == bool
    )
    np.testing.assert_array_equal(np.concatenate([f.pixels[0] for f in windows])[:5], pixels)
    assert not windows[1].pixels[0, 2].any()


def test_array_at_its_own_rate_gives_every_frame(drawn):
    pixels = np.stack([drawn(i) for i in range(6)])
    video = Video(pixels)
    assert video.times.tolist() == [0, 1, 2, 3, 4, 5]
    assert Video(pixels, native_fps=10, fps=5).indices.tolist() == [0, 2, 4]


def test_folder_of_images_in_natural_order(tmp_path, drawn, shown):
    for i in range(12):
        Image.fromarray(drawn(i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    video = Video(tmp_path, native_fps=2)
    assert (video.probe.num_frames, video.probe.duration, video.probe.codec) == (12, 6.0, "images")
    assert shown(video.stream(5, SIZE)) == list(range(12))
    assert video.times[-1] == 5.5


def test_images_are_resized_as_pil_does(drawn):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 40, 52, 3), np.uint8)
    (frames,) = Video(pixels).stream(1, (28, 84))
    np.testing.assert_array_equal(
        frames.pixels[0, 0], Image.fromarray(pixels[0]).resize((84, 28), Image.Resampling.BICUBIC)
    )


def test_batch_of_different_lengths(encode, shown, drawn):
    videos = [
        Video(encode("a.mp4", count=50), fps=5),
        Video(np.stack([drawn(i) for i in range(3)])),
        Video(encode("b.mp4", count=20), fps=5),
    ]
    windows = list(stream_batch(videos, 4, SIZE))
    assert [f.pixels.shape for f in windows] == [(3, 4, *SIZE, 3)] * 3
    assert [f.valid.sum(1).tolist() for f in windows] == [[4, 3, 4], [4, 0, 0], [2, 0, 0]]
    for row, video in enumerate(videos):
        alone = list(video.stream(4, SIZE))
        for i, frames in enumerate(windows):
            for field in ("pixels", "times", "valid"):
                expected = getattr(alone[i], field)[0] if i < len(alone) else 0
                np.testing.assert_array_equal(
                    getattr(frames, field)[row], np.broadcast_to(expected, getattr(frames, field)[row].shape)
                )
    assert not threads()


def test_closing_early_stops_the_thread_and_closes_the_file(encode):
    path = encode("v.mp4", count=500)
    stream = Video(path, fps=25).stream(2, SIZE)
    assert not threads()
    next(stream)
    assert len(threads()) == 1
    assert any(path.samefile(fd) for fd in _open_files())
    stream.close()
    assert not threads()
    assert not any(path.samefile(fd) for fd in _open_files())
    batch = stream_batch([Video(path), Video(path)], 2, SIZE)
    next(batch)
    batch.close()
    assert not threads()


def _open_files():
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    return [fd for fd in folder.iterdir() if fd.exists()]


def test_errors_on_the_thread_reach_the_consumer(encode, monkeypatch):
    def broken(*_):
        yield 0, np.zeros((*SIZE, 3), np.uint8)
        raise RuntimeError("from the thread")

    monkeypatch.setattr(decode, "decode", broken)
    with pytest.raises(RuntimeError, match="from the thread"):
        list(Video(encode("v.mp4", count=10)).stream(1, SIZE))
    assert not threads()


PROGRAM = """
    import sys, time
    from longvid_jax.video import Video
    stream = Video(sys.argv[1], fps=25).stream(1, (24, 80))
    next(stream)
    print("streaming", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


@pytest.mark.parametrize("how", ["exit", "wait"])
def test_a_program_ends_with_a_stream_open(encode, how):
    """At its own end, and at Ctrl-C."""
    path = encode("v.mp4", count=500)
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path), how]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "streaming\n"
        if how == "wait":
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == (0 if how == "exit" else -signal.SIGINT), errors
    assert "KeyboardInterrupt" in errors if how == "wait" else not errors


@pytest.mark.parametrize(
    ("window", "size", "text"),
    [(0, (24, 80), "window is 0"), (2, (0, 80), r"size is \(0, 80\)"), (2, (24,), r"size is \(24,\)")],
)
def test_bad_windows(drawn, window, size, text):
    with pytest.raises(OptionError, match=text):
        Video(drawn(0)[None]).stream(window, size)
    with pytest.raises(OptionError, match=text):
        stream_batch([Video(drawn(0)[None])], window, size)


@pytest.mark.parametrize(
    ("name", "size", "frames", "duration", "codec"),
    [
        ("edge/av1.mkv", (640, 360), 125, 5.0, "av1"),
        ("edge/h265.mp4", (128, 128), 10, 1.0, "hevc"),
        ("edge/video_90.mov", (320, 568), 3, 0.1, "h264"),
        ("edge/no_duration.webm", (1280, 720), 74, 4.938, "vp9"),
        ("big_buck_bunny_30s_vp8_vorbis.webm", (1280, 720), 720, 30.0, "vp8"),
        ("cars_topdown_30s_aac.mp4", (768, 432), 377, 30.16, "h264"),
        ("bottles_40s.mp4", (640, 360), 1189, 39.855, "h264"),
        ("haystack_10min.mp4", (320, 180), 6000, 600.0, "h264"),
    ],
)
def test_real_clips(clips, name, size, frames, duration, codec):
    video = Video(clips / name, fps=100, max_frames=5)
    probe = video.probe
    assert ((probe.width, probe.height), probe.num_frames, probe.codec) == (size, frames, codec)
    assert probe.duration == pytest.approx(duration, abs=2e-3)
    windows = list(video.stream(2, (56, 56)))
    assert sum(int(f.valid.sum()) for f in windows) == len(video) == min(frames, 5)
    assert max(f.pixels[0, i].std() for f in windows for i in np.flatnonzero(f.valid[0])) > 2


def test_real_clip_sparse_equals_sequential(clips):
    video = Video(clips / "haystack_10min.mp4", fps=0.05)
    sparse = np.concatenate([f.pixels[f.valid] for f in video.stream(8, (90, 160))])
    assert video.report.frames < 1500  # of 6000: it jumped
    dense = Video(clips / "haystack_10min.mp4", fps=10)
    rows = [p for f in dense.stream(64, (90, 160)) for p in f.pixels[f.valid]]
    np.testing.assert_array_equal(sparse, np.stack([rows[i] for i in video.indices]))


def test_a_files_content(encode):
    path = encode("v.mp4", count=20)
    whole, content = Video(path), Video(path.read_bytes())
    assert content.probe == whole.probe
    one, other = (next(iter(video.stream(20, (32, 32)))) for video in (whole, content))
    np.testing.assert_array_equal(one.pixels, other.pixels)
    assert content.name.endswith("encoded bytes")
    for damaged, says in ((b"", "0 encoded bytes: the file is empty"), (b"x" * 99, "99 encoded bytes: not a video")):
        with pytest.raises(VideoError, match=says):
            Video(damaged)
