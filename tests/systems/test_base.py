"""What systems have in common, on the smallest of them: its memory is a number, which plain Python can work out."""

import dataclasses

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import longvid_jax as lv
from longvid_jax.memory.state import Waiting
from longvid_jax.systems.base import VideoModel
from longvid_jax.systems.results import Answer

WINDOW, WORDS = 3, 997


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Count:
    waiting: Waiting | None
    frames: np.ndarray  # int [B]
    total: np.ndarray  # int [B]
    held: np.ndarray  # int [B] the sum of the last window, held back until its successor comes
    question: np.ndarray  # int [B]
    expected: np.ndarray  # int [B]


@dataclasses.dataclass(frozen=True)
class Counted:
    frames: np.ndarray
    cache_bytes: int
    seconds: dict[str, float] | None = None


class Counter(VideoModel):
    """Doubles its total and adds a window's pixels, window by window; the answer is total + question, as a word.

    A question is a number; the method says whether it is part of the memory. "twice" is a decoding option of its own.
    """

    begun = 0

    @property
    def window(self):
        return WINDOW

    @property
    def asks_once(self):
        return self.method == "guided"

    def frame_size(self, video):
        return video.probe.height, video.probe.width

    def begin(self, instruction, *, video=None, expected_frames=None, frame_size=None):
        self.begun += 1
        questions, expected, _ = self._begin_with(instruction, video, expected_frames, frame_size)
        zero = np.zeros(len(questions), int)
        return Count(None, zero, zero, zero, np.array([int(text) for text in questions]), expected)

    def _look(self, memory, window):
        assert memory.waiting is None and window.valid.shape[1] == WINDOW
        assert window.pixels.shape[:2] == window.times.shape == window.valid.shape
        seen = np.where(window.valid, window.pixels.astype(int).sum((2, 3, 4)), 0).sum(1)
        memory = self._flush(memory)
        return dataclasses.replace(memory, held=seen)

    def _flush(self, memory):
        total = np.where(memory.held > 0, 2 * memory.total + memory.held, memory.total) % WORDS
        return dataclasses.replace(memory, total=total, held=np.zeros_like(total))

    def _answer(self, memory, instructions, *, twice=False, max_new_tokens=128, **_) -> Answer:
        assert instructions is None or isinstance(instructions, list)
        assert not memory.held.any() and memory.waiting is None
        question = memory.question if instructions is None else np.array([int(text) for text in instructions])
        if self.asks_once and not np.array_equal(question, memory.question):
            raise lv.InstructionError("begun with another question.")
        tokens = np.zeros((len(question), 2), np.int32)
        tokens[:] = ((memory.total + question) % WORDS)[:, None]
        count = np.full(len(question), min(2 if twice else 1, max_new_tokens))
        return self._in_words(tokens, count, Counted(memory.frames, memory.total.nbytes))

    def _check_question(self, text, **_):
        if not text.isdigit():
            raise lv.PromptError("not a number.")

    def _check_decoding(self, *, twice=False, **common):
        super()._check_decoding(**common)
        if twice and common.get("temperature"):
            raise lv.OptionError("twice is greedy.")


def make(method=None):
    words = Tokenizer(models.WordLevel({str(i): i for i in range(WORDS)}, unk_token="0"))
    return Counter(None, None, method=method, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(1, 255, (11, 4, 6, 3), dtype=np.uint8)


def expected(pixels, question):
    """The answer to a question on one video."""
    total = 0
    for start in range(0, len(pixels), WINDOW):
        total = 2 * total + int(pixels[start : start + WINDOW].sum(dtype=int))
    return str((total + question) % WORDS)


def side_by_side(videos, start, stop):
    """A window of several videos, blank behind the end of each."""
    window = lv.Frames.empty(len(videos), stop - start, videos[0].shape[1:3])
    for row, video in enumerate(videos):
        part = video[start:stop]
        window.pixels[row, : len(part)] = part
        window.valid[row, : len(part)] = True
    return window


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 20])
def test_windows_of_any_length(pixels, length):
    """Rows that end at different times, in the middle of a window or at its end, are each as if alone."""
    model, videos = make(), [pixels, pixels[3:9], pixels[5:6]]
    memory = model.begin(["1", "2", "3"])
    for start in range(0, len(pixels), length):
        memory = model.watch(memory, side_by_side(videos, start, start + length))
        assert memory.waiting is None or 0 < memory.waiting.valid.shape[1] < WINDOW
    answer = model.answer(memory)
    assert answer.text == [expected(video, n) for n, video in enumerate(videos, 1)]
    np.testing.assert_array_equal(answer.trace.frames, [11, 6, 1])
    assert answer.tokens.shape == (3, 1)


