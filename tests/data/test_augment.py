"""MA-LMM's sampling against NumPy oracles, frames from folders and files, and augmentation."""

import dataclasses
import json
import math
from fractions import Fraction

import av
import grain
import numpy as np
import pytest
from PIL import Image

from longvid_jax.data import augment
from longvid_jax.data.clips import Clip
from longvid_jax.data.malmm import BreakfastSource
from longvid_jax.errors import VideoError


def stored(folder, name, count, size=(16, 24)):
    """A folder of frames as MA-LMM stores them, the n-th of grey 2 n."""
    (folder / name).mkdir(parents=True)
    for n in range(count):
        Image.fromarray(np.full((*size, 3), 2 * n, np.uint8)).save(folder / name / f"frame{n + 1:06d}.png")


def film(path, count, rate):
    """A video file whose n-th frame has grey 2 n, as nearly as encoding leaves it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for n in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 2 * n, np.uint8), "rgb24")
            frame.pts, frame.time_base = n, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def greys(frames):
    """Which frames of `stored` these are."""
    assert (frames == frames[:, :1, :1, :1]).all()
    return (frames[:, 0, 0, 0] // 2).tolist()


def of_malmm(first, last, count, rng):
    """MA-LMM's training rule as its loop has it: a random frame in each segment of [first, last + 1)."""
    edges = np.linspace(first, last + 1, count + 1, dtype=int)
    return [
        int(start) if start == end else int(rng.integers(start, end))
        for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]


@pytest.mark.parametrize(("first", "last", "count"), [(0, 1922, 100), (0, 71, 80), (470, 600, 80), (3, 3, 4)])
def test_sampling_follows_malmm(first, last, count):
    seen = np.array([augment.drawn(first, last, count, np.random.default_rng(seed)) for seed in range(300)])
    oracle = np.array([of_malmm(first, last, count, np.random.default_rng(seed)) for seed in range(300)])
    np.testing.assert_array_equal(seen.min(0), oracle.min(0))  # 300 draws meet both ends of segments this short
    np.testing.assert_array_equal(seen.max(0), oracle.max(0))
    every = [first + k * (last - first) / (count - 1) for k in range(count)]
    np.testing.assert_array_equal(augment.spread(first, last, count), [round(k) for k in every])
    np.testing.assert_array_equal(augment.truncated(first, last, count), np.linspace(first, last, count, dtype=int))


def test_draws_are_uniform_in_each_segment():
    seen = np.array([augment.drawn(0, 29, 3, np.random.default_rng(seed)) for seed in range(3000)])
    for n in range(3):
        counts = np.bincount(seen[:, n] - 10 * n, minlength=10)
        assert len(counts) == 10
        assert (abs(counts - 300) < 5 * math.sqrt(3000 * 0.1 * 0.9)).all()


def test_a_folder_of_frames_is_read_at_its_rate(tmp_path):
    stored(tmp_path, "x", 15)
    clip = Clip(tmp_path, "x", 5, (8, 8))
    frames = clip()
    assert (frames.shape, frames.dtype) == ((5, 8, 8, 3), np.uint8)
    assert greys(frames) == [0, 4, 7, 10, 14]  # 3.5 and 10.5 go to the even one
    assert greys(dataclasses.replace(clip, last=11)()) == [0, 3, 6, 8, 11]
    assert greys(dataclasses.replace(clip, last=99)()) == greys(frames)
    assert greys(dataclasses.replace(clip, first=10, last=12, fps=3.0)()) == [10, 10, 11, 12, 12]
    assert greys(dataclasses.replace(clip, pick="truncated")()) == [0, 3, 7, 10, 14]


def test_folders_and_files_give_the_same_frames(tmp_path):
    stored(tmp_path / "frames", "x", 30)
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos/x.mp4", 90, 30)
    of_folder, of_file = (Clip(tmp_path / kind, "x", 7, (16, 24))() for kind in ("frames", "videos"))
    assert greys(of_folder) == [0, 5, 10, 14, 19, 24, 29]
    np.testing.assert_allclose(of_file.mean((1, 2, 3)), 6 * np.array(greys(of_folder)), atol=2)  # 3 frames for each


@pytest.mark.parametrize(("pick", "seed"), [("spread", None), ("drawn", (1,)), ("spread", (1,))])
def test_short_videos_repeat_frames(tmp_path, pick, seed):
    stored(tmp_path, "x", 3)
    assert greys(Clip(tmp_path, "x", 6, (8, 8), pick=pick, seed=seed)()) == [0, 0, 1, 1, 2, 2]


def test_training_draws_from_each_segment(tmp_path):
    stored(tmp_path, "x", 60)
    seen = [greys(Clip(tmp_path, "x", 5, (8, 8), 10, 40, pick="drawn", seed=(n,))()) for n in range(5)]
    edges = [10, 16, 22, 28, 34, 41]
    for picked in seen:
        assert all(start <= n < end for n, start, end in zip(picked, edges[:-1], edges[1:], strict=True))
    assert len(set(map(tuple, seen))) == 5


