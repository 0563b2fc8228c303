"""When something happens in a video, as questions: ActivityNet Captions and DiDeMo, in their own JSON layouts.

    {"v_QOlSCBRmfWY": {"duration": 82.7, "timestamps": [[0.8, 19.9], ...], "sentences": ["A woman ...", ...]}, ...}
    [{"video": "12@N01_345_678.avi", "description": "the dog turns", "num_segments": 6, "times": [[1, 1], ...]}, ...]

DiDeMo's times are numbers of segments of five seconds, one pair an annotator; the pair that most others overlap counts.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from longvid_jax.data.annotations import field, table
from longvid_jax.data.batches import Example
from longvid_jax.data.conversations import ConversationSource, entries, find
from longvid_jax.errors import DataError, OptionError
from longvid_jax.video import Video, synthetic_text

SEGMENT = 5.0  # seconds, of DiDeMo's
LONGEST = 30.0  # seconds of a video that DiDeMo looks at
QUESTION = "When does this happen: {}?"

Moment = tuple[str, float, float]  # what happens, and from when to when, in seconds


@dataclasses.dataclass(frozen=True)
class GroundingSource(ConversationSource):
    """The videos of `file` as examples: up to `questions` about each, one for each sentence; the answer is its span.

    Spans are told in whole seconds, as the made-up world tells them; those that end before they begin, of which
    ActivityNet Captions has a few, are left out, and ends behind the video's are moved to it. Frame n is that of n /
    fps seconds (a folder of frames has one a second), so videos too long for max_frames are left out; DiDeMo's are
    looked at for half a minute.

    Raises DataError as ConversationSource does, and where no video is left.
    """

    fps: float = 1.0
    max_frames: int = 256
    questions: int = 4

    def __post_init__(self):
        file = Path(self.file)
        for name in ("questions", "max_frames"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if not self.fps > 0:
            raise OptionError(f"fps is {self.fps}, but must be above 0.")
        examples = [
            self._asked(video, duration, told[n : n + self.questions], n)
            for video, duration, told in (_didemo if _is_list(file) else _activitynet)(file)
            if 0 < duration * self.fps <= self.max_frames
            for n in range(0, len(told), self.questions)
        ]
        if not examples:
            raise DataError(
                f"{file} has no video of {self.max_frames / self.fps:g} seconds or less; give another file."
            )
        object.__setattr__(self, "_examples", examples)

    def _asked(self, video: str, duration: float, moments: Sequence[Moment], n: int) -> Example:
        turns = tuple(((QUESTION.format(_clause(what)), _told(start, end)),) for what, start, end in moments)
        frames = max(1, round(duration * self.fps))
        read = partial(_frames, Path(self.folder), video, np.arange(frames) / self.fps, self.size)
        return Example(f"{video}/{n}", turns, frames, self.size, read)


def _is_list(file: Path) -> bool:
    if file.suffix == ".jsonl":
        return True
    try:
        with file.open(encoding="utf-8") as text:
            return text.read(1024).lstrip().startswith("[")
    except (OSError, ValueError):
        return False  # reading it says what is wrong


def _activitynet(file: Path) -> Iterator[tuple[str, float, list[Moment]]]:
    for video, entry, where in table(file):
        duration = field(entry, "duration", (int, float), where)
        spans, sentences = (_list(entry, name, where) for name in ("timestamps", "sentences"))
        if len(spans) != len(sentences):
            raise DataError(f"{where} has {len(spans)} timestamps, but {len(sentences)} sentences; give one for each.")
        moments = [(str(text), *_pair(span, where)) for text, span in zip(sentences, spans, strict=True)]
        moments = [(text, start, min(end, duration)) for text, start, end in moments]
        yield video, duration, [moment for moment in moments if moment[1] < moment[2]]


def _didemo(file: Path) -> Iterator[tuple[str, float, list[Moment]]]:
    told: dict[str, list[Moment]] = {}
    for n, entry in enumerate(entries(file)):
        where = f"{file}: entry {n}"
        if not isinstance(entry, dict):
            raise DataError(f"{where} is a JSON {type(entry).__name__}; expected an object with video and description.")
        video, text = field(entry, "video", str, where), field(entry, "description", str, where)
        first, last = _agreed([sorted(_pair(pair, where)) for pair in _list(entry, "times", where)], where)
        told.setdefault(video, []).append((text, SEGMENT * first, SEGMENT * (last + 1)))
    for video, moments in told.items():
        yield video, LONGEST, moments


def _agreed(pairs: Sequence[Sequence[float]], where: str) -> tuple[float, float]:
    """The first of the pairs of segments that overlap most with all."""
    if not pairs:
        raise DataError(f"{where} has no times; give a pair of segments.")

    def shared(pair) -> float:
        return sum(
            max(0.0, min(pair[1], b) - max(pair[0], a) + 1) / (max(pair[1], b) - min(pair[0], a) + 1) for a, b in pairs
        )

    return max(pairs, key=shared)


def _list(entry: dict, name: str, where: str) -> list:
    if not isinstance(entry.get(name), list):
        raise DataError(f"{where} has no list of {name}; see data.grounding.")
    return entry[name]


def _pair(values: Iterable, where: str) -> tuple[float, float]:
    try:
        start, end = map(float, values)
    except (TypeError, ValueError):
        start = end = -1.0
    if not (start >= 0 and end >= 0):
        raise DataError(f"{where} has the times {json.dumps(values)}; expected a start and an end.")
    return start, end


def _frames(folder: Path, name: str, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [F, H, W, 3] of these seconds; those behind the video's end are not there."""
    video = Video(find(folder, name), native_fps=1.0)
    return video.read(times[times < max(video.probe.duration, times[0] + 1e-9)], size)


def _clause(sentence: str) -> str:
    return sentence.strip().rstrip(".!?").strip()


def _told(start: float, end: float) -> str:
    """In whole seconds, at least one of them."""
    first = synthetic_text.whole_seconds(start)
    return synthetic_text.span(first, max(first + 1, synthetic_text.whole_seconds(end)))
