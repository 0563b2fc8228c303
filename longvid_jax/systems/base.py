"""What every system has: begin -> watch* -> answer on a memory, and `ask`, which is built on them.

A system is a `VideoModel` with a memory of its own; what it has to fill in is named in the class.
"""

import abc
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import numpy as np

from longvid_jax.errors import OptionError, PromptError
from longvid_jax.memory.state import Waiting, fork
from longvid_jax.systems.results import Account, Answer
from longvid_jax.video import Frames, Video, stream_batch

MAX_NEW_TOKENS = 128


class Memory(Protocol):
    """What all memories have: frozen dataclasses, registered as pytrees, whose leaves are arrays. B batch."""

    waiting: Waiting | None  # frames that do not fill a window yet
    frames: np.ndarray  # int [B] frames watched, those that wait included


class VideoModel(abc.ABC):
    """A model that answers questions about long videos.

    model: its networks. settings: its checkpoint's constants. method: its paper's run-time choices, or None where the
    plain model runs. tokenizer: None where the checkpoint has none. mesh: over which its arrays are spread, or None.

    A system fills in `window`, `frame_size`, `begin`, `_look`, `_answer` and `_check_question`; it changes `asks_once`,
    `asks_together`, `_flush` and `_check_decoding` where what is here does not hold.
    """

    def __init__(self, model, settings, *, method=None, tokenizer=None, mesh=None):
        self.model, self.settings, self.method = model, settings, method
        self.tokenizer, self.mesh = tokenizer, mesh

    @property
    @abc.abstractmethod
    def window(self) -> int:
        """Frames that one step reads; `watch` takes any number."""

    @property
    def asks_once(self) -> bool:
        """Whether a memory depends on its question, so that another question means watching again."""
        return False

    @property
    def asks_together(self) -> bool:
        """Whether questions about one video may be rows of one memory, which all watch Frames of one row.

        Then a trace has row(i), that of one question.
        """
        return False

    # --- watching -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def frame_size(self, video: Video) -> tuple[int, int]:
        """Height and width at which the model sees a video."""

    def stream(self, video: Video | Sequence[Video]) -> Iterator[Frames]:
        """The video's frames in windows of the model's size, decoded ahead on a thread; a list makes a batch."""
        videos = as_list(video, Video)
        sizes = {self.frame_size(video) for video in videos}
        if len(sizes) > 1:
            raise OptionError(
                f"Videos of one batch must have one frame size, not {sorted(sizes)}; watch them one by one."
            )
        return stream_batch(videos, self.window, sizes.pop())

    @abc.abstractmethod
    def begin(
        self,
        instruction: str | Sequence[str],
        *,
        video: Video | Sequence[Video] | None = None,
        expected_frames: int | Sequence[int] | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> Memory:
        """An empty memory for watching with this question in mind; lists make a batch.

        The length of the video, from `video` or `expected_frames` (sampled frames) and frame_size (height and width of
        the frames that `watch` will get), may be left open, where the system does not need it.
        """

    def watch(self, memory: Memory, frames: Frames) -> Memory:
        """Takes in a window of frames of any length; consumes the memory (keep a copy with lv.fork).

        Frames wait on the host until they fill the model's window, so how they are cut into windows changes nothing.
        """
        waiting = _join(memory.waiting, frames)
        ended = memory.frames < memory.frames.max()
        if (frames.valid & ended[:, None]).any() or (np.diff(waiting.valid.astype(int), axis=1) > 0).any():
            raise OptionError("A row of a batch has ended once it has a frame that is not valid; more came behind one.")
        memory = dataclasses.replace(memory, waiting=None, frames=memory.frames + frames.valid.sum(1))
        while waiting.valid.shape[1] >= self.window:
            memory = self._look(memory, jax.tree.map(lambda x: x[:, : self.window], waiting))
            waiting = jax.tree.map(lambda x: x[:, self.window :], waiting)
        return dataclasses.replace(memory, waiting=waiting if waiting.valid.shape[1] else None)

    def finish(self, memory: Memory) -> Memory:
        """The memory with nothing held back: the last frames, fewer than a window, are encoded and all is read.

        `answer` does this to a copy each time; done once before many questions it saves that. Consumes the memory.
        """
        if memory.waiting is not None:
            short = self.window - memory.waiting.valid.shape[1]
            window = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)), memory.waiting)
            memory = self._look(dataclasses.replace(memory, waiting=None), window)
        return self._flush(memory)

    # --- answering ----------------------------------------------------------------------------------------------------

    def answer(self, memory: Memory, instruction: str | Sequence[str] | None = None, **decoding) -> Answer:
        """Answers from what was watched so far; the memory stays as it is, so watching may go on and more may be asked.

        instruction: another question than begin's, one a row; an InstructionError where the memory depends on its own.
        decoding: max_new_tokens=128, temperature=0.0 (greedy), top_p=1.0, seed=0, or what else the system decodes with.
        """
        self._check_decoding(**decoding)
        return self._reply(self.finish(fork(memory)), instruction, **decoding)

    def ask(
        self,
        video: Video | str | Sequence[Video | str],
        instruction: str | Sequence[str],
        *,
        profile: bool = False,
        progress=None,
        **decoding,
    ) -> Answer | list[Answer]:
        """Watches a video and answers; several questions about one video make a list of answers after one watching.

        A list of videos with a list of questions makes a batch. Where the memory depends on its question (`asks_once`),
        each question of one video is a watching of its own, unless the system watches for all of them side by side
        (`asks_together`). profile=True measures the seconds of each stage (and makes them wait for each other);
        progress(frames) is called after each window; decoding options as for `answer`.
        """
        batched = (
            not isinstance(video, Video | str) and not hasattr(video, "__fspath__") and isinstance(video, Sequence)
        )
        videos = [each if isinstance(each, Video) else Video(each) for each in (video if batched else [video])]
        questions = as_list(instruction, str)
        if not questions or (batched and len(questions) != len(videos)):
            raise PromptError(f"{len(questions)} questions for {len(videos)} videos: give one question a video.")
        self._check_decoding(**decoding)  # what is wrong with a question is found before hours of video are watched
        for each in questions:
            self._check_question(each, **decoding)
        together = self.asks_once and len(questions) > 1 and not batched
        if together and not self.asks_together:
            return [self.ask(video, each, profile=profile, progress=progress, **decoding) for each in questions]
        seconds, decoding = {} if profile else None, decoding | self._asking_about(videos)
        with _timed(seconds, "begin") as done:
            memory = done(self.begin(questions if batched or together else questions[0], video=videos))
        with _timed(seconds, "watch") as done, contextlib.closing(self.stream(videos)) as windows:
            for frames in windows:
                memory = self.watch(memory, frames)
                if progress is not None:
                    progress(int(frames.valid.sum()))
            memory = done(self.finish(memory))
        answers = []
        for each in [questions] if batched or together else questions:
            with _timed(seconds, "answer") as done:
                answers.append(done(self._reply(fork(memory), each, **decoding)))
        answers = self._one_by_one(answers[0]) if together else answers
        answers = [dataclasses.replace(a, trace=dataclasses.replace(a.trace, seconds=seconds)) for a in answers]
        return answers[0] if batched or isinstance(instruction, str) else answers

    # --- what a system fills in ---------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _look(self, memory: Memory, window: Waiting) -> Memory:
        """Takes in `self.window` frames, whose valid ones are a prefix in each row; consumes the memory.

        `memory.frames` counts them already and `memory.waiting` is None. A row may have no valid frame.
        """

    def _flush(self, memory: Memory) -> Memory:
        """Takes in what the system itself holds back, such as features that wait for their successor."""
        return memory

    def _asking_about(self, videos: list[Video]) -> dict:
        """What else `answer` needs of the videos that `ask` watches, as decoding options."""
        return {}

    @abc.abstractmethod
    def _answer(self, memory: Memory, instructions: list[str] | None, **decoding) -> Answer:
        """Answers from a finished memory with frames in every row, which it may consume; None is begin's question.

        Raises InstructionError for a question that the memory was not made for.
        """

    @abc.abstractmethod
    def _check_question(self, text: str, **decoding) -> None:
        """Raises PromptError for a question that could not be answered about any video: empty, or too long."""

    def _check_decoding(
        self, *, max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        """Raises OptionError for values out of range; a system with other options takes those and hands on the rest."""
        if max_new_tokens < 1:
            raise OptionError(f"max_new_tokens is {max_new_tokens}, but must be at least 1.")
        if not temperature >= 0:
            raise OptionError(f"temperature is {temperature}, but must be 0 (greedy) or more.")
        if not 0 < top_p <= 1:
            raise OptionError(f"top_p is {top_p}, but must be above 0 and at most 1.")

    # --- what a system is made with -----------------------------------------------------------------------------------

    def _on_mesh(self):
        """The context in which steps run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _begin_with(
        self, instruction, video, expected_frames, frame_size
    ) -> tuple[list[str], np.ndarray, tuple[int, int] | None]:
        """What `begin` was given: questions, sampled frames int64 [B] (0: unknown) and frame size (None: unknown)."""
        instructions = as_list(instruction, str)
        if video is not None:
            videos = as_list(video, Video)
            if len(videos) != len(instructions):
                raise OptionError(f"{len(instructions)} questions for {len(videos)} videos: give one question a video.")
            expected_frames, frame_size = [len(video) for video in videos], self.frame_size(videos[0])
        expected = np.asarray(0 if expected_frames is None else expected_frames, np.int64)
        return instructions, np.broadcast_to(expected, len(instructions)), frame_size

    def _reply(self, memory: Memory, instruction: str | Sequence[str] | None, **decoding) -> Answer:
        """Answers from a finished memory, which is consumed."""
        if not memory.frames.all():
            raise PromptError("Nothing was watched yet; give watch() frames before answer().")
        instructions, batch = None if instruction is None else as_list(instruction, str), len(memory.frames)
        if instructions is not None and len(instructions) != batch:
            raise PromptError(f"{len(instructions)} questions for a memory of {batch} videos: give one a video.")
        return self._answer(memory, instructions, **decoding)

    def _one_by_one(self, answer: Answer) -> list[Answer]:
        """The rows of an answer as answers of their own."""
        answers = []
        for row, text in enumerate(answer.text):
            stops = np.flatnonzero(np.isin(answer.tokens[row], self.settings.stop_tokens))
            count = stops[0] + 1 if len(stops) else answer.tokens.shape[1]
            answers.append(Answer(text, answer.tokens[row : row + 1, :count], answer.trace.row(row)))
        return answers

    def _in_words(self, tokens, count, trace: Account) -> Answer:
        """The answer that tokens int32 [B, M] make, of which `count` [B] are real."""
        tokens, count = np.asarray(tokens), np.asarray(count)
        texts = [
            self.tokenizer.decode(row[:n], skip_special_tokens=True).strip()
            for row, n in zip(tokens, count, strict=True)
        ]
        return Answer(texts[0] if len(texts) == 1 else texts, tokens[:, : count.max()], trace)


def as_list(value, kind: type) -> list:
    """One of a kind, or a sequence of them, as a list."""
    return [value] if isinstance(value, kind) else list(value)


def _join(waiting: Waiting | None, frames: Frames) -> Waiting:
    """Waiting frames with new ones behind them; columns that no row uses are left out."""
    used = frames.valid.any(0)
    new = Waiting(*(np.asarray(x)[:, used] for x in (frames.pixels, frames.times, frames.valid)))
    if waiting is None:
        return new
    if waiting.pixels.shape[2:] != new.pixels.shape[2:]:
        raise OptionError("Frames of one memory must have one size; take them all from model.stream(video).")
    return jax.tree.map(lambda old, new: np.concatenate([old, new], axis=1), waiting, new)


@contextlib.contextmanager
def _timed(seconds: dict[str, float] | None, stage: str):
    """Adds the time of a stage to `seconds`, waiting for what the body hands over; nothing where seconds is None."""
    results, start = [], time.perf_counter()

    def done(result):
        results.append(result)
        return result

    yield done
    if seconds is not None:
        jax.block_until_ready(results)
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
