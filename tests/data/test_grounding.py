"""ActivityNet Captions and DiDeMo in their own layouts, and what is wrong with others."""

import json

import numpy as np
import pytest

from longvid_jax.data.grounding import GroundingSource
from longvid_jax.errors import DataError, OptionError, VideoError
from longvid_jax.video import Video
from longvid_jax.video.synthetic import World, write_video

ACTIVITYNET = {
    "v_QOlSCBRmfWY": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 60.81], [9, 5], [56.26, 56.3], [80, 97.2]],
        "sentences": [
            "A young woman is seen standing in a room.",
            " The girl dances around the room",
            "No.",
            "She stops.",
            "x",
        ],
    },
    "v_long": {"duration": 300.4, "timestamps": [[0, 9.5]], "sentences": ["A man runs."]},
}
DIDEMO = [
    {
        "num_segments": 6,
        "description": "man stumbles",
        "dl_link": "https://example.org",
        "times": [[3, 3], [2, 3], [2, 2], [2, 3]],
        "video": "12@N01_345_678.avi",
        "annotation_id": 1,
    },
    {"num_segments": 6, "description": "a dog turns.", "times": [[0, 0]] * 4, "video": "b.mov", "annotation_id": 2},
    {"num_segments": 6, "description": "he falls", "times": [[5, 5]] * 4, "video": "12@N01_345_678.avi"},
]


def source(folder, held, **how):
    file = folder / "train.json"
    file.write_text(held if isinstance(held, str) else json.dumps(held))
    return GroundingSource(file, folder, **{"size": (56, 56), **how})


def asked(example) -> list[tuple[str, str]]:
    return [turn for (turn,) in example.conversations]


def test_activitynet(tmp_path):
    one, two = source(tmp_path, ACTIVITYNET, questions=2)
    assert asked(one) == [
        ("When does this happen: A young woman is seen standing in a room?", "from 1 to 20 seconds"),
        ("When does this happen: The girl dances around the room?", "from 17 to 61 seconds"),
    ]
    assert asked(two) == [
        ("When does this happen: She stops?", "from 56 to 57 seconds"),
        ("When does this happen: x?", "from 80 to 83 seconds"),  # which is where the video ends
    ]
    assert one.num_frames == two.num_frames == 83 and one.id != two.id
    # A video longer than its frames reach is asked nothing, unless there are more of them or they lie further apart.
    assert len(source(tmp_path, ACTIVITYNET, max_frames=301)) == len(source(tmp_path, ACTIVITYNET, fps=0.5)) == 2


def test_didemo(tmp_path):
    """Segments 2 to 3 are those that the four annotators agree on most."""
    one, two = source(tmp_path, DIDEMO)
    assert asked(one) == [
        ("When does this happen: man stumbles?", "from 10 to 20 seconds"),
        ("When does this happen: he falls?", "from 25 to 30 seconds"),
    ]
    assert asked(two) == [("When does this happen: a dog turns?", "from 0 to 5 seconds")]
    assert one.num_frames == 30


def test_didemo_a_line_each(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, DIDEMO)))
    assert len(GroundingSource(tmp_path / "train.jsonl", tmp_path, size=(56, 56))) == 2


@pytest.mark.parametrize(("how", "said"), [({"questions": 0}, "questions is 0"), ({"fps": 0}, "fps is 0, but must be")])
def test_options_that_are_refused(tmp_path, how, said):
    with pytest.raises(OptionError, match=said):
        source(tmp_path, ACTIVITYNET, **how)


def test_frame_n_is_that_of_second_n(tmp_path):
    """Also of a video that is longer than what is looked at, and of one that ends before."""
    for name, seconds in (("12@N01_345_678.avi.mp4", 36), ("b.mov.mp4", 5)):
        write_video(World(0, seconds=seconds), tmp_path / name, size=(56, 56), fps=4)
    for example, seconds in zip(source(tmp_path, DIDEMO), (30, 5), strict=True):
        frames = example.frames()
        path = tmp_path / f"{example.id.split('/')[0]}.mp4"
        np.testing.assert_array_equal(frames, Video(path).read(np.arange(float(seconds)), (56, 56)))
    with pytest.raises(VideoError, match="v_QOlSCBRmfWY does not exist"):
        source(tmp_path, ACTIVITYNET)[0].frames()


@pytest.mark.parametrize(
    ("held", "fault"),
    [
        ("[", "is no JSON"),
        ([], "has no video of 256 seconds or less"),
        ({"v": {"duration": 400, "timestamps": [[0, 1]], "sentences": ["x"]}}, "no video of 256 seconds or less"),
        ({"v": {"duration": 4, "timestamps": [[0, 1]], "sentences": []}}, "has 1 timestamps, but 0 sentences"),
        ({"v": {"duration": 4, "timestamps": [[2, 1]], "sentences": ["x"]}}, "has no video of 256 seconds or less"),
        (
            {"v": {"duration": 4, "timestamps": [[-2, 1]], "sentences": ["x"]}},
            "has the times .-2, 1.; expected a start",
        ),
        ({"v": {"duration": 4, "timestamps": [2], "sentences": ["x"]}}, "has the times 2; expected a start"),
        ({"v": {"timestamps": [], "sentences": []}}, "has no duration"),
        ({"v": {"duration": 4, "timestamps": 3}}, "has no list of timestamps"),
        ([{"video": "a", "description": "x"}], "entry 0 has no list of times"),
        ([{"video": "a", "description": "x", "times": []}], "entry 0 has no times"),
        ([{"video": "a", "times": [[0, 0]]}], "entry 0 has no description"),
        (["a"], "entry 0 is a JSON str"),
    ],
)
def test_other_layouts_are_refused(tmp_path, held, fault):
    with pytest.raises(DataError, match=fault):
        source(tmp_path, held)
