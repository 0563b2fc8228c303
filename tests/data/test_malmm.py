"""The fine-tuning benchmarks in their official layouts, and what is wrong with others."""

import dataclasses
import json

import pytest

from longvid_jax.data.malmm import (
    BreakfastSource,
    CaptionSource,
    CoinSource,
    LvuSource,
    QuestionSource,
    caption_text,
    question_text,
    window_starts,
    words,
)
from longvid_jax.errors import DataError, OptionError

# --- rows in the official layouts -------------------------------------------------------------------------------------

LVU_JSON = {
    "0Ij2veeSsE4": {
        "subset": "test",
        "duration": 162,
        "num_frames": 1923,
        "director": "steven",
        "director_answer": "(a)",
    },
    "5v5JjUZpAPk": {
        "subset": "test",
        "duration": 42,
        "num_frames": 717,
        "director": "steven",
        "director_answer": "(a)",
        "way_speaking": "explain",
        "way_speaking_answer": "(a)",
    },
}
DIRECTORS = "class_id class_name youtube_id imdb_id\n0 nm0000229 0Ij2veeSsE4 tt0407304\n7 nm0001392 -x_1 tt0087469\n"
WRITERS = "class_id class_name youtube_id imdb_id\n0 \\N 0QNpXi4k5eU tt2767266\n"
DURATIONS = "videoid,duration\n0Ij2veeSsE4,162\n-x_1,76\n0QNpXi4k5eU,119\n"
BREAKFAST_CSV = """file_name,duration,action,class_id
P47-cam01-P47_cereals,46,cereals,0
P28-cam01-P28_cereals,50,cereals,0
P47-cam01-P47_friedegg,160,friedegg,4
P47-cam01-P47_salat,269,salat,9
"""
BREAKFAST_JSON = {
    "P47-cam01-P47_friedegg": {"duration": 160, "frame_length": 12, "class_name": "fried egg", "class_label": 4}
}
COIN_JSON = {
    "database": {
        "LtRSn-ntcLY": {
            "duration": 131.03,
            "class": "ReplaceCDDriveWithSSD",
            "recipe_type": 131,
            "subset": "training",
            "start": 57.0,
            "end": 120.0,
            "annotation": [{"id": "212", "segment": [60.0, 69.0], "label": "take out the laptop CD drive"}],
        },
        "AfiVmAjfTNs": {"class": "MakeSandwich", "subset": "training"},
        "x2": {"class": "MakeRJ45Cable", "subset": "testing"},
    }
}
COCO = {
    "images": [{"id": "video7010"}, {"id": 3, "file_name": "video7011"}],
    "annotations": [
        {"image_id": "video7010", "caption": "A man is filling up a bag.", "id": 0},
        {"image_id": 3, "caption": "a cake", "id": 1},
        {"image_id": "video7010", "caption": "someone cooks", "id": 2},
    ],
}
YOUCOOK2 = {
    "xHr8X2Wpmno_0047_0060": {
        "video": "xHr8X2Wpmno",
        "segment": "xHr8X2Wpmno_0047_0060",
        "id": 0,
        "duration": 206.86,
        "start_time": 47,
        "end_time": 60,
        "frame_length": 2070,
        "recipe": "fattoush",
        "caption": "pick the ends off the verdalago",
    }
}
MSVD = {
    "0": {"image_id": "bQ_162_169.avi", "caption": "a man", "id": 0, "video": "bQ_162_169", "frame_length": 72},
    "1": {"image_id": "bQ_162_169.avi", "caption": "a bag", "id": 1, "video": "bQ_162_169", "frame_length": 72},
}
QUESTIONS = {
    "0000000": {
        "answer": "someone",
        "question": "Who opened the (big) box?",
        "answer_type": "who",
        "question_id": "0000000",
        "dataset": "msvd",
        "video": "jfrrO5K_vKM_55_65",
        "frame_length": 102,
    }
}


def written(folder, name, held):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(held if isinstance(held, str) else json.dumps(held))
    return file