def test_answering_takes_nothing_away(pixels):
    model = make()
    memory = model.watch(model.begin("0"), side_by_side([pixels], 0, 5))
    assert model.answer(memory).text == model.answer(memory).text == expected(pixels[:5], 0)
    assert model.answer(memory, "4").text == expected(pixels[:5], 4)
    memory = model.watch(memory, side_by_side([pixels], 5, 11))
    assert model.answer(memory).text == expected(pixels, 0)
    finished = model.finish(lv.fork(memory))
    assert finished.waiting is None and model.answer(finished).text == expected(pixels, 0)


@pytest.mark.parametrize(("method", "watchings"), [(None, 1), ("guided", 3)])
def test_several_questions_on_one_video(pixels, method, watchings):
    model, seen = make(method), []
    video = lv.Video(pixels, fps=1)
    answers = model.ask(video, ["1", "2", "3"], profile=True, progress=seen.append)
    assert [answer.text for answer in answers] == [expected(pixels, n) for n in (1, 2, 3)]
    assert model.begun == watchings and seen == [3, 3, 3, 2] * watchings
    assert all(set(answer.trace.seconds) == {"begin", "watch", "answer"} for answer in answers)
    one = model.ask(video, "7")
    assert one.text == expected(pixels, 7) and one.trace.seconds is None


@pytest.mark.parametrize("method", [None, "guided"])
def test_a_batch_is_watched_once(pixels, method):
    model, videos = make(method), [pixels, pixels[:4]]
    answer = model.ask([lv.Video(video, fps=1) for video in videos], ["5", "6"])
    assert answer.text == [expected(pixels, 5), expected(pixels[:4], 6)] and model.begun == 1


def test_decoding_options_of_its_own(pixels):
    model, video = make(), lv.Video(pixels, fps=1)
    word = expected(pixels, 1)
    assert model.ask(video, "1", twice=True).text == f"{word} {word}"
    assert model.ask(video, "1", twice=True, max_new_tokens=1).text == word
    memory = model.watch(model.begin("1"), side_by_side([pixels], 0, 11))
    for options, says in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"twice": True, "temperature": 1.0}, "twice is greedy"),
    ):
        for call in (lambda: model.answer(memory, **options), lambda: model.ask(video, "1", **options)):  # noqa: B023
            with pytest.raises(lv.OptionError, match=says):
                call()
    with pytest.raises(TypeError, match="beams"):
        model.ask(video, "1", beams=5)


def test_lengths_and_sizes_known_before(pixels):
    model = make()
    videos = [lv.Video(pixels, fps=1), lv.Video(pixels[:4], fps=1)]
    np.testing.assert_array_equal(model.begin(["1", "2"], video=videos).expected, [11, 4])
    np.testing.assert_array_equal(model.begin(["1", "2"], expected_frames=9).expected, [9, 9])
    np.testing.assert_array_equal(model.begin("1").expected, [0])
    with pytest.raises(lv.OptionError, match="1 questions for 2 videos"):
        model.begin("1", video=videos)
    with pytest.raises(lv.OptionError, match="one frame size"):
        model.stream([videos[0], lv.Video(pixels[:, :2], fps=1)])


def test_calls_that_do_not_go(pixels):
    model, video = make("guided"), lv.Video(pixels, fps=1)
    with pytest.raises(lv.PromptError, match="Nothing was watched"):
        model.answer(model.begin("1"))
    half = model.watch(model.begin(["1", "2"]), side_by_side([pixels, pixels[:0]], 0, 4))
    with pytest.raises(lv.PromptError, match="Nothing was watched"):
        model.answer(half)
    memory = model.watch(model.begin("1"), side_by_side([pixels], 0, 4))
    with pytest.raises(lv.PromptError, match="2 questions for a memory of 1"):
        model.answer(memory, ["1", "2"])
    with pytest.raises(lv.InstructionError):
        model.answer(memory, "2")
    with pytest.raises(lv.OptionError, match="one size"):
        model.watch(lv.fork(memory), side_by_side([pixels[:, :2]], 0, 1))
    with pytest.raises(lv.OptionError, match="has ended"):
        model.watch(half, side_by_side([pixels, pixels], 4, 6))
    begun = model.begun
    for questions, says in (([], "0 questions"), (["1", "why?"], "not a number")):
        with pytest.raises(lv.PromptError, match=says):
            model.ask(video, questions)
    with pytest.raises(lv.PromptError, match="1 questions for 2 videos"):
        model.ask([video, video], ["1"])
    assert model.begun == begun  # found before anything was watched


def test_a_system_that_lacks_a_part():
    class Part(VideoModel):
        window = 3

    with pytest.raises(TypeError, match="abstract"):
        Part(None, None)
