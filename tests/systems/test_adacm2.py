"""AdaCM2 as a system: batches, streams, questions, bounded memory, and what may not be compiled twice."""

import dataclasses
import functools
import json
import logging
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longvid_jax as lv
from longvid_jax import convert
from longvid_jax.convert.folder import files_beside
from longvid_jax.errors import VideoWarning
from longvid_jax.memory import adacm2
from longvid_jax.models.instructblip import InstructBlip, InstructBlipConfig
from longvid_jax.models.layers import Embed
from longvid_jax.models.paths import leaves
from longvid_jax.systems.adacm2 import WINDOW
from longvid_jax.train import config, models
from longvid_jax.train.export import export

SMOKE = f"{Path(__file__).parents[2] / 'configs' / 'adacm2.py'}:smoke"
TOKENS, LAYERS, POSITIONS = 5, 2, 64  # of a frame of 28 x 28 pixels, that cross-attend, and of frames
QUESTIONS = ["what colour is the circle?", "how many squares are there, and where?", "is it red?"]
CHOICES = {"alpha": 0.3, "beta": 0.5}


def randomised(module):
    """No parameter at its usual initial value, so that the question and what is seen matter."""
    for number, leaf in enumerate(leaves(module)):
        drawn = np.random.default_rng(number).normal(size=leaf.value.shape).astype(np.float32)
        around = 1.0 if leaf.path.endswith("scale") else 0.0
        yield jnp.asarray(around + 0.15 * drawn)


