"""Users' own data in both layouts, and what is wrong with it."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest

from longvid_jax.data.conversations import ConversationSource
from longvid_jax.errors import DataError, VideoError

LLAVA = {
    "id": "7",
    "video": "a/clip.mp4",
    "duration": 3.0,
    "conversations": [
        {"from": "human", "value": "<video>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Grey."},
    ],
}
CHATGPT = {"video_id": "a/clip", "q": "What is it?", "a": "A cat."}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    with av.open(str(tmp_path / "a/clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 8 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return tmp_path


def source(folder, entries, name="data.json", **how):
    file = folder / name
    text = "\n".join(map(json.dumps, entries)) if name.endswith("l") else json.dumps(entries)
    file.write_text(text if isinstance(entries, list | dict) else entries)
    return ConversationSource(file, folder, (56, 56), **how)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_both_layouts(folder, name):
    first, second = source(folder, [LLAVA, CHATGPT], name)
    assert first.conversations == ((("What is it?", "A cat."), ("Which colour?", "Grey.")),)
    assert second.conversations == ((("What is it?", "A cat."),),)
    assert (first.id, second.id) == ("7", "a/clip")
    assert (first.num_frames, second.num_frames) == (6, 32)
    frames = first.frames()
    assert frames.shape == (6, 56, 56, 3)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), 40 * np.arange(6), atol=4)
    np.testing.assert_array_equal(second.frames(), frames)


def test_no_more_frames_than_asked_for(folder):
    (example,) = source(folder, [CHATGPT], max_frames=4)
    assert example.num_frames == len(example.frames()) == 4


def test_videos_that_cannot_be_read(folder):
    (folder / "bad.mp4").write_bytes(b"no video")
    for name, text in {"none.mp4": "none.mp4 does not exist", "bad.mp4": "bad.mp4"}.items():
        (example,) = source(folder, [{**LLAVA, "video": name}])
        with pytest.raises(VideoError, match=text):
            example.frames()


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a": 1}, "holds a JSON dict"),
        ([1], "entry 0 is a JSON int"),
        ([CHATGPT, {"video": "x"}], "entry 1 has neither"),
        ([{**LLAVA, "conversations": LLAVA["conversations"][1:]}], "is spoken by gpt, human, gpt"),
        ([{**LLAVA, "conversations": []}], "is spoken by nobody"),
        ([{**LLAVA, "conversations": [{"from": "human"}]}], "lacks from or value"),
    ],
)
def test_other_layouts(folder, entries, says):
    with pytest.raises(DataError, match=says):
        source(folder, entries)


def test_files_that_do_not_do(folder):
    (folder / "broken.json").write_text("[{")
    with pytest.raises(DataError, match="broken.json is no JSON"):
        ConversationSource(folder / "broken.json", folder, (56, 56))
    with pytest.raises(DataError, match="absent.json cannot be read"):
        ConversationSource(folder / "absent.json", folder, (56, 56))
