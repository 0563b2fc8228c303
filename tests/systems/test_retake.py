"""ReTaKe as a system: batches, streams, dropped frames, guided compression, and what may not be compiled twice."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax.memory.state import rows
from longvid_jax.ops.topk import compact
from tests.systems import golden

NAME = "pivotkv_r60_dpselect_patch"
QUESTION = "t5 t6 t7"


@pytest.fixture(scope="module")
def load():
    """load(**choices): the case's model with another method."""
    plain = lv.load(golden.FOLDER / NAME)

    def load(**choices):
        method = lv.ReTaKe(**{"keep_ratio": 0.5, "chunk_frames": 4, **choices}) if choices else None
        model = type(plain)(plain.model, plain.settings, method=method)
        golden.with_tokenizer(model, golden.vectors(NAME))
        return model

    return load


@pytest.fixture(scope="module")
def pixels():
    """Frames float32 [24, 16, 24, 3]: a different grid from the golden cases."""
    return np.random.default_rng(0).uniform(0, 255, (24, 16, 24, 3)).astype(np.float32)


def batch_of(videos, window):
    """Windows of several videos [T, H, W, 3] side by side, blank behind the end of each."""
    longest = max(map(len, videos))
    for start in range(0, longest, window):
        rows = [video[start : start + window] for video in videos]
        width = max(map(len, rows))
        padded = [np.pad(row, ((0, width - len(row)),) + ((0, 0),) * 3) for row in rows]
        valid = np.stack([np.arange(width) < len(row) for row in rows])
        times = np.broadcast_to(np.float32(np.arange(start, start + width) / 2), valid.shape)
        yield lv.Frames(np.stack(padded), times, valid)


def watch(model, questions, videos, window=6, **begin):
    memory = model.begin(questions, expected_frames=[len(video) for video in videos], **begin)
    for frames in batch_of(videos, window):
        memory = model.watch(memory, frames)
    return memory


def logits_after(model, memory):
    """The logits of the first tokens of an answer, through the machine that answer() runs on."""
    finished = model.finish(lv.fork(memory))
    with model._reader.on_mesh():
        out, _ = model._decode(finished, memory.prompt, max_new_tokens=4, keep_logits=True)
    return np.asarray(out.logits)


CHOICES = {
    "plain": {},
    "patch": {"keep_ratio": 0.4},
    "frame, always": {"dpselect": "frame", "pivots": "always"},
    "budget": {"keep_ratio": None, "budget": 40, "dpselect": None},
    "drop": {"dpselect": "frame", "dpselect_ratio": 0.5, "keep_ratio": 1.0},
    "guided": {"prompt_guided": True},
    "not reforged": {"reforge": False},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_a_batch_of_lengths_is_each_alone(load, pixels, choices):
    """Rows of 24, 9 (odd) and 3 frames with questions of different lengths: each as if it were alone, to 1e-5."""
    model = load(**choices)
    videos, questions = [pixels, pixels[5:14], pixels[20:23]], [QUESTION, "t9", "t11 t12 t13 t14 t15"]
    together = logits_after(model, watch(model, questions, videos))
    for row, (video, question) in enumerate(zip(videos, questions, strict=True)):
        alone = logits_after(model, watch(model, [question], [video], window=7))
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("choices", [CHOICES[name] for name in ("patch", "drop", "not reforged")])
def test_rows_of_a_memory_are_each_alone(load, pixels, choices, finished):
    """Rows that are chosen, turned round and repeated: where the longest is left out, what was allotted to it goes."""
    model, videos = load(**choices), [pixels, pixels[5:14], pixels[20:23]]
    memory = watch(model, [QUESTION, "t9", "t11 t12"], videos, window=4)
    whole = logits_after(model, memory)
    memory = model.finish(memory) if finished else memory
    chosen = rows(memory, [2, 1, 2])
    assert chosen.offset == int(chosen.cache.offset) < memory.offset
    np.testing.assert_allclose(logits_after(model, chosen), whole[[2, 1, 2]], atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits_after(model, memory), whole, atol=1e-5, rtol=0)  # it stays


def test_random_scores_take_no_more_and_no_less(load, pixels):
    """The cache is as long as with attention's scores, but holds other tokens, by seed, layer and chunk."""
    choices = {"keep_ratio": 0.5, "dpselect": None}
    scored = load(**choices).answer(watch(load(**choices), QUESTION, [pixels]), max_new_tokens=2).trace
    drawn = []
    for seed in (0, 0, 1):
        model = load(**choices, scores="random", seed=seed)
        drawn.append(model.answer(watch(model, QUESTION, [pixels]), max_new_tokens=2).trace)
        assert drawn[-1].cache_length == scored.cache_length
    one, again, other = ([np.concatenate(layer, axis=1)[0] for layer in trace.kept] for trace in drawn)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one[0], other[0]) and not np.array_equal(one[0], one[1])
    assert not np.array_equal(drawn[0].kept[0][0], drawn[0].kept[0][1])