def with_random(module):
    return jax.tree.unflatten(jax.tree.structure(module), list(randomised(module)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with both tokenizers, as training writes it."""
    wanted = config.load(SMOKE, ["--config.model.qformer_config.num_hidden_layers=4"])
    model, module = models.build(wanted)
    return export(with_random(module), model, wanted, tmp_path_factory.mktemp("adacm2"))


@pytest.fixture(scope="module")
def load(folder):
    """load(**choices): the model with a method of its own; without choices the plain one."""
    plain = lv.load(folder)

    def load(module=None, **choices):
        method = lv.AdaCM2(**choices) if choices else None
        module = plain.model if module is None else module
        return type(plain)(module, plain.settings, method=method, tokenizer=plain.tokenizer, words=plain.words)

    return load


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (45, 28, 28, 3), dtype=np.uint8)


def batch_of(videos, window, first=0):
    """Windows of several videos [T, H, W, 3] side by side, blank behind the end of each; first: a frame's number."""
    for start in range(0, max(map(len, videos)), window):
        rows = [video[start : start + window] for video in videos]
        width = max(map(len, rows))
        padded = [np.pad(row, ((0, width - len(row)),) + ((0, 0),) * 3) for row in rows]
        valid = np.stack([np.arange(width) < len(row) for row in rows])
        times = np.broadcast_to(np.float32((first + np.arange(start, start + width)) / 2), valid.shape)
        yield lv.Frames(np.stack(padded), times, valid)


def watch(model, questions, videos, window=6):
    memory = model.begin(questions)
    for frames in batch_of(videos, window):
        memory = model.watch(memory, frames)
    return memory


def logits_after(model, memory):
    """The logits of the first tokens of an answer, through the machine that answer() runs on."""
    out, _ = model._decode(model.finish(lv.fork(memory)), max_new_tokens=3, keep_logits=True)
    return np.asarray(out.logits)


def same(memory, again):
    ours, theirs = jax.tree.flatten(memory), jax.tree.flatten(again)
    assert ours[1] == theirs[1]
    for x, y in zip(ours[0], theirs[0], strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def largest(alpha=CHOICES["alpha"], beta=CHOICES["beta"]):
    return adacm2.largest(TOKENS, alpha, beta)


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
        answer, after = ask(4800, QUESTIONS[1])
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


def changed(module, frames):
    """A copy of a network with other frame positions, an Embed or None."""
    module = nnx.merge(*nnx.split(module))
    count = 0 if frames is None else frames.shape[0]
    module.config = dataclasses.replace(module.config, num_frames=count)
    module.frames = None
    if frames is not None:
        module.frames = Embed(*frames.shape, dtype=jnp.float32, rngs=nnx.Rngs(0))
        module.frames.embedding.set_value(frames)
    return module


def without_positions(module):
    return changed(module, None)


# --- frames ---------------------------------------------------------------------------------------------------------


def test_frames_beyond_the_positions_get_the_last(load, pixels):
    """One warning, however long it goes on, and what a longer table with its last row repeated gives."""
    model, video = load(**CHOICES), np.concatenate([pixels, pixels, pixels])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        memory = watch(model, QUESTIONS[0], [video[:135]], window=10)
        logits = logits_after(model, memory)
    assert [str(one.message)[:40] for one in said] == [f"The model knows {POSITIONS} frame positions; frame"[:40]]
    assert said[0].category is VideoWarning
    table = model.model.frames.embedding[...]
    longer = load(changed(model.model, jnp.concatenate([table, jnp.repeat(table[-1:], 100, axis=0)])), **CHOICES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(
            logits_after(longer, watch(longer, QUESTIONS[0], [video])), logits, atol=1e-6, rtol=0
        )
        watch(model, QUESTIONS[0], [video[:POSITIONS]])  # as many as there are


def test_frames_of_another_size_are_interpolated(load):
    model, frames = load(**CHOICES), np.zeros((17, 28, 42, 3), np.uint8)
    with pytest.warns(VideoWarning, match="2 x 3 patches: the model's positions are for 2 x 2, and are interpolated"):
        memory = watch(model, QUESTIONS[0], [frames])
    assert model.answer(memory, max_new_tokens=1).trace.grid == (2, 3)
    with pytest.raises(lv.OptionError, match="must have one size"):
        (window,) = batch_of([np.zeros((3, 28, 28, 3), np.uint8)], 3)
        model.watch(memory, window)


def test_frames_that_are_no_patches(load):
    model = load(**CHOICES)
    with pytest.raises(lv.OptionError, match="30x28 .*multiples of 14"):
        watch(model, QUESTIONS[0], [np.zeros((16, 28, 30, 3), np.uint8)], window=16)


def test_the_size_of_frames(load, clip):
    model = load(**CHOICES)
    assert model.frame_size(lv.Video(clip)) == (28, 28)
    assert model.frame_size(lv.Video(clip, long_side=84)) == (42, 84)
    frames = next(iter(model.stream(lv.Video(clip))))
    assert frames.pixels.shape[2:] == (28, 28, 3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A file of a second, twice as wide as it is high."""
    import av

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for n in range(8):
            picture = np.full((64, 128, 3), 30 * n, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


# --- choices --------------------------------------------------------------------------------------------------------


def test_a_capacity_is_enough_or_an_error(load, pixels):
    needed = largest()
    with pytest.raises(lv.OptionError, match=f"capacity is {needed - 1}, .* any frames of 5 tokens .* {needed};"):
        watch(load(**CHOICES, capacity=needed - 1), QUESTIONS[0], [pixels], window=16)
    with pytest.raises(lv.OptionError, match="capacity is 100, .* 32 frames of 5 tokens .* 160;"):
        watch(load(alpha=1.0, capacity=100), QUESTIONS[0], [pixels], window=16)
    model, roomy = load(**CHOICES), load(**CHOICES, capacity=40)
    memory = watch(roomy, QUESTIONS[0], [pixels])
    assert memory.cache.capacity == 40
    np.testing.assert_allclose(
        logits_after(roomy, memory), logits_after(model, watch(model, QUESTIONS[0], [pixels])), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"alpha": 0.0}, "alpha is 0.0, but must be above 0"),
        ({"alpha": (0.5, 1.5)}, "alpha is 1.5"),
        ({"beta": -1}, "beta is -1"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"capacity": 0}, "capacity is 0"),
        ({"scores": "best"}, "scores is 'best', but must be one of attention, shared, random, recent"),
    ],
)
def test_options_that_do_not_go(choices, says):
    with pytest.raises(lv.OptionError, match=says):
        lv.AdaCM2(**choices)


def test_options_that_do_not_go_with_a_model(load):
    for choices, says in (
        ({"alpha": (0.1, 0.2, 0.3)}, "alpha has 3 values, but this Q-Former has 2 such layers"),
        ({"alpha": (0.1, 0.2), "scores": "shared"}, "give all one alpha"),
    ):
        with pytest.raises(lv.OptionError, match=says):
            load(**choices)
    assert load(alpha=(0.1, 0.1), scores="shared").policy.alpha == (0.1, 0.1)


def test_scores_to_compare_with(load, pixels):
    """As many tokens as attention keeps: the newest ones, or drawn by seed; one set for all layers where shared."""

    def kept(**choices):
        model = load(**CHOICES, **choices)
        return model.answer(watch(model, QUESTIONS[0], [pixels]), max_new_tokens=1).trace.source[:, 0]

    attention, recent, shared = kept(), kept(scores="recent"), kept(scores="shared")
    drawn = [kept(scores="random", seed=seed) for seed in (0, 0, 1)]
    for other in (recent, shared, *drawn):
        np.testing.assert_array_equal(np.sort(other < 0), np.sort(attention < 0))
    np.testing.assert_array_equal(shared[0], shared[1])
    np.testing.assert_array_equal(recent[0], recent[1])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert len({each.tobytes() for each in map(np.asarray, (attention, recent, shared, *drawn[1:]))}) == 5
    assert recent[0].sum() >= max(other[0].sum() for other in (attention, shared, *drawn))


def test_carried_queries_are_the_checkpoints_or_ones_own(load, pixels):
    plain, learned, carried = load(**CHOICES), *(load(**CHOICES, carry_queries=flag) for flag in (False, True))
    assert not plain.carry_queries
    first, second, third = (
        logits_after(model, watch(model, QUESTIONS[0], [pixels])) for model in (plain, learned, carried)
    )
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - third).max() > 1e-3
    trained = nnx.merge(*nnx.split(plain.model))
    trained.config = dataclasses.replace(trained.config, carry_queries=True)
    assert load(trained, **CHOICES).carry_queries and not load(trained, **CHOICES, carry_queries=False).carry_queries


# --- answering ------------------------------------------------------------------------------------------------------


def test_calls_that_do_not_go(load, folder, pixels):
    model = load(**CHOICES)
    with pytest.raises(lv.PromptError, match="Nothing was watched"):
        model.answer(model.begin(QUESTIONS[0]))
    with pytest.raises(lv.PromptError, match="empty"):
        model.begin("  ")
    with pytest.raises(lv.PromptError, match="the Q-Former reads 64; shorten"):
        model.begin("why " * 70)
    memory = watch(model, QUESTIONS[0], [pixels[:4]])
    for how, says in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature"),
        ({"min_new_tokens": 2, "temperature": 0.5}, "temperature"),
    ):
        with pytest.raises(lv.OptionError, match=says):
            model.answer(memory, **how)
    without = type(model)(model.model, model.settings, method=model.method, tokenizer=model.tokenizer)
    with pytest.raises(lv.PromptError, match="no tokenizer for its Q-Former"):
        without.begin(QUESTIONS[0])
    with pytest.raises(lv.OptionError, match="for lv.AdaCM2"):
        lv.load(folder, method=lv.ReTaKe(keep_ratio=0.5))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(3)
    return {
        "pixel_values": rng.normal(size=(2, 3, 3, 28, 28)).astype(np.float32),
        "qformer_input_ids": rng.integers(5, 40, (2, 6)),
        "input_ids": rng.integers(5, 40, (2, 9)),
    }


def test_inputs_that_do_not_go(load, inputs):
    model = load(**CHOICES)
    image = model.settings.video_token
    for changes, says in (
        ({"pixel_values": np.zeros((2, 3, 28, 28, 3))}, re.escape("[2, 3, 28, 28, 3], but must be")),
        ({"pixel_values": np.zeros((3, 28, 28))}, "pixel_values"),
        ({"pixel_values": np.zeros((2, 0, 3, 28, 28))}, "pixel_values"),
        ({"frame_mask": np.ones((2, 4))}, "frame_mask"),
        ({"frame_mask": np.array([[1, 0, 1], [1, 1, 1]])}, "frame_mask"),
        ({"frame_mask": np.array([[0, 0, 0], [1, 1, 1]])}, "frame_mask"),
        ({"input_ids": None}, "input_ids must hold a row for each of the 2"),
        ({"input_ids": inputs["input_ids"][:1]}, "input_ids must hold"),
        ({"input_ids": inputs["input_ids"][0]}, "input_ids must hold"),
        ({"input_ids": np.full((2, 9), image)}, "holds the image token 9 times, but there are 4 queries"),
        ({"attention_mask": np.ones((2, 8))}, "attention_mask has the shape"),
        ({"qformer_input_ids": None}, "qformer_input_ids must hold"),
        ({"qformer_input_ids": np.ones((1, 6), int)}, "qformer_input_ids must hold"),
        ({"qformer_input_ids": np.ones((2, 65), int)}, "has 65 tokens, but the Q-Former reads 64"),
        ({"qformer_attention_mask": np.ones((2, 65), int)}, "qformer_attention_mask has the shape"),
    ):
        with pytest.raises(lv.PromptError, match=says):
            model.generate(**{**inputs, **changes}, max_new_tokens=2)
    with pytest.raises(lv.OptionError, match="multiples of 14"):
        model.generate(**{**inputs, "pixel_values": np.zeros((2, 3, 3, 28, 30))}, max_new_tokens=2)


def test_generate_pads_as_it_is_told(load, inputs):
    """An instruction as long as the Q-Former reads, in any padding, is what it is; so are prompts and frames."""
    model = load(**CHOICES)
    alone = model.generate(**inputs, max_new_tokens=2)
    pad = np.zeros((2, 58), int)
    padded = {
        "pixel_values": np.pad(inputs["pixel_values"], ((0, 0), (0, 20)) + ((0, 0),) * 3, constant_values=9.0),
        "frame_mask": np.arange(23) < np.full((2, 1), 3),
        "qformer_input_ids": np.concatenate([inputs["qformer_input_ids"], pad], axis=1),
        "qformer_attention_mask": np.arange(64) < np.full((2, 1), 6),
        "input_ids": np.concatenate([pad, inputs["input_ids"]], axis=1),
        "attention_mask": np.arange(67) >= np.full((2, 1), 58),
    }
    out = model.generate(**padded, max_new_tokens=2)
    np.testing.assert_allclose(out.logits, alone.logits, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(out.trace.source, alone.trace.source)
    longest = {**inputs, "qformer_input_ids": np.full((2, 64), 7)}
    assert np.isfinite(model.generate(**longest, max_new_tokens=2).logits).all()


def test_generate_is_begin_watch_answer(load, pixels):
    """The same frames and tokens by both ways: the same tokens stay, and the logits agree."""
    model = load(**CHOICES)
    memory = watch(model, QUESTIONS[0], [pixels])
    settings = model.settings
    normal = (pixels / np.float32(255) - np.float32(settings.mean)) / np.float32(settings.std)
    ids, places = memory.ids[0], memory.places[0]
    prompt = np.where(places >= 0, settings.video_token, ids)[ids >= 0]
    out = model.generate(
        np.moveaxis(normal, -1, 1)[None], memory.instruction[:, (memory.instruction >= 0)[0]], None, prompt[None],
        max_new_tokens=3,
    )  # fmt: skip
    np.testing.assert_allclose(out.logits[0], logits_after(model, memory)[0][: out.logits.shape[1]], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(out.trace.source, model.finish(memory).cache.source)


# --- a Q-Former without words ---------------------------------------------------------------------------------------


def test_without_words_the_memory_is_of_no_question(folder, pixels, tmp_path):
    """A BLIP-2: loading it says so; all questions are answered from one memory."""
    values = {**json.loads((folder / "config.json").read_text()), "model_type": "blip-2"}
    values["qformer_config"] = {**values["qformer_config"], "use_qformer_text_input": False}
    made = functools.partial(InstructBlip, InstructBlipConfig.from_huggingface(values))
    module = with_random(jax.eval_shape(lambda: made(rngs=nnx.Rngs(0))))
    beside = [file for file in files_beside(folder) if file.parent == folder]
    convert.save_huggingface(module, values, tmp_path / "blip2", convert.table_for(values), beside=beside)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = lv.load(tmp_path / "blip2", method=lv.AdaCM2(**CHOICES))
    assert [str(one.message).partition(": ")[2] for one in said if one.category is VideoWarning] == [
        "its Q-Former takes no instruction, so what is kept of a video does not depend on the question."
    ]
    assert not model.asks_once
    memory = watch(model, QUESTIONS[0], [pixels])
    other = watch(model, QUESTIONS[1], [pixels])
    assert memory.instruction is None
    for ours, theirs in zip(*(jax.tree.leaves((each.cache, each.outputs)) for each in (memory, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    answer = model.answer(memory, QUESTIONS[1], max_new_tokens=3)
    np.testing.assert_array_equal(answer.tokens, model.answer(other, max_new_tokens=3).tokens)
    out = model.generate(np.zeros((1, 3, 28, 28), np.float32), input_ids=np.full((1, 5), 9), max_new_tokens=1)
    assert np.isfinite(out.logits).all()


# --- on disk, and over devices --------------------------------------------------------------------------------------


def test_a_memory_comes_back_and_goes_on(load, pixels, tmp_path):
    model = load(**CHOICES)
    begun = model.begin(QUESTIONS[0])
    same(begun, lv.restore(lv.save(begun, tmp_path / "begun")))
    memory = watch(model, QUESTIONS[0], [pixels[:21]])
    again = lv.restore(lv.save(memory, tmp_path / "watched"))
    same(memory, again)
    for frames in batch_of([pixels[21:]], 6):
        memory, again = model.watch(memory, frames), model.watch(again, frames)
    same(model.finish(memory), model.finish(again))


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}], ids=str)
def test_spread_over_devices_it_is_the_same(folder, load, pixels, shape):
    """Four videos of different lengths, streamed and through generate: the same tokens stay, logits to 1e-5."""
    mesh = lv.make_mesh(**shape)
    spread, model = lv.load(folder, method=lv.AdaCM2(**CHOICES), mesh=mesh), load(**CHOICES)
    kernel = spread.model.text.layers.mlp.up.kernel[...]
    assert not kernel.sharding.is_fully_replicated
    videos, questions = [pixels[:n] for n in (20, 17, 9, 1)], [*QUESTIONS, QUESTIONS[0]]
    memories = [each.finish(watch(each, questions, videos)) for each in (spread, model)]
    np.testing.assert_array_equal(memories[0].cache.source, memories[1].cache.source)
    np.testing.assert_allclose(memories[0].outputs, memories[1].outputs, atol=1e-5, rtol=0)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    assert memories[0].cache.keys.sharding.shard_shape(memories[0].cache.keys.shape)[1] == 4 // rows
    answers = [each.answer(one, max_new_tokens=4) for each, one in zip((spread, model), memories, strict=True)]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
    rng = np.random.default_rng(4)
    given = {
        "pixel_values": rng.normal(size=(4, 2, 3, 28, 28)).astype(np.float32),
        "qformer_input_ids": rng.integers(5, 40, (4, 6)),
        "input_ids": rng.integers(5, 40, (4, 9)),
    }
    outs = [each.generate(**given, max_new_tokens=3) for each in (spread, model)]
    np.testing.assert_allclose(outs[0].logits, outs[1].logits, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(
        *(each.generate(**given, max_new_tokens=3, num_beams=3).tokens for each in (spread, model))
    )
