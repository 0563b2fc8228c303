"""AdaCM2 as a system: batches, streams, questions, bounded memory, and what may not be compiled twice."""

import logging

import jax
import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax.systems.adacm2 import WINDOW
from tests.systems.small_adacm2 import (
    CHOICES,
    LAYERS,
    QUESTIONS,
    TOKENS,
    batch_of,
    changed,
    largest,
    logits_after,
    same,
    watch,
)

# --- watching -------------------------------------------------------------------------------------------------------


def test_an_answer_and_its_trace(load, pixels):
    model = load(**CHOICES)
    memory = watch(model, QUESTIONS[0], [pixels[:21]])
    assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(memory))
    answer = model.answer(memory, max_new_tokens=4)
    assert isinstance(answer.text, str) and answer.tokens.shape[0] == 1
    trace = answer.trace
    assert trace.frames == [21] and trace.grid == (2, 2) and trace.tokens == TOKENS
    assert trace.capacity == largest() and trace.length.shape == (LAYERS, 1)
    width = model.model.config.qformer.width
    assert trace.cache_bytes == 2 * LAYERS * largest() * width * 4
    assert trace.cache_bytes_uncompressed == 2 * LAYERS * 21 * TOKENS * width * 4
    np.testing.assert_array_equal(trace.times, [np.float32(np.arange(21) / 2)])
    for layer in range(LAYERS):
        kept = trace.kept[layer][0]
        assert len(kept) == trace.length[layer, 0] <= largest()
        assert (kept[-2:] == [[20, 3], [20, 4]]).all()  # the newest stay
        assert (np.diff(kept @ [TOKENS, 1]) > 0).all()
    assert not np.array_equal(trace.kept[0][0], trace.kept[1][0])
    memory = model.finish(memory)
    again = model.answer(memory, QUESTIONS[0], max_new_tokens=4)
    np.testing.assert_array_equal(again.tokens, answer.tokens)


@pytest.mark.parametrize("choices", [CHOICES, {**CHOICES, "carry_queries": True}, {}], ids=str)
def test_how_a_video_is_cut_into_windows_changes_no_bit(load, pixels, choices):
    model = load(**choices)
    whole = model.finish(watch(model, QUESTIONS[0], [pixels[:37]], window=37))
    assert whole.read == whole.frames == [37] and whole.waiting is None
    for window in (1, 5, WINDOW, 20):
        same(model.finish(watch(model, QUESTIONS[0], [pixels[:37]], window=window)), whole)


@pytest.mark.parametrize(
    "choices",
    [CHOICES, {**CHOICES, "carry_queries": True}, {**CHOICES, "scores": "shared"}, {"alpha": (0.1, 1.0)}, {}],
    ids=str,
)
def test_a_batch_of_lengths_is_each_alone(load, pixels, choices):
    """Rows of 37, 16 and 3 frames with questions of different lengths: the same tokens stay, logits to 1e-5."""
    model, videos = load(**choices), [pixels[:37], pixels[5:21], pixels[40:43]]
    together = watch(model, QUESTIONS, videos)
    logits, trace = logits_after(model, together), model.answer(together, max_new_tokens=1).trace
    for row, video in enumerate(videos):
        alone = watch(model, [QUESTIONS[row]], [video], window=7)
        np.testing.assert_allclose(logits[row], logits_after(model, alone)[0], atol=1e-5, rtol=0)
        one = model.answer(alone, max_new_tokens=1).trace
        for layer in range(LAYERS):
            np.testing.assert_array_equal(trace.kept[layer][row], one.kept[layer][0])
            np.testing.assert_array_equal(trace.row(row).kept[layer][0], one.kept[layer][0])
        assert trace.row(row).cache_bytes_uncompressed == one.cache_bytes_uncompressed
        np.testing.assert_array_equal(trace.times[row, : len(video)], one.times[0])
        assert np.isnan(trace.times[row, len(video) :]).all()


