"""ReWind as a system: against its definition in float64, batches, streams, frames looked at again, and bad input."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax.errors import VideoWarning
from longvid_jax.video.synthetic import World
from longvid_jax.video.synthetic_file import write_video
from tests.memory.test_frame_selection import numpy_density_peaks
from tests.models.rewind_oracle import Oracle
from tests.systems.small_adacm2 import QUESTIONS, batch_of, same, watch
from tests.systems.small_rewind import CHOICES, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("rewind"))


@pytest.fixture(scope="module")
def load(folder):
    """load(**choices): the model with these choices, or CHOICES."""
    plain = lv.load(folder)

    def load(**choices):
        method = lv.ReWind(**{**CHOICES, **choices})
        return type(plain)(plain.model, plain.settings, method=method, tokenizer=plain.tokenizer, words=plain.words)

    return load


def logits_after(model, memory, **how):
    out, trace = model._decode(model.finish(lv.fork(memory)), max_new_tokens=3, keep_logits=True, **how)
    return np.asarray(out.logits), trace


# --- what it computes -------------------------------------------------------------------------------------------------


def test_an_answer_is_what_the_definition_gives(load, pixels):
    """From features on: memory, relevance, candidates, density peaks and the decoder's prompt, one thing at a time."""
    model, video, question = load(), pixels[:21], QUESTIONS[1]
    memory = model.finish(watch(model, question, [video]))
    network, settings = model.model, model.settings
    shown = (video / 255 - np.array(settings.mean)) / np.array(settings.std)
    features = np.asarray(network.features(jnp.asarray(shown, jnp.float32)))
    told = np.array(model.words(question)["input_ids"])[None]
    outputs = np.asarray(network.bert(told, np.ones(told.shape, bool))[0])[0]

    oracle = Oracle(network.perceiver, network.memory, network.config.perceiver)
    words = oracle.words(outputs)
    tokens, keys, _ = oracle.watch(features, words, CHOICES["clip_frames"])
    np.testing.assert_allclose(memory.written.tokens[0, :21], tokens, atol=1e-4)
    assert memory.read == [21]

    logits, trace = logits_after(model, memory)
    p, heads = oracle.memory, network.config.perceiver.heads
    query = oracle.linear(p, "reading/q", oracle.norm(p, "read_norm", sum(words) / len(words)))
    split = np.array(keys).reshape(21 * 2, heads, -1)
    weights = np.exp(np.einsum("hd,nhd->hn", query.reshape(heads, -1), split) / np.sqrt(split.shape[-1]))
    relevance = (weights / weights.sum(1, keepdims=True)).sum(0).reshape(21, 2).sum(1)
    np.testing.assert_allclose(trace.relevance[0], relevance, atol=1e-4)
    candidates = np.sort(np.argsort(-relevance, kind="stable")[: CHOICES["num_candidates"]])
    np.testing.assert_array_equal(trace.candidates[0], candidates)
    mean = np.array(tokens).mean(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    everywhere = np.ones(len(candidates), bool)
    peaks = numpy_density_peaks(mean[candidates], everywhere, CHOICES["num_neighbors"], CHOICES["num_selected"])
    np.testing.assert_array_equal(trace.selected[0], candidates[peaks])

    # A grid of 4 x 4 patches in 2 x 2 cells, row by row; kept in bfloat16.
    cells = features.reshape(21, 2, 2, 2, 2, -1).mean((2, 4)).reshape(21, 4, -1)[trace.selected[0]]
    detail = jnp.asarray(cells, jnp.bfloat16).astype(jnp.float32).reshape(-1, cells.shape[-1])
    vectors = [
        network.memory_projection(jnp.asarray(np.array(tokens).reshape(42, -1), jnp.float32)),
        network.separator[...],
        network.detail_projection(detail),
    ]
    ids, places = (x[0] for x in model._prompts([question]))
    at, end = int(np.argmax(places == 0)), int((ids >= 0).sum())
    before, behind = (network.text.embed(jnp.asarray(part)) for part in (ids[:at], ids[at + 1 : end]))
    x = jnp.concatenate([before, *vectors, behind])[None]
    positions = jnp.arange(x.shape[1])[None, :, None]
    hidden, _ = network.text(x, positions, jnp.ones(x.shape[:2], bool))
    np.testing.assert_allclose(logits[0, 0], network.text.logits(hidden[:, -1])[0], atol=2e-3)


def test_an_answer_and_its_trace(load, pixels):
    model = load()
    memory = watch(model, QUESTIONS[0], [pixels[:21]])
    assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(memory))
    answer = model.answer(memory, max_new_tokens=4)
    assert isinstance(answer.text, str) and answer.tokens.shape[0] == 1
    trace = answer.trace
    assert trace.frames == [21] and trace.grid == (4, 4) and trace.tokens == 2 and trace.capacity == 64
    assert trace.cache_bytes == 3 * 64 * 2 * 16 * 4 and trace.detail_bytes == 64 * 4 * 16 * 2
    np.testing.assert_array_equal(trace.times, [np.float32(np.arange(21) / 2)])
    assert trace.thumbnails.shape == (1, 21, 28, 28, 3) and (trace.thumbnails[0] == pixels[:21]).all()
    assert len(trace.candidates[0]) == 6 and len(trace.selected[0]) == 3
    assert set(trace.selected[0]) <= set(trace.candidates[0]) and len(trace.relevance[0]) == 21
    again = model.answer(model.finish(memory), QUESTIONS[0], max_new_tokens=4)
    np.testing.assert_array_equal(again.tokens, answer.tokens)


