"""Files that are damaged or no videos: what decodes with one warning that counts it, or one sentence."""

import warnings

import numpy as np
import pytest
from PIL import Image

from longvid_jax.errors import OptionError, VideoError, VideoWarning
from longvid_jax.video import Video

SIZE = (24, 80)


def frames_and_warnings(video, window=8):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        windows = list(video.stream(window, SIZE))
    return windows, [str(w.message) for w in caught if w.category is VideoWarning]


@pytest.mark.parametrize(
    ("name", "fps", "counts", "samples"),
    [
        ("corrupted.mp4", 10, "decoded 28 of 50 frames", (28, 50)),
        ("corrupted.mp4", 1, "decoded 28 of 50 frames", (3, 5)),
        ("truncated_body.mp4", 100, "decoded 37 of 377 frames", (37, 38)),
        ("truncated_body.mp4", 1, "decoded 37 of 377 frames", (3, 4)),
    ],
)
def test_real_damaged_files(clips, name, fps, counts, samples):
    path = clips / "edge" / name
    video = Video(path, fps=fps)
    windows, messages = frames_and_warnings(video)
    assert len(messages) == 1
    assert str(path) in messages[0] and counts in messages[0]
    assert (video.num_decoded, len(video)) == samples
    assert sum(int(f.valid.sum()) for f in windows) == samples[0]
    np.testing.assert_allclose(
        np.concatenate([f.times[f.valid] for f in windows]), video.times[: samples[0]], atol=1e-6
    )


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "libx264"), ("v.webm", "libvpx")])
def test_cut_file(encode, shown, name, codec):
    path = encode(name, count=200, fps=25, codec=codec, gop=25)
    if name == "v.mp4":
        _index_first(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    video = Video(path, fps=5)
    windows, messages = frames_and_warnings(video)
    numbers = shown(windows)
    assert numbers == list(range(0, 5 * len(numbers), 5))
    assert len(numbers) < 40
    assert len(messages) == 1 and "of 200 frames" in messages[0]


def _index_first(path):
    """Rewrite an MP4 with its index before its pictures, so that it can still be opened when its end is cut off."""
    import av

    whole = path.with_suffix(".whole.mp4")
    path.rename(whole)
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)


def test_decoding_goes_on_at_the_next_keyframe(encode, shown):
    """Damage in the middle costs the rest of its group of pictures, and frames after it are at their true times."""
    import av

    path = encode("v.mp4", count=200, fps=25, gop=25, options={"bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    data = bytearray(path.read_bytes())
    start, size = packets[60]
    data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    video = Video(path, fps=25)
    windows, messages = frames_and_warnings(video)
    assert shown(windows) == [*range(60), *range(75, 200)]
    np.testing.assert_allclose(
        np.concatenate([f.times[f.valid] for f in windows]), np.array([*range(60), *range(75, 200)]) / 25, atol=1e-3
    )
    assert len(messages) == 1 and "decoded 185 of 200 frames" in messages[0] and "15 of the 200" in messages[0]


def test_sound_files_have_no_video_stream(sound_only):
    with pytest.raises(VideoError, match=r"sound\.mp4: has no video stream\.$"):
        Video(sound_only)


@pytest.mark.parametrize("name", ["empty.mp4", "not_a_video.mp4"])
def test_real_files_without_video(clips, name):
    with pytest.raises(VideoError, match=name):
        Video(clips / "edge" / name)


def test_not_videos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "noise.mp4").write_bytes(rng.integers(0, 256, 50_000, np.uint8).tobytes())
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "notes.txt").write_text("A text is no video. " * 50)
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "still.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "still.jpg")
    (tmp_path / "still.mp4").write_bytes((tmp_path / "still.png").read_bytes())
    for name, text in {
        "missing.mp4": "no such file",
        "noise.mp4": "not a video that FFmpeg can read",
        "empty.mp4": "the file is empty",
        "notes.txt": "has no video stream",
        "folder": "a folder without images",
        "still.png": "an image, expected a video",
        "still.jpg": "an image, expected a video",
        "still.mp4": "an image, expected a video",
    }.items():
        with pytest.raises(VideoError) as error:
            Video(tmp_path / name)
        message = str(error.value)
        assert str(tmp_path / name) in message and text in message and "\n" not in message


def test_nothing_decodes(encode):
    import av

    path = encode("v.mp4", count=20)
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    data = bytearray(path.read_bytes())
    for start, size in spans:
        data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"v\.mp4: no frame of it can be decoded\."):
        list(Video(path).stream(2, SIZE))


def test_broken_image_in_a_folder(tmp_path, drawn, shown):
    for i in range(4):
        Image.fromarray(drawn(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"broken")
    video = Video(tmp_path)
    windows, messages = frames_and_warnings(video)
    assert shown(windows) == [0, 1, 3]
    assert len(messages) == 1 and "decoded 3 of 4 frames" in messages[0]
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(VideoError, match="none of the 4 images"):
        Video(tmp_path)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_arrays_of_another_form(array):
    with pytest.raises(VideoError, match=r"expected uint8 \[T, H, W, 3\]"):
        Video(array)


@pytest.mark.parametrize("options", [{"fps": -1}, {"max_frames": 0}, {"sampler": "x"}, {"native_fps": 0}])
def test_bad_options(drawn, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Video(drawn(0)[None], **options)


def test_other_sources():
    with pytest.raises(OptionError, match="the video is of type int, expected a path or an array"):
        Video(3)
