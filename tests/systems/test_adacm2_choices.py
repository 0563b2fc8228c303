"""AdaCM2 as a system: frames, options and inputs of all kinds, and what does not go; on disk, and over devices."""

import dataclasses
import functools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longvid_jax as lv
from longvid_jax import convert
from longvid_jax.convert.folder import files_beside
from longvid_jax.errors import VideoWarning
from longvid_jax.models.instructblip import InstructBlip, InstructBlipConfig
from tests.systems.small_adacm2 import (
    CHOICES,
    POSITIONS,
    QUESTIONS,
    batch_of,
    changed,
    largest,
    logits_after,
    same,
    watch,
    with_random,
)

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
        logits_after(roomy, memory), logits_after(model, watch(model, QUESTIONS[0], [pixels])), atol=1e-5, rtol=0
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