def picked(source):
    """The rule that chooses the frames of all its clips."""
    (pick,) = {source[i].frames.pick for i in range(len(source))}
    return pick


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_lvu_in_the_layout_of_malmm(tmp_path):
    file = written(tmp_path, "test.json", LVU_JSON)
    source = LvuSource(file, tmp_path, task="director")
    starts = [0, 20, 40, 60]
    assert [example.id for example in source] == [*(f"0Ij2veeSsE4_{start}" for start in starts), "5v5JjUZpAPk_0"]
    for example in source:
        assert example.conversations == ((("what is the director of the movie?", "steven"),),)
        assert (example.num_frames, example.size, example.tags) == (100, (224, 224), ("director",))
    places = [(example.frames.first, example.frames.last) for example in source]
    assert places == [(0, 990), (200, 1190), (400, 1390), (600, 1590), (0, 420)]
    assert [picked(dataclasses.replace(source, train=train)) for train in (False, True)] == ["spread", "spread"]
    short = written(tmp_path, "short.json", {"a": {**LVU_JSON["0Ij2veeSsE4"], "num_frames": 500}})
    (example,) = LvuSource(short, tmp_path, task="director")  # of the 162 seconds there are 50
    assert (example.frames.first, example.frames.last) == (0, 499)
    (speaking,) = LvuSource(file, tmp_path, task="way_speaking", split="test")
    assert speaking.conversations == ((("what is the way_speaking of the movie?", "explain"),),)


def test_lvu_in_its_own_layout(tmp_path):
    written(tmp_path, "lvu_1.0/lvu_durations.csv", DURATIONS)
    directors = LvuSource(written(tmp_path, "lvu_1.0/director/test.csv", DIRECTORS), tmp_path, task="director")
    assert [example.id for example in directors] == [*(f"0Ij2veeSsE4_{start}" for start in (0, 20, 40, 60)), "-x_1_0"]
    assert [example.conversations[0][0][1] for example in directors] == ["steven"] * 4 + ["peter"]
    assert (directors[4].frames.first, directors[4].frames.last) == (0, 760)
    (writer,) = LvuSource(written(tmp_path, "lvu_1.0/writer/test.csv", WRITERS), tmp_path, task="writer")
    assert writer.conversations[0][0][1] == "unknown"


