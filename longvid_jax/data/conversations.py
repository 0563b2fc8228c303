"""Users' own data: conversations about video files, in the JSON layouts of LLaVA and Video-ChatGPT.

    [{"id": "7", "video": "a/b.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "A cat."}, ...]}, ...]
    [{"video_id": "v_x1", "q": "What is it?", "a": "A cat."}, ...]

One list in a .json file, or an entry a line in a .jsonl file. "duration", the video's seconds, may be given: short
videos then share small batches without being opened first.
"""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from longvid_jax.data.batches import Example
from longvid_jax.errors import DataError, VideoError, VideoWarning
from longvid_jax.video import Video

ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")
PLACEHOLDERS = ("<video>", "<image>")
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


@dataclasses.dataclass(frozen=True)
class ConversationSource:
    """The entries of `file` as examples; their video paths start at `folder`.

    Raises DataError if the file is not there or an entry is of no known layout; a video that is not there or does not
    decode is found out when its frames are asked for (VideoError).
    """

    file: str | Path
    folder: str | Path
    size: tuple[int, int]  # (H, W) in pixels that frames are brought to
    fps: float = 2.0
    max_frames: int = 32

    def __post_init__(self):
        file = Path(self.file)
        examples = [self._example(entry, f"{file}: entry {n}") for n, entry in enumerate(entries(file))]
        object.__setattr__(self, "_examples", examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> Example:
        return self._examples[i]

    def _example(self, entry, where: str) -> Example:
        if not isinstance(entry, dict):
            raise DataError(
                f"{where} is a JSON {type(entry).__name__}; expected an object with video and conversations."
            )
        if "conversations" in entry and "video" in entry:
            name, turns = entry["video"], turns_of(entry["conversations"], where)
        elif {"q", "a", "video_id"} <= entry.keys():
            name, turns = entry["video_id"], ((str(entry["q"]), str(entry["a"])),)
        else:
            raise DataError(
                f"{where} has neither video and conversations nor video_id, q and a; see data.conversations."
            )
        duration = entry.get("duration")
        frames = self.max_frames if duration is None else max(1, min(self.max_frames, round(duration * self.fps)))
        read = partial(_frames, Path(self.folder), str(name), self.fps, frames, self.size)
        return Example(str(entry.get("id", name)), (turns,), frames, self.size, read)


def entries(file: Path) -> Sequence:
    """What a .json or .jsonl file holds; DataError if it is neither."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        entries = json.loads(text)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give a .json or .jsonl file.") from error
    except ValueError as error:
        raise DataError(
            f"{file} is no JSON ({error}); give a list of entries, or one a line in a .jsonl file."
        ) from error
    if not isinstance(entries, list):
        raise DataError(f"{file} holds a JSON {type(entries).__name__}; expected a list of entries.")
    return entries


def turns_of(conversation, where: str) -> tuple[tuple[str, str], ...]:
    """Pairs of question and answer; the video goes before the first, whatever place a placeholder gives it."""
    try:
        speakers = [turn["from"] for turn in conversation]
        texts = [turn["value"] for turn in conversation]
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: a turn lacks from or value; expected {{'from': 'human', 'value': ...}}.") from error
    pairs = list(zip(speakers[::2], speakers[1::2], strict=False))
    if not pairs or len(speakers) % 2 or not all(a in ASKS and b in ANSWERS for a, b in pairs):
        raise DataError(
            f"{where} is spoken by {', '.join(map(str, speakers)) or 'nobody'}; expected human, gpt, human, gpt, ..."
        )
    for placeholder in PLACEHOLDERS:
        texts = [text.replace(placeholder, "").strip() for text in texts]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _frames(folder: Path, name: str, fps: float, max_frames: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [F, H, W, 3], F at most max_frames."""
    return frames_of(find(folder, name), fps, max_frames, size)


def find(folder: Path, name: str) -> Path:
    """A video file, with or without its suffix in the name, or a folder of frames; VideoError if there is neither."""
    path = folder / name
    for found in (path, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)):
        if found.exists():
            return found
    raise VideoError(f"{path} does not exist, neither as a folder of frames nor as a video file.")


def frames_of(video: str | Path | bytes, fps: float, max_frames: int, size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] of a file or of its content, F at most max_frames; VideoError if none decodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)  # what decodes of a damaged file is used
        windows = list(Video(video, fps=fps, max_frames=max_frames).stream(max_frames, size))
    return np.concatenate([frames.pixels[0][frames.valid[0]] for frames in windows])