# --- streams and batches ----------------------------------------------------------------------------------------------


def test_how_a_video_is_cut_into_windows_changes_no_bit(load, pixels):
    """More than 64 frames, so that the memory grows on the way."""
    model, video = load(), np.concatenate([pixels, pixels])[:70]
    whole = model.finish(watch(model, QUESTIONS[0], [video], window=70))
    assert whole.read == whole.frames == [70] and whole.written.capacity == 128 and whole.waiting is None
    for window in (1, 7, 16):
        same(model.finish(watch(model, QUESTIONS[0], [video], window=window)), whole)


def test_a_batch_of_lengths_is_each_alone(load, pixels):
    """Of more frames than are candidates, fewer than those, fewer than are selected, and a single one."""
    model, videos = load(), [pixels[:20], pixels[20:25], pixels[30:32], pixels[40:41]]
    questions = [*QUESTIONS, QUESTIONS[0]]
    together, trace = logits_after(model, watch(model, questions, videos))
    for row, (question, video) in enumerate(zip(questions, videos, strict=True)):
        alone, own = logits_after(model, watch(model, question, [video]))
        np.testing.assert_allclose(together[row, 0], alone[0, 0], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(trace.selected[row], own.selected[0])
        assert len(own.selected[0]) == min(3, len(video))


def test_watching_goes_on_after_an_answer(load, pixels):
    model = load()
    memory = model.begin(QUESTIONS[0])
    for frames in batch_of([pixels[:21]], 6):
        memory = model.watch(memory, frames)
        model.answer(memory, max_new_tokens=1)
    same(model.finish(memory), model.finish(watch(model, QUESTIONS[0], [pixels[:21]])))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(World(5, seconds=9), tmp_path_factory.mktemp("clip") / "world.mp4", size=(28, 28), fps=4)


def test_details_from_anywhere_are_the_same(load, clip):
    """Kept on the device or on the host, or decoded again; one question or several."""
    video, answers = lv.Video(clip, fps=2), []
    for how in ({}, {"offload": True}, {"detail": "redecode"}):
        model = load(**how)
        answers.append(model.ask(video, QUESTIONS[:2], max_new_tokens=4))
        held = answers[-1][0].trace.detail_bytes
        assert bool(held) == (how.get("detail") != "redecode")
    alone = load().ask(video, QUESTIONS[1], max_new_tokens=4)
    for one in answers:
        assert [each.text for each in one] == [each.text for each in answers[0]]
        assert one[1].text == alone.text
        np.testing.assert_array_equal(one[1].trace.selected[0], alone.trace.selected[0])
    model = load(detail="redecode")
    memory = model.begin(QUESTIONS[0], video=video)
    for frames in model.stream(video):
        memory = model.watch(memory, frames)
    with pytest.raises(
        lv.OptionError, match="detail is 'redecode', so answer\\(\\) needs the video again; give video="
    ):
        model.answer(memory)
    assert model.answer(memory, video=video, max_new_tokens=4).text == answers[0][0].text


def test_spread_over_devices_it_is_the_same(folder, load, pixels):
    """Four videos of different lengths on a mesh: the same memory to 1e-5, the same frames, the same tokens."""
    mesh = lv.make_mesh(data=2, fsdp=2, tensor=2)
    spread, model = lv.load(folder, method=lv.ReWind(**CHOICES), mesh=mesh), load()
    assert not spread.model.perceiver.layers.mlp.fc1.kernel[...].sharding.is_fully_replicated
    videos, questions = [pixels[:n] for n in (20, 17, 9, 1)], [*QUESTIONS, QUESTIONS[0]]
    memories = [each.finish(watch(each, questions, videos)) for each in (spread, model)]
    for name in ("tokens", "keys", "values"):
        ours, theirs = (getattr(one.written, name) for one in memories)
        np.testing.assert_allclose(ours[:, :20], theirs[:, :20], atol=1e-5, rtol=0)
        assert ours.sharding.shard_shape(ours.shape)[0] == 1
    assert memories[0].details.sharding.shard_shape(memories[0].details.shape)[0] == 1
    answers = [each.answer(one, max_new_tokens=4) for each, one in zip((spread, model), memories, strict=True)]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
    for ours, theirs in zip(*(one.trace.selected for one in answers), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_generate_is_watching_and_answering(load, pixels):
    model, question = load(), QUESTIONS[1]
    memory = watch(model, question, [pixels[:10]])
    expected, _ = logits_after(model, memory)
    shown = (pixels[:10] / 255 - np.array(model.settings.mean)) / np.array(model.settings.std)
    ids = model._prompts([question])[0][0]
    ids = np.where(model._prompts([question])[1][0] == 0, model.settings.video_token, ids)
    out = model.generate(
        np.moveaxis(shown, -1, 1)[None].astype(np.float32),
        bert_input_ids=np.array(model.words(question)["input_ids"])[None],
        input_ids=ids[ids >= 0][None],
        max_new_tokens=3,
    )
    np.testing.assert_allclose(out.logits[:, 0], expected[:, 0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(out.trace.thumbnails[0], pixels[:10], atol=1)
    with pytest.raises(lv.PromptError, match="bert_input_ids must hold a row for each of the 1 videos"):
        model.generate(np.moveaxis(shown, -1, 1)[None], input_ids=ids[None])


def test_saved_and_restored(load, pixels, tmp_path):
    for how in ({}, {"offload": True}, {"detail": "redecode"}):
        memory = watch(load(**how), QUESTIONS[0], [pixels[:18]])
        same(lv.restore(lv.save(memory, tmp_path / str(len(how) + bool(how.get("detail"))))), memory)


# --- what does not go -------------------------------------------------------------------------------------------------


def test_another_question_needs_another_watching(load, pixels):
    model = load()
    memory = watch(model, QUESTIONS[0], [pixels[:5]])
    with pytest.raises(lv.InstructionError, match="begin\\(\\) and watch again"):
        model.answer(memory, QUESTIONS[1])
    with pytest.raises(lv.PromptError, match="Nothing was watched yet"):
        model.answer(model.begin(QUESTIONS[0]))
    with pytest.raises(lv.PromptError, match="The question is empty"):
        model.begin(" ")
    with pytest.raises(lv.OptionError, match="30x28 .*multiples of 7"):
        watch(model, QUESTIONS[0], [np.zeros((16, 28, 30, 3), np.uint8)], window=16)


def test_a_question_that_is_too_long_for_the_bert_loses_its_end(load, pixels):
    model, long = load(), " ".join(["is the circle red or blue and where is it?"] * 4)
    with pytest.warns(VideoWarning, match="The question has .* tokens, but the BERT reads 24"):
        memory = model.begin(long)
    assert memory.instruction.shape == (1, 24) and memory.instruction[0, -1] == model.words.sep_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.begin("is it red?")


@pytest.mark.parametrize(
    ("choices", "fault"),
    [
        ({"clip_frames": 0}, "clip_frames is 0, but must be at least 1"),
        ({"num_selected": 65}, "num_selected is 65, but must be at most the 64 candidates"),
        ({"detail": "both"}, "detail is 'both', but must be buffer or redecode"),
    ],
)
def test_choices_that_are_refused(choices, fault):
    with pytest.raises(lv.OptionError, match=fault):
        lv.ReWind(**choices)