def test_questions_about_one_video_are_rows(load, pixels):
    """Three rows watch the frames of one: each as if alone, and another question keeps other tokens."""
    model = load(**CHOICES)
    together = watch(model, QUESTIONS, [pixels[:21]])
    assert together.frames.tolist() == [21] * 3 and together.waiting.pixels.shape[0] == 1
    logits, trace = logits_after(model, together), model.answer(together, max_new_tokens=1).trace
    assert trace.times.shape == (1, 21)
    for row, question in enumerate(QUESTIONS):
        alone = watch(model, [question], [pixels[:21]])
        np.testing.assert_allclose(logits[row], logits_after(model, alone)[0], atol=1e-5, rtol=0)
        one = model.answer(alone, max_new_tokens=1).trace
        for layer in range(LAYERS):
            np.testing.assert_array_equal(trace.row(row).kept[layer][0], one.kept[layer][0])
    assert not np.array_equal(trace.source[:, 0], trace.source[:, 1])
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_another_question_is_another_memory(load, pixels):
    for choices in (CHOICES, {}):
        model = load(**choices)
        assert model.asks_once
        memory = watch(model, QUESTIONS[0], [pixels[:4]])
        with pytest.raises(lv.InstructionError, match="watch again"):
            model.answer(memory, QUESTIONS[1], max_new_tokens=1)
        with pytest.raises(lv.PromptError, match="2 questions for a memory of 1"):
            model.answer(memory, QUESTIONS[:2], max_new_tokens=1)
        assert model.answer(memory, QUESTIONS[0], max_new_tokens=1).tokens.shape == (1, 1)


def test_the_plain_model_keeps_everything(load, pixels):
    model = load()
    memory, seen = model.begin(QUESTIONS[0]), 0
    for frames, capacity in ((16, 16), (1, 32), (15, 32), (13, 64)):
        (window,) = batch_of([pixels[seen : seen + frames]], frames)
        memory, seen = model.watch(memory, window), seen + frames
        done = model.finish(lv.fork(memory))
        assert done.cache.capacity == capacity * TOKENS
        np.testing.assert_array_equal(done.cache.length, seen * TOKENS)
        np.testing.assert_array_equal(done.cache.source[:, 0, : seen * TOKENS], [np.arange(seen * TOKENS)] * LAYERS)
    everything = load(alpha=1.0, beta=1.0, capacity=45 * TOKENS)
    exact = watch(everything, QUESTIONS[0], [pixels])
    assert exact.cache.capacity == 45 * TOKENS
    np.testing.assert_allclose(logits_after(everything, exact), logits_after(model, memory), atol=1e-5, rtol=0)


def test_watching_goes_on_after_answering(load, pixels):
    """Two answers in between change no bit of what comes later, and the memory answers as a fresh one does."""
    model = load(**CHOICES)
    memory = watch(model, QUESTIONS[0], [pixels[:21]])
    first = [model.answer(memory, max_new_tokens=4) for _ in range(2)]
    fresh = model.answer(watch(model, QUESTIONS[0], [pixels[:21]]), max_new_tokens=4)
    for frames in batch_of([pixels[21:]], 6, first=21):
        memory = model.watch(memory, frames)
    later = model.answer(memory, max_new_tokens=4)
    same(model.finish(memory), model.finish(watch(model, QUESTIONS[0], [pixels])))
    for one in first:
        np.testing.assert_array_equal(one.tokens, fresh.tokens)
        assert one.trace.frames == [21]
        np.testing.assert_array_equal(one.trace.source, fresh.trace.source)
    assert later.trace.frames == [45]


def test_a_forgetting_memory_is_as_large_after_many_frames(load):
    """1 and 40 minutes at two frames a second: the same programs, and as many bytes on the device."""
    model = load(**{**CHOICES, "carry_queries": True})
    model = load(without_positions(model.model), **{**CHOICES, "carry_queries": True})

    def live():
        return sum(array.nbytes for array in jax.live_arrays())

    def ask(frames, question):
        rng = np.random.default_rng(frames)
        video = np.broadcast_to(rng.integers(0, 256, (97, 28, 28, 3), dtype=np.uint8), (97, 28, 28, 3))
        memory, after = model.begin(question), {}
        for start in range(0, frames, 40):
            (window,) = batch_of([video[start % 97 :][: min(40, frames - start)]], 97)
            memory = model.watch(memory, window)
            after[int(memory.frames[0])] = live()
        return model.answer(memory, max_new_tokens=3), after

    ask(120, QUESTIONS[0])
    with counted_compiles() as compiled:
        answer, after = ask(4800, QUESTIONS[2])
        assert compiled == []
        jax.jit(lambda x: x + 1.75)(1.0)
        assert compiled  # the count can count
    assert answer.trace.frames[0] > 3000
    bytes_ = [size for frames, size in sorted(after.items()) if frames > 20]
    assert max(bytes_) == min(bytes_)
    assert answer.trace.capacity == largest()


class counted_compiles(logging.Handler):
    """A context that gives the list of what has been compiled in it."""

    def __enter__(self):
        super().__init__()
        self.found = []
        jax.config.update("jax_log_compiles", True)
        logging.getLogger("jax").addHandler(self)
        return self.found

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self)
        jax.config.update("jax_log_compiles", False)

    def emit(self, record):
        if "Compiling" in record.getMessage():
            self.found.append(record.getMessage())


def without_positions(module):
    return changed(module, None)