def test_windows_are_as_many_as_the_closed_form_says():
    for window, stride in ((100, 20), (10, 10), (10, 30), (7, 3)):
        for seconds in range(1, 400):
            starts = window_starts(seconds, window, stride)
            assert len(starts) == 1 + max(0, (seconds - window) // stride)
            assert starts == [stride * n for n in range(len(starts))]
            assert len(starts) == 1 or starts[-1] + window <= seconds < starts[-1] + window + stride


def test_breakfast(tmp_path):
    source = BreakfastSource(written(tmp_path, "test.csv", BREAKFAST_CSV), tmp_path)
    assert [example.id for example in source] == [f"P47-cam01-P47_{what}" for what in ("cereals", "friedegg", "salat")]
    question = "what type of breakfast is shown in the video?"
    answers = [example.conversations for example in source]
    assert answers == [(((question, answer),),) for answer in ("cereal", "fried egg", "salat")]
    assert source[0].frames.last is None
    assert [picked(dataclasses.replace(source, train=train)) for train in (False, True)] == ["spread", "drawn"]
    assert len(BreakfastSource(source.file, tmp_path, drop=())) == 4
    (other,) = BreakfastSource(written(tmp_path, "test.json", BREAKFAST_JSON), tmp_path)
    assert (other.conversations, other.frames.last) == (answers[1], 11)


def test_coin(tmp_path):
    file = written(tmp_path, "COIN.json", COIN_JSON)
    question = "what is the activity in the video?"
    (train,) = CoinSource(file, tmp_path, train=True)
    assert (train.id, train.conversations) == ("LtRSn-ntcLY", (((question, "replace cd drive with ssd"),),))
    (test,) = CoinSource(file, tmp_path)
    assert (test.id, test.conversations) == ("x2", (((question, "make rj45 cable"),),))
    assert [example.id for example in CoinSource(file, tmp_path, split="training", drop=())][1] == "AfiVmAjfTNs"
    entry = {"subset": "val", "duration": 9, "target": "make sandwich", "num_frames_actual": 92}
    (other,) = CoinSource(written(tmp_path, "other.json", {"x3": entry}), tmp_path)
    assert (other.conversations[0][0][1], other.frames.last) == ("make sandwich", 91)


def test_captions_in_cocos_layout(tmp_path):
    file = written(tmp_path, "cap_train.json", COCO)
    train = CaptionSource(file, tmp_path, train=True)
    assert [example.id for example in train] == ["video7010/0", "3/1", "video7010/2"]
    assert [example.frames.name for example in train] == ["video7010", "video7011", "video7010"]
    question = "what does the video describe?"
    assert train[0].conversations == (((question, "a man is filling up a bag"),),)
    first, second = CaptionSource(file, tmp_path)
    assert (first.id, second.id, first.num_frames) == ("video7010", "3", 80)
    assert first.conversations == (((question, "a man is filling up a bag"),), ((question, "someone cooks"),))
    assert first.tags == ("caption", "caption")


def test_captions_in_the_layout_of_malmm(tmp_path):
    msvd = written(tmp_path, "msvd.json", MSVD)
    assert [example.id for example in CaptionSource(msvd, tmp_path, train=True)] == ["bQ_162_169/0", "bQ_162_169/1"]
    (example,) = CaptionSource(msvd, tmp_path)
    assert [turns[0][1] for turns in example.conversations] == ["a man", "a bag"]
    assert (example.frames.name, example.frames.first, example.frames.last) == ("bQ_162_169", 0, 71)
    (segment,) = CaptionSource(written(tmp_path, "youcook2.json", YOUCOOK2), tmp_path)
    assert (segment.id, segment.frames.name) == ("xHr8X2Wpmno_0047_0060", "xHr8X2Wpmno")
    assert (segment.frames.first, segment.frames.last) == (470, 600)
    youcook2 = CaptionSource(tmp_path / "youcook2.json", tmp_path)
    assert [picked(dataclasses.replace(youcook2, train=train)) for train in (False, True)] == ["truncated", "drawn"]


def test_questions(tmp_path):
    (example,) = QuestionSource(written(tmp_path, "qa_test.json", QUESTIONS), tmp_path)
    assert example.conversations == ((("Question: who opened the big box? Short answer:", "someone"),),)
    assert (example.id, example.tags, example.num_frames) == ("0000000", ("who",), 20)
    assert (example.frames.name, example.frames.last) == ("jfrrO5K_vKM_55_65", 101)


def test_texts_are_cleaned_as_blip_does():
    assert caption_text('  A "Big"  dog; it (runs)!\n') == "a big dog it runs"
    assert question_text("What is #1 (here)? ") == "what is 1 here?"
    many = " ".join(str(n) for n in range(60))
    assert caption_text(many) == question_text(many) == " ".join(str(n) for n in range(50))
    assert words("PutOnHairExtensions") == "put on hair extensions"


# --- faults -----------------------------------------------------------------------------------------------------------


CAPTION = {"video": "v", "caption": "a cat"}
SEGMENT = {**CAPTION, "segment": "v_1", "start_time": 1, "end_time": 2, "duration": 9}
LVU_ENTRY = LVU_JSON["0Ij2veeSsE4"]


@pytest.mark.parametrize(
    ("source", "held", "says"),
    [
        (BreakfastSource, [1], "holds a JSON list; expected an object"),
        (BreakfastSource, "{", "is no JSON"),
        (BreakfastSource, {}, "has no entry of this data set; give another file"),
        (BreakfastSource, {"a": 1}, "entry 'a' is a JSON int; expected an object"),
        (BreakfastSource, {"a": {"x": 1, "y": 2}}, "entry 'a' has no class_name; it has x, y"),
        (BreakfastSource, {"a": {}}, "entry 'a' has no class_name; it has nothing"),
        (BreakfastSource, {"a": {"class_name": 3}}, "entry 'a' has the class_name 3; expected a string"),
        (
            BreakfastSource,
            {"a": {"class_name": "tea", "frame_length": 0}},
            "entry 'a' has the frame_length 0; expected a number of at least 1",
        ),
        (CoinSource, {"database": []}, "database is a JSON list; expected an object"),
        (CoinSource, {"a": {"class": "MakeTea", "subset": "x"}}, "has no entry in the subset 'testing' or 'val'"),
        (CoinSource, {"a": {"class": "MakeTea"}}, "entry 'a' has no subset; it has class"),
        (CoinSource, {"a": {"target": 1, "subset": "val"}}, "entry 'a' has the target 1; expected a string"),
        (CaptionSource, {"annotations": {}}, "annotations is not a list of objects; expected COCO's layout"),
        (CaptionSource, {"images": [1], "annotations": []}, "images is not a list of objects"),
        (CaptionSource, {"annotations": [{"image_id": "v"}]}, "annotation 0 has no caption; it has image_id"),
        (
            CaptionSource,
            {"annotations": [{"image_id": 0.5, "caption": ""}]},
            "annotation 0 has the image_id 0.5; expected a string or a whole number",
        ),
        (CaptionSource, {"k": {"video": "v"}}, "entry 'k' has no caption; it has video"),
        (CaptionSource, {"k": {**SEGMENT, "segment": 1}}, "entry 'k' has the segment 1; expected a string"),
        (CaptionSource, {"k": {**SEGMENT, "end_time": "x"}}, "entry 'k' has the end_time 'x'; expected a number"),
        (CaptionSource, {"k": {**SEGMENT, "start_time": True}}, "the start_time True; expected a number"),
        (
            CaptionSource,
            {"k": {**SEGMENT, "start_time": 5}},
            "entry 'k' is a segment from 5 to 2 seconds; expected one",
        ),
        (QuestionSource, {"7": {"question": "?", "video": "v"}}, "entry '7' has no answer; it has question, video"),
    ],
)
def test_other_layouts(tmp_path, source, held, says):
    with pytest.raises(DataError, match=says):
        source(written(tmp_path, "data.json", held), tmp_path)


@pytest.mark.parametrize(
    ("held", "how", "says"),
    [
        ({"a": {**LVU_ENTRY, "duration": None}}, {}, "entry 'a' has the duration None; expected a number"),
        ({"a": {**LVU_ENTRY, "duration": -3}}, {}, "entry 'a' has the duration -3; expected a number of at least 1"),
        ({"a": {"director": "ron"}}, {}, "entry 'a' has no duration; it has director"),
        ({"a": {**LVU_ENTRY, "director": 1}}, {}, "entry 'a' has the director 1; expected a string"),
        (LVU_JSON, {"task": "scene"}, "has no entry with scene; give another file"),
        (LVU_JSON, {"split": "train"}, "has no entry with director in the subset 'train'; give another file"),
    ],
)
def test_other_layouts_of_lvu(tmp_path, held, how, says):
    with pytest.raises(DataError, match=says):
        LvuSource(written(tmp_path, "test.json", held), tmp_path, **{"task": "director", **how})


@pytest.mark.parametrize(
    ("table", "durations", "says"),
    [
        (DIRECTORS, "videoid,duration\n0Ij2veeSsE4,162\n", "line 3: the video -x_1 is not in .*lvu_durations.csv; add"),
        (DIRECTORS, "videoid,duration\n-x_1,long\n", "lvu_durations.csv: line 2 has the duration 'long'; expected a"),
        (DIRECTORS, "videoid\n-x_1\n", "lvu_durations.csv has no column duration; its first line must name videoid, d"),
        (
            DIRECTORS.replace("nm0001392", "Comedy"),
            DURATIONS,
            "line 3 has the class 'Comedy'; expected one of director",
        ),
        (
            DIRECTORS.replace(" tt0407304", ""),
            DURATIONS,
            "line 2 does not have the 4 columns that the first line names",
        ),
        ("", DURATIONS, "test.csv has no column class_name; its first line must name class_name, youtube_id"),
        (DIRECTORS.splitlines()[0], DURATIONS, "has no entry with director; give another file"),
    ],
)
def test_tables_of_lvu_that_do_not_do(tmp_path, table, durations, says):
    written(tmp_path, "lvu_durations.csv", durations)
    with pytest.raises(DataError, match=says):
        LvuSource(written(tmp_path, "director/test.csv", table), tmp_path, task="director")


def test_files_that_are_not_there_or_no_text(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json cannot be read \(No such file"):
        QuestionSource(tmp_path / "absent.json", tmp_path)
    with pytest.raises(DataError, match=r"absent\.csv cannot be read \(No such file"):
        BreakfastSource(tmp_path / "absent.csv", tmp_path)
    with pytest.raises(DataError, match=r"lvu_durations\.csv cannot be read \(No such file"):
        LvuSource(written(tmp_path, "lvu/director/test.csv", DIRECTORS), tmp_path, task="director")
    (tmp_path / "odd.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"odd\.csv is no text \("):
        BreakfastSource(tmp_path / "odd.csv", tmp_path)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"task": "like_ratio"}, "the task of LVU is 'like_ratio', but must be one of relationship, way_speaking"),
        ({"window": 0}, "window is 0, but must be at least 1 second"),
        ({"stride": 0}, "stride is 0, but must be at least 1 second"),
        ({"num_frames": 0}, "num_frames is 0, but must be at least 1"),
        ({"size": (224,)}, r"size is \(224,\), but must be \(height, width\)"),
        ({"size": (0, 8)}, r"size is \(0, 8\), but must be \(height, width\)"),
        ({"fps": 0}, "fps is 0, but must be above 0"),
    ],
)
def test_options_outside_their_range(tmp_path, how, says):
    with pytest.raises(OptionError, match=says):
        LvuSource(written(tmp_path, "test.json", LVU_JSON), tmp_path, **{"task": "director", **how})