def test_frame_size_makes_room_from_the_start(load, pixels):
    model = load(keep_ratio=1.0)
    known = model.begin(QUESTION, expected_frames=480, frame_size=pixels.shape[1:3])
    assert known.cache.capacity > 480 / 2 * 6 > model.begin(QUESTION, expected_frames=480).cache.capacity


def test_padding_on_either_side_changes_nothing(load):
    model, vectors = load(keep_ratio=0.5), golden.vectors(NAME)
    given = golden.inputs(vectors)
    alone = model.generate(**given, max_new_tokens=3)
    pad = np.zeros((1, 5), np.int64)
    for ids, mask in (
        ((pad, given["input_ids"]), (pad, np.ones_like(given["input_ids"]))),
        ((given["input_ids"], pad), (np.ones_like(given["input_ids"]), pad)),
    ):
        given["input_ids"], given["attention_mask"] = np.concatenate(ids, 1), np.concatenate(mask, 1)
        padded = model.generate(**given, max_new_tokens=3)
        np.testing.assert_allclose(padded.logits, alone.logits, atol=1e-5, rtol=0)
        given["input_ids"] = vectors["input_ids"]


def test_generate_in_a_batch_is_each_alone(load):
    """Two videos of 12 and 7 temporal patches, the prompts padded on the left as processors do."""
    model, vectors = load(keep_ratio=0.5), golden.vectors(NAME)
    ids, values = vectors["input_ids"][0], vectors["pixel_values_videos"].astype(np.float32)
    video = np.flatnonzero(ids == model.settings.video_token)
    patches, tokens = 96, 24
    short = np.concatenate([ids[2 : video[0]], ids[video[: 7 * tokens]], ids[video[-1] + 1 :]])
    rows = [ids, np.pad(short, (len(ids) - len(short), 0))]
    mask = np.stack([np.ones(len(ids), int), np.pad(np.ones(len(short), int), (len(ids) - len(short), 0))])
    together = model.generate(
        np.stack(rows),
        mask,
        np.concatenate([values, values[: 7 * patches]]),
        np.array([[12, 8, 12], [7, 8, 12]]),
        mm_token_type_ids=np.where(np.stack(rows) == model.settings.video_token, 2, 0),
        max_new_tokens=3,
    )
    alone = [
        model.generate(ids[None], None, values, [[12, 8, 12]], max_new_tokens=3),
        model.generate(short[None], None, values[: 7 * patches], [[7, 8, 12]], max_new_tokens=3),
    ]
    for row, one in enumerate(alone):
        np.testing.assert_allclose(together.logits[row], one.logits[0], atol=1e-5, rtol=0)
        for layer, chunks in enumerate(one.trace.kept):
            for chunk, kept in enumerate(chunks):
                count = together.trace.kept_count[layer][chunk][row]
                np.testing.assert_array_equal(together.trace.kept[layer][chunk][row][:count], kept[0])


