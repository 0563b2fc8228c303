"""The benchmarks that MA-LMM (2404.05726) and AdaCM2 (2411.12593) are fine-tuned on, as sources of examples.

Files are read in the layout of MA-LMM's annotations, some in the data sets' own too; data.clips says how videos are
stored, and what training (`train=True`) and evaluation see of them. LVU's frames are evenly spread in both.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longvid_jax.data.annotations import field, items, length, read_json, rows, table, whole
from longvid_jax.data.clips import ClipSource, Entry
from longvid_jax.errors import DataError, OptionError

WORDS = 50  # of a question or caption, at most

# LVU's tasks: what a class is called in LVU 1.0 -> in MA-LMM's annotations, which is the answer.
LVU = {
    "relationship": {
        "friend": "friend",
        "ex_boyfriend_ex_girlfriend": "ex boyfriend ex girlfriend",  # in no test video
        "husband_wife": "husband wife",
        "boyfriend_girlfriend": "boyfriend girlfriend",
    },
    "way_speaking": {
        "explains": "explain",
        "confronts": "confront",
        "discuss": "discuss",
        "teaches": "teach",
        "threatens": "threaten",
    },
    "scene": {name: name for name in ("office", "airport", "school", "hotel", "prison", "restaurant")},
    "director": {
        "nm0000229": "steven",
        "nm0000217": "martin",
        "nm0000165": "ron",
        "nm0001675": "robert",
        "nm0040630": "mark",
        "nm0001392": "peter",
        "nm0000631": "ridley",
        "nm0000233": "quentin",
    },
    "genre": {
        "Comedy": "comedy",
        "Action-Crime-Adventure": "action",
        "Romance": "romance",
        "Thriller-Horror": "thriller",
    },
    "writer": {
        r"\N": "unknown",
        "nm0001220": "ian",
        "nm0000175": "stephen",
        "nm0000455": "john",
        "nm0462895": "david",
        "nm0000230": "sylvester",
        "nm0326040": "akiva",
    },
    "year": {str(1930 + 10 * n): str(n) for n in range(9)},
}
BREAKFAST = {"cereals": "cereal", "friedegg": "fried egg", "scrambledegg": "scrambled egg"}


@dataclasses.dataclass(frozen=True)
class LvuSource(ClipSource):
    """Long-form Video Understanding: what is the `task` of the movie? In windows of the video, each an example.

    file: MA-LMM's train.json, val.json or test.json; or a task's CSV of LVU 1.0, as .../lvu_1.0/director/test.csv, with
        the videos' seconds in .../lvu_1.0/lvu_durations.csv.
    window, stride: seconds. Windows begin at 0, stride, ... as long as they end within the video; the first is there
        even so. The id of a window is VIDEO_START.
    split: "train", "val" or "test" takes the entries of this subset of a JSON file; "" all.
    """

    task: str = dataclasses.field(kw_only=True)
    window: int = 100
    stride: int = 20
    split: str = ""

    jitters = False

    def __post_init__(self):
        if self.task not in LVU:
            raise OptionError(f"the task of LVU is {self.task!r}, but must be one of {', '.join(LVU)}.")
        for name in ("window", "stride"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}, but must be at least 1 second.")
        super().__post_init__()

    def _wanted(self) -> str:
        return f"with {self.task} in the subset {self.split!r}" if self.split else f"with {self.task}"

    def _entries(self, file: Path) -> Iterator[Entry]:
        question = f"what is the {self.task} of the movie?"
        for video, label, seconds, frames in (self._rows if file.suffix == ".csv" else self._table)(file):
            for start in window_starts(seconds, self.window, self.stride):
                last = int(min(start + self.window - 1, seconds) * self.fps)
                yield Entry(
                    f"{video}_{start}",
                    video,
                    ((question, caption_text(label)),),
                    self.task,
                    first=int(start * self.fps),
                    last=last if frames is None else min(last, frames - 1),
                )

    def _table(self, file: Path) -> Iterator[tuple[str, str, int, int | None]]:
        for video, entry, where in table(file):
            if self.task in entry and self.split in ("", entry.get("subset")):
                seconds = whole(field(entry, "duration", (int, float), where), "duration", where)
                label, frames = field(entry, self.task, str, where), length(entry, "num_frames", where)
                yield video, label, seconds if frames is None else min(seconds, int(frames / self.fps)), frames

    def _rows(self, file: Path) -> Iterator[tuple[str, str, int, None]]:
        durations = file.parent.parent / "lvu_durations.csv"
        seconds = {
            row["videoid"]: whole(row["duration"], "duration", where)
            for row, where in rows(durations, ",", ("videoid", "duration"))
        }
        for row, where in rows(file, " ", ("class_name", "youtube_id")):
            name, video = row["class_name"], row["youtube_id"]
            if name not in LVU[self.task]:
                known = ", ".join(LVU[self.task])
                raise DataError(f"{where} has the class {name!r}; expected one of {self.task}: {known}.")
            if video not in seconds:
                raise DataError(f"{where}: the video {video} is not in {durations}; add its seconds there.")
            yield video, LVU[self.task][name], seconds[video], None


@dataclasses.dataclass(frozen=True)
class BreakfastSource(ClipSource):
    """Breakfast: what is prepared in the video?

    file: file_name,duration,action,class_id in a .csv file, or MA-LMM's train.json or val.json.
    drop: videos that are left out, as MA-LMM does.
    """

    drop: Sequence[str] = ("P28-cam01-P28_cereals", "P27-stereo-P27_milk_ch0", "P28-cam02-P28_cereals")

    def _entries(self, file: Path) -> Iterator[Entry]:
        for video, label, frames in (self._rows if file.suffix == ".csv" else self._table)(file):
            if video not in self.drop:
                turn = "what type of breakfast is shown in the video?", caption_text(label)
                yield Entry(video, video, (turn,), "breakfast", last=frames and frames - 1)

    def _table(self, file: Path) -> Iterator[tuple[str, str, int | None]]:
        for video, entry, where in table(file):
            yield video, field(entry, "class_name", str, where), length(entry, "frame_length", where)

    def _rows(self, file: Path) -> Iterator[tuple[str, str, None]]:
        for row, _ in rows(file, ",", ("file_name", "action")):
            yield row["file_name"], BREAKFAST.get(row["action"], row["action"]), None


@dataclasses.dataclass(frozen=True)
class CoinSource(ClipSource):
    """COIN: which of 180 activities is in the video?

    file: COIN.json, the data set's own ({"database": {VIDEO: {"class": "ReplaceCDDriveWithSSD", "subset": "training",
        ...}}}, which is answered with "replace cd drive with ssd") or MA-LMM's, with target and num_frames_actual.
    split: "training" or "testing" (MA-LMM: "train", "val"); by default the one of `train`.
    drop: videos that are left out, as MA-LMM does.
    """

    split: str = ""
    drop: Sequence[str] = ("AfiVmAjfTNs", "cjwtcDKTQM8")

    def _wanted(self) -> str:
        return f"in the subset {' or '.join(map(repr, self._splits()))}"

    def _splits(self) -> tuple[str, ...]:
        return (self.split,) if self.split else ("training", "train") if self.train else ("testing", "val")

    def _entries(self, file: Path) -> Iterator[Entry]:
        for video, entry, where in table(file, "database"):
            if field(entry, "subset", str, where) in self._splits() and video not in self.drop:
                named = "target" in entry
                label = field(entry, "target", str, where) if named else words(field(entry, "class", str, where))
                turn = "what is the activity in the video?", caption_text(label)
                frames = length(entry, "num_frames_actual", where)
                yield Entry(video, video, (turn,), "coin", last=frames and frames - 1)


@dataclasses.dataclass(frozen=True)
class CaptionSource(ClipSource):
    """MSRVTT, MSVD and YouCook2: what does the video describe?

    Training has an example for each caption; evaluation has one for each video or segment, with a conversation for each
    of its captions, all with the same question.

    file: COCO's {"images": [{"id": ...}], "annotations": [{"image_id", "caption", "id"}]}, where an image is a video,
        called like its id or its "file_name"; or MA-LMM's {KEY: {"video", "caption", "frame_length"}}, where YouCook2's
        entries have a "segment" of the video from "start_time" to "end_time" seconds.
    """

    num_frames: int = 80
    prompt: str = "what does the video describe?"

    def _entries(self, file: Path) -> Iterator[Entry]:
        clips: dict[str, list[Entry]] = {}
        for key, entry in self._captions(file):
            if self.train:
                yield dataclasses.replace(entry, id=f"{entry.id}/{key}")
            else:
                clips.setdefault(entry.id, []).append(entry)
        for same in clips.values():
            turns = tuple(turn for entry in same for turn in entry.conversations)
            yield dataclasses.replace(same[0], conversations=turns)

    def _captions(self, file: Path) -> Iterator[tuple[Any, Entry]]:
        """What a caption is called, and an entry with it alone, called like its clip."""
        held = read_json(file)
        if "annotations" in held:
            names = {image.get("id"): image.get("file_name") for image in items(held, "images", file)}
            for n, entry in enumerate(items(held, "annotations", file)):
                where = f"{file}: annotation {n}"
                image, caption = field(entry, "image_id", (str, int), where), field(entry, "caption", str, where)
                yield entry.get("id", n), self._caption(str(image), str(names.get(image) or image), caption)
            return
        for key, entry, where in table(file):
            video, caption = field(entry, "video", str, where), field(entry, "caption", str, where)
            if "segment" in entry:
                segment = field(entry, "segment", str, where)
                yield key, self._caption(segment, video, caption, segment=True, **self._place(entry, where))
            else:
                frames = length(entry, "frame_length", where)
                yield key, self._caption(video, video, caption, last=frames and frames - 1)

    def _place(self, entry: dict, where: str) -> dict[str, int]:
        """The first and last frame of a segment."""
        start, end, seconds = (field(entry, key, (int, float), where) for key in ("start_time", "end_time", "duration"))
        start, end = max(0, start), min(seconds, end)
        if start > end:
            raise DataError(f"{where} is a segment from {start} to {end} seconds; expected one that ends later.")
        return {"first": int(start * self.fps), "last": int(end * self.fps)}

    def _caption(self, clip: str, video: str, caption: str, **place) -> Entry:
        return Entry(clip, video, ((self.prompt, caption_text(caption)),), "caption", **place)


@dataclasses.dataclass(frozen=True)
class QuestionSource(ClipSource):
    """MSRVTT-QA and MSVD-QA: an example for each question; tagged with its answer_type.

    file: MA-LMM's qa_train.json, ...: {ID: {"question", "answer", "video", "frame_length", "answer_type"}}.
    prompt: what is asked, with {} for the question.
    """

    num_frames: int = 20
    prompt: str = "Question: {} Short answer:"

    def _entries(self, file: Path) -> Iterator[Entry]:
        for id, entry, where in table(file):
            question, answer, video = (field(entry, name, str, where) for name in ("question", "answer", "video"))
            turn = self.prompt.replace("{}", question_text(question)), question_text(answer)
            tag, frames = str(entry.get("answer_type", "question")), length(entry, "frame_length", where)
            yield Entry(id, video, (turn,), tag, last=frames and frames - 1)


def window_starts(seconds: int, window: int, stride: int) -> list[int]:
    """Where the windows of a video begin: 1 + max(0, (seconds - window) // stride) of them."""
    return [0, *range(stride, seconds - window + 1, stride)]


def caption_text(text: str) -> str:
    """A caption or label as BLIP's models are taught it: lower case, without most punctuation, at most 50 words."""
    text = re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:WORDS])


def question_text(text: str) -> str:
    """A question, or the answer to one: as a caption, but what is left out leaves no space."""
    return " ".join(re.sub(r'[.!"()*#:;~]', "", text.lower()).rstrip(" ").split(" ")[:WORDS])


def words(name: str) -> str:
    """ReplaceCDDriveWithSSD -> replace cd drive with ssd."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