def bicubic(image, height, width):
    """Anti-aliased bicubic resizing (a = -1/2) in float64, one axis after the other."""

    def weights(old, new):
        scale = old / new
        wide = max(scale, 1.0)
        matrix = np.zeros((new, old))
        for i in range(new):
            for j in range(old):
                x = abs((j + 0.5 - (i + 0.5) * scale) / wide)
                if x < 1:
                    matrix[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
                elif x < 2:
                    matrix[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return matrix / matrix.sum(1, keepdims=True)

    # As PIL, which keeps whole levels in between.
    rows = np.clip(np.rint(np.einsum("xw,hwc->hxc", weights(image.shape[1], width), image)), 0, 255)
    return np.clip(np.rint(np.einsum("yh,hxc->yxc", weights(image.shape[0], height), rows)), 0, 255)


def test_one_crop_for_all_frames_resized_bicubically():
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8)
    mirrored = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        top, left, height, width = augment.random_box(40, 56, rng)
        mirrored.add(flip := rng.random() < 0.5)
        pixels = augment.augmented(frames, (24, 20), np.random.default_rng(seed))
        assert pixels.shape == (3, 24, 20, 3)
        for frame, seen in zip(frames, pixels, strict=True):
            expected = bicubic(frame[top : top + height, left : left + width].astype(float), 24, 20)
            np.testing.assert_allclose(seen, expected[:, ::-1] if flip else expected, atol=1)
    assert mirrored == {True, False}


def test_boxes_are_those_of_random_resized_crop():
    height, width = 256, 455
    boxes = np.array([augment.random_box(height, width, np.random.default_rng(seed)) for seed in range(4000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    share, ratio = h * w / (height * width), w / h
    assert 0.495 < share.min() and share.max() <= 1
    assert 0.74 < ratio.min() and ratio.max() < 1.35
    # Every place is as likely as any other, given the box's size.
    for place, room in ((top, height - h), (left, width - w)):
        there = place[room > 0] / room[room > 0]
        assert abs(there.mean() - 0.5) < 5 * there.std() / math.sqrt(len(there))


def test_boxes_that_never_fit_are_central():
    draws = np.random.default_rng(0)
    assert augment.random_box(100, 1000, draws) == (0, (1000 - 133) // 2, 100, 133)
    assert augment.random_box(1000, 100, draws) == ((1000 - 133) // 2, 0, 133, 100)


@pytest.mark.parametrize(
    ("size", "kept"), [((256, 340), (256, 340)), ((720, 1280), (256, 455)), ((640, 360), (455, 256)), ((9, 9), (9, 9))]
)
def test_frames_are_kept_small_before_the_crop(size, kept):
    assert augment.stored_size(*size) == kept


@pytest.fixture
def training(tmp_path):
    """A source of four clips of noise."""
    rng = np.random.default_rng(0)
    held = {}
    for n in range(4):
        (tmp_path / f"v{n}").mkdir()
        for i in range(12):
            noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
            noise.save(tmp_path / f"v{n}/frame{i + 1:06d}.png")
        held[f"v{n}"] = {"class_name": "tea", "frame_length": 12}
    (tmp_path / "train.json").write_text(json.dumps(held))
    return BreakfastSource(tmp_path / "train.json", tmp_path, 3, (8, 8), train=True)


def test_an_example_is_a_function_of_seed_and_index(training):
    again = dataclasses.replace(training)
    for i in range(4):
        np.testing.assert_array_equal(training[i].frames(), again[i].frames())
    other = dataclasses.replace(training, seed=43)
    assert all((training[i].frames() != other[i].frames()).any() for i in range(4))
    same = Clip(training.folder, "v0", 3, (8, 8), pick="drawn", seed=(42, 1))
    assert (same() != training[0].frames()).any()
    plain = dataclasses.replace(training, train=False)
    assert plain[0].frames.seed is None


def test_epochs_differ_behind_random_map(training):
    def endless(seed):
        return grain.MapDataset.source(training).seed(seed).shuffle().repeat().random_map(augment.redrawn)

    first, again, other = endless(1), endless(1), endless(2)
    frames = {n: first[n].frames() for n in (5, 0, 4, 1)}
    for n, pixels in frames.items():
        np.testing.assert_array_equal(again[n].frames(), pixels)
    epochs = [{first[n].id: first[n].frames.seed for n in range(4 * k, 4 * k + 4)} for k in range(2)]
    assert epochs[0].keys() == epochs[1].keys() == {f"v{n}" for n in range(4)}
    assert len({*epochs[0].values(), *epochs[1].values()}) == 8
    assert {other[n].frames.seed for n in range(4)}.isdisjoint(epochs[0].values())
    plain = dataclasses.replace(training, train=False)[0]
    assert augment.redrawn(plain, np.random.default_rng(0)).frames == plain.frames


def test_videos_that_cannot_be_read(tmp_path):
    with pytest.raises(VideoError, match=r"none does not exist, neither as a folder of frames nor as a video file\."):
        Clip(tmp_path, "none", 4, (8, 8))()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        Clip(tmp_path, "bad", 4, (8, 8))()
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="a folder without images"):
        Clip(tmp_path, "empty", 4, (8, 8))()
    stored(tmp_path, "short", 15)
    with pytest.raises(VideoError, match=r"short is 1\.5 seconds long, but the clip begins at 2\."):
        Clip(tmp_path, "short", 4, (8, 8), first=20)()