@pytest.mark.parametrize("dpselect", ["frame", "patch"])
def test_dropping_frames_is_reading_what_is_left(load, dpselect):
    """generate() with dpselect_ratio 0.5 equals the decoder reading the features that a NumPy DPSelect keeps."""
    model, vectors = load(keep_ratio=1.0, dpselect=dpselect, dpselect_ratio=0.5), golden.vectors(NAME)
    out = model.generate(**golden.inputs(vectors), max_new_tokens=4)
    features = vectors["video_embeds"].reshape(12, 24, -1)
    kept = features[keep_half(features, dpselect), np.arange(24)]
    # The oracle: plain causal attention over prefix, kept features at the first positions, and suffix moved back.
    ids, decoder = vectors["input_ids"][0], model.model.text
    video = np.flatnonzero(ids == model.settings.video_token)
    positions = vectors["position_ids"][:, 0] if "position_ids" in vectors else None
    before, behind = ids[: video[0]], np.concatenate([ids[video[-1] + 1 :], out.tokens[0][:-1]])
    x = np.concatenate([decoder.embed(before), kept.reshape(-1, kept.shape[-1]), decoder.embed(behind)])
    first = positions[:, : video[0] + 6 * 24]
    last = positions[:, video[-1]].max() + 1 - 6 + np.arange(len(behind))
    where = np.concatenate([first, np.broadcast_to(last, (3, len(behind)))], axis=1).T
    hidden, _ = jax.jit(lambda d, x, p, v: d(x, p, v))(decoder, x[None], where[None], np.ones((1, len(x)), bool))
    np.testing.assert_allclose(out.logits[0], decoder.logits(hidden[0, -4:]), atol=1e-4, rtol=0)
    assert out.trace.tokens == [12 * 24] and out.trace.kept_count[0].sum() == 6 * 24


def keep_half(features, dpselect):
    """Indices [6, 24] of the kept temporal patches, by the text of section 3.2."""
    norm = features / np.linalg.norm(features, axis=-1, keepdims=True)
    distance = np.concatenate([np.ones((1, 24)), 1 - (norm[1:] * norm[:-1]).sum(-1)])
    if dpselect == "frame":
        distance = np.broadcast_to(distance.mean(1, keepdims=True), distance.shape)
    edge = np.full((1, 24), -np.inf)
    peak = (distance > np.concatenate([edge, distance[:-1]])) & (distance >= np.concatenate([distance[1:], edge]))
    return np.sort(np.argsort(-(distance + 2 * peak), axis=0, kind="stable")[:6], axis=0)


def test_answering_consumes_nothing(load, pixels):
    """Two answers, more watching, and a third: each as from a memory of its own."""
    model = load(keep_ratio=0.5)
    first, rest = [pixels[:10]], [pixels[10:]]
    memory = watch(model, [QUESTION], first)
    answers = [model.answer(memory, max_new_tokens=5), model.answer(memory, "t20 t21", max_new_tokens=5)]
    for frames in batch_of(rest, 5):
        memory = model.watch(memory, frames)
    answers.append(model.answer(memory, max_new_tokens=5))
    fresh = [
        model.answer(watch(model, [QUESTION], first), max_new_tokens=5),
        model.answer(watch(model, ["t20 t21"], first), max_new_tokens=5),
        model.answer(watch(model, [QUESTION], [pixels]), max_new_tokens=5),
    ]
    for got, expected in zip(answers, fresh, strict=True):
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        assert got.trace.cache_length == expected.trace.cache_length
    assert answers[0].trace.frames == [10] and answers[2].trace.frames == [24]


def test_a_fork_goes_its_own_way(load, pixels):
    model = load(keep_ratio=0.5)
    memory = watch(model, [QUESTION], [pixels[:12]])
    kept = lv.fork(memory)
    for frames in batch_of([pixels[12:]], 12):
        memory = model.watch(memory, frames)
    assert model.answer(kept, max_new_tokens=2).trace.frames == [12]
    assert model.answer(memory, max_new_tokens=2).trace.frames == [24]


def test_the_cache_grows_when_the_length_was_not_known(load, pixels):
    """Without expected_frames the cache starts small and is moved into larger buckets; the answer is the same."""
    model = load(keep_ratio=1.0, dpselect=None)
    long = np.concatenate([pixels] * 6)  # 72 temporal patches of 6 tokens, all kept
    memory = model.begin(QUESTION)
    start = memory.cache.capacity
    for frames in batch_of([long], 32):
        memory = model.watch(memory, frames)
    known = watch(model, [QUESTION], [long])
    assert memory.cache.capacity > start
    np.testing.assert_allclose(logits_after(model, memory), logits_after(model, known), atol=1e-5, rtol=0)


def test_nothing_is_compiled_for_other_lengths_ratios_and_budgets(load, pixels, caplog):
    """After one video in a bucket, ten more: streamed with other lengths, ratios and budgets."""
    long = np.concatenate([pixels] * 4)

    def ask(length, question, **choices):
        model = load(**choices)
        return model.answer(watch(model, [question], [long[:length]], window=5), max_new_tokens=3)

    ask(61, QUESTION, keep_ratio=0.5)
    compiled = []
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING, logger="jax"):
            for step in range(10):
                share = {"keep_ratio": 0.3 + step / 20} if step % 2 else {"keep_ratio": None, "budget": 100 + step}
                ask(61 + 3 * step, " ".join(["t7"] * (step + 1)), **share)
            compiled = [record.message for record in caplog.records if "Compiling" in record.message]
            caplog.clear()
            jax.jit(lambda x: x + 1.25)(1.0)
            assert any("Compiling" in record.message for record in caplog.records)  # the count can count
    finally:
        jax.config.update("jax_log_compiles", False)
    assert compiled == []


def test_budget_is_the_ratio_of_the_whole_prompt(load, pixels):
    """The authors' dynamic ratio, budget / (text and video tokens), of each chunk; all of it where it fits."""
    tokens, text = 6, len(golden.vectors(NAME)["input_ids"][0]) - 288
    for budget in (40, 1000):
        model = load(keep_ratio=None, budget=budget, dpselect=None)
        answer = model.answer(watch(model, [QUESTION], [pixels]), max_new_tokens=1)
        text = len(golden.vectors(NAME)["input_ids"][0]) - 288 - 8 + 3
        length = text + 12 * tokens
        share = 1.0 if length <= budget else budget / length
        assert (answer.trace.kept_count == int(share * 2 * tokens)).all()


def test_other_questions_where_compression_is_guided(load, pixels):
    model = load(prompt_guided=True)
    memory = watch(model, [QUESTION], [pixels])
    assert model.answer(memory, QUESTION, max_new_tokens=1).text
    with pytest.raises(lv.InstructionError, match="prompt_guided"):
        model.answer(memory, "t9 t9 t9", max_new_tokens=1)


def test_guided_compression_is_scored_by_the_prompt(load, pixels):
    """What the first layer keeps of the first chunk, from projections and a NumPy softmax of the prompt over it."""
    model = load(prompt_guided=True, dpselect=None, keep_ratio=0.25)
    memory = watch(model, [QUESTION], [pixels[:4]])
    kept = model.answer(memory, max_new_tokens=1).trace.kept[0][0][0]
    layer, decoder = model.model.text.layers[0], model.model.text
    from longvid_jax.systems import retake_steps as steps

    settings = model.settings
    features = steps.encode_frames(model.model, pixels[None, :4], grid=(4, 6), mean=settings.mean, std=settings.std)
    prompt = memory.prompt[0][memory.prompt[0] >= 0]
    x = jnp.concatenate([features.reshape(1, 12, -1), decoder.embed(jnp.asarray(prompt))[None]], axis=1)
    q, k, _ = layer.attention.project(layer.attention_norm(x))
    logits = np.einsum("hnd,hcd->hnc", np.asarray(q[0, :, 12:]), np.repeat(np.asarray(k[0, :, :12]), 2, axis=0)) / 4
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    scores = (weights / weights.sum(-1, keepdims=True)).sum(1).mean(0)
    np.testing.assert_array_equal(kept, np.sort(np.argsort(-scores, kind="stable")[:3]))


def test_trace_counts_bytes(load, pixels):
    model = load(keep_ratio=0.5)
    trace = model.answer(watch(model, [QUESTION], [pixels]), max_new_tokens=2).trace
    config, text = model.model.config.text, len(golden.vectors(NAME)["input_ids"][0]) - 288 - 8 + 3
    a_token = 2 * config.depth * config.kv_heads * config.rope.head_dim * 4
    assert trace.tokens == [72] and trace.cache_length == [text + 36]
    assert trace.cache_bytes == (text + 36) * a_token and trace.cache_bytes_uncompressed == (text + 72) * a_token
    np.testing.assert_array_equal(trace.times, np.float32(np.arange(12))[None])
    assert trace.keyframes.shape == trace.change.shape == (1, 12) and trace.change[0, 0] == 1


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({}, "exactly one"),
        ({"keep_ratio": 0.5, "budget": 9}, "exactly one"),
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"budget": 0}, "budget is 0"),
        ({"keep_ratio": 0.5, "chunk_frames": 3}, "even"),
        ({"keep_ratio": 0.5, "dpselect": "row"}, "'frame', 'patch' or None"),
        ({"keep_ratio": 0.5, "dpselect_ratio": 0.0}, "dpselect_ratio is 0.0"),
        ({"keep_ratio": 0.5, "dpselect": None, "dpselect_ratio": 0.5}, "needs dpselect"),
        ({"keep_ratio": 0.5, "pivots": "max"}, "'mean' or 'always'"),
        ({"keep_ratio": 0.5, "yarn_factor": 0.5}, "yarn_factor"),
        ({"keep_ratio": 0.5, "scores": "best"}, "'attention' or 'random'"),
        ({"keep_ratio": 0.5, "scores": "random"}, "looks at nothing"),
        ({"keep_ratio": 0.5, "scores": "random", "dpselect": None, "prompt_guided": True}, "looks at nothing"),
    ],
)
def test_options_that_do_not_go(choices, says):
    with pytest.raises(lv.OptionError, match=says):
        lv.ReTaKe(**choices)


def test_calls_that_do_not_go(load, pixels):
    model = load(keep_ratio=0.5)
    with pytest.raises(lv.OptionError, match="length"):
        load(keep_ratio=None, budget=40).begin(QUESTION)
    with pytest.raises(lv.PromptError, match="Nothing was watched"):
        model.answer(model.begin(QUESTION))
    with pytest.raises(lv.PromptError, match="empty"):
        model.begin("  ")
    with pytest.raises(lv.PromptError, match="video token"):
        model.begin("t198")
    memory = watch(model, [QUESTION], [pixels[:2]])
    with pytest.raises(lv.OptionError, match="do not fit|one size"):
        model.watch(memory, lv.Frames(np.zeros((1, 4, 20, 20, 3), np.uint8), np.zeros((1, 4)), np.ones((1, 4), bool)))
    for gap in ([[1, 0, 1], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]]):
        two = model.begin([QUESTION, QUESTION])
        window = lv.Frames(np.zeros((2, 3, 16, 24, 3), np.uint8), np.zeros((2, 3)), np.array(gap, bool))
        with pytest.raises(lv.OptionError, match="has ended"):
            model.watch(model.watch(two, window), dataclasses.replace(window, valid=np.ones((2, 3), bool)))
    with pytest.raises(lv.OptionError, match="max_new_tokens"):
        model.answer(memory, max_new_tokens=0)
    without = type(model)(model.model, model.settings, method=model.method)
    with pytest.raises(lv.PromptError, match="no tokenizer"):
        without.begin(QUESTION)
    given = golden.inputs(golden.vectors(NAME))
    for changes, says in (
        ({"pixel_values": 1}, "images"),
        ({"video_grid_thw": [[11, 8, 12]]}, "288 video tokens"),
        ({"pixel_values_videos": given["pixel_values_videos"][:-1]}, "pixel_values_videos"),
        ({"attention_mask": np.ones((1, 3))}, "attention_mask"),
        ({"mm_token_type_ids": np.zeros((1, 302))}, "mm_token_type_ids"),
        ({"input_ids": np.where(given["input_ids"] == 194, 197, given["input_ids"])}, "image token"),
    ):
        with pytest.raises(lv.PromptError, match=says):
            model.generate(**{**given, **changes})


def test_text_alone(load):
    """Without a video, generate() is a text model: its logits are those of the plain decoder."""
    from longvid_jax.models.llama import forward

    model = load(keep_ratio=0.5)
    ids = np.random.default_rng(1).integers(1, 190, (2, 9))
    out = model.generate(ids, max_new_tokens=3)
    whole = np.concatenate([ids, out.tokens], axis=1)
    np.testing.assert_allclose(out.logits, forward(model.model.text, whole)[:, 8:-1], atol=1e-5, rtol=0)


def test_compaction_is_stable():
    assert compact(jnp.array([False, True, False, True]), 4).tolist() == [1, 3, 0, 2]


def test_memories_are_arrays(load, pixels):
    memory = watch(load(keep_ratio=0.5), [QUESTION], [pixels[:13]])
    assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(memory))
    assert dataclasses.is_dataclass(memory)
