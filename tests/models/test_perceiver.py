"""ReWind's networks against their definitions in float64, and the whole model's parts and checkpoint."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from longvid_jax import convert
from longvid_jax.errors import CheckpointError
from longvid_jax.models.paths import leaves
from longvid_jax.models.perceiver import Contrast, Perceiver, PerceiverConfig, ReadWrite
from longvid_jax.models.rewind import Rewind, RewindConfig
from longvid_jax.models.sharding import parameter_spec
from tests.models.rewind_oracle import SMALL, Oracle, parameters, randomised

close = partial(np.testing.assert_allclose, atol=1e-5, rtol=0)
CONFIG = {
    "model_type": "rewind",
    "vision_config": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "patch_size": 4,
        "image_size": 16,
    },
    "bert_config": {
        "vocab_size": 40,
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "width": 12,
    "heads": 3,
    "perceiver_layers": 2,
    "num_queries": 3,
    "detail_tokens": 4,
}


def networks(**changes):
    config = dataclasses.replace(SMALL, **changes)
    perceiver = randomised(lambda: Perceiver(config, rngs=nnx.Rngs(0)))
    memory = randomised(lambda: ReadWrite(config, rngs=nnx.Rngs(0)), 1)
    return perceiver, memory, Oracle(perceiver, memory, config)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@jax.jit
def perceive(perceiver, features, numbers, valid, words=None, words_valid=None):
    instruction = None if words is None else perceiver.instruct(words, words_valid)
    queries = perceiver.queries(len(features), instruction)
    return queries, perceiver(queries, features, numbers, valid, instruction)


def given(rng):
    """Three rows: all frames and words, some of them, one of each."""
    features, words = normal(rng, 3, 4, 5, 10), normal(rng, 3, 6, 6)
    valid = np.arange(4) < np.array([4, 2, 1])[:, None]
    words_valid = np.arange(6) < np.array([6, 3, 1])[:, None]
    numbers = np.array([3, 0, 900], np.int32)[:, None] + np.arange(4, dtype=np.int32)
    return features, numbers, valid, words, words_valid


@pytest.mark.parametrize(("how", "num_frames"), [("gated", 0), ("gated", 5), ("shared", 0), ("concat", 0), ("none", 0)])
def test_perceive(rng, how, num_frames):
    perceiver, _, oracle = networks(text_conditioning=how, num_frames=num_frames)
    features, numbers, valid, words, words_valid = given(rng)
    queries, out = perceive(perceiver, features, numbers, valid, words, words_valid)
    assert queries.shape == (3, 4, 12)  # the instruction is one of them
    assert out.shape == (3, 4, 4, 12)
    assert np.isfinite(out).all()
    for row in range(3):
        told, real = oracle.words(words[row, words_valid[row]]), valid[row]
        close(queries[row], oracle.queries(told))
        close(out[row, real], oracle.perceive(queries[row], features[row, real], numbers[row, real], told))


def test_perceive_without_an_instruction(rng):
    perceiver, _, oracle = networks()
    features, numbers, valid, *_ = given(rng)
    queries, out = perceive(perceiver, features, numbers, valid)
    assert queries.shape == (3, 3, 12)
    close(out[1, :2], oracle.perceive(queries[1], features[1, :2], numbers[1, :2], []))


def test_the_instruction_changes_no_patch_before_training(rng):
    perceiver = jax.jit(lambda: Perceiver(SMALL, rngs=nnx.Rngs(0)))()
    features, numbers, valid, words, words_valid = given(rng)
    _, out = perceive(perceiver, features, numbers, valid, words, words_valid)
    _, without = perceive(perceiver, features, numbers, valid)
    close(out[:, :, :3], without, atol=1e-6)
    assert np.abs(out[:, :, 3]).max() > 0.1


def test_read(rng):
    """Of a full memory, of one partly filled, and of an empty one, which leaves the queries as they are."""
    _, memory, oracle = networks()
    queries, keys, values = normal(rng, 3, 4, 12), normal(rng, 3, 10, 12), normal(rng, 3, 10, 12)
    counts = (10, 4, 0)
    by_head = (rearrange(x, "b r (h d) -> b h r d", h=SMALL.heads) for x in (keys, values))
    out = jax.jit(ReadWrite.read)(memory, queries, *by_head, np.arange(10) < np.array(counts)[:, None])
    for row, count in enumerate(counts):
        close(out[row], oracle.read(queries[row], keys[row, :count], values[row, :count]))
    np.testing.assert_array_equal(out[2], queries[2])


@pytest.mark.parametrize("num_frames", [0, 5])
def test_write(rng, num_frames):
    _, memory, oracle = networks(num_frames=num_frames)
    perceived, numbers = normal(rng, 2, 3, 4, 12), np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    tokens, *by_head = jax.jit(ReadWrite.write)(memory, perceived, numbers)
    written = tokens, *(rearrange(x, "b h f n d -> b f n (h d)") for x in by_head)
    for row in range(2):
        for frame in range(3):
            for got, expected in zip(written, oracle.write(perceived[row, frame], numbers[row, frame]), strict=True):
                close(got[row, frame], expected)


def test_contrast(rng):
    contrast = Contrast(SMALL, 7, rngs=nnx.Rngs(0))
    assert (float(contrast.temperature[0]), float(contrast.offset[0])) == (pytest.approx(math.log(10)), -10)
    contrast = randomised(lambda: Contrast(SMALL, 7, rngs=nnx.Rngs(0)))
    perceived, first, valid = normal(rng, 2, 3, 4, 12), normal(rng, 2, 6), np.array([[1, 1, 0], [1, 1, 1]], bool)
    p = parameters(contrast)
    for row, seen in enumerate((perceived[0, :2], perceived[1])):
        expected = seen.reshape(-1, 12).mean(0) @ p["video/kernel"] + p["video/bias"]
        close(contrast.of_video(perceived, valid)[row], expected / np.linalg.norm(expected))
        expected = first[row] @ p["caption/kernel"] + p["caption/bias"]
        close(contrast.of_caption(first)[row], expected / np.linalg.norm(expected))


# --- the whole model --------------------------------------------------------------------------------------------------


def test_config():
    config = RewindConfig.from_huggingface({"model_type": "rewind"})
    assert config.perceiver == PerceiverConfig()
    assert (config.clip_frames, config.detail_tokens, config.contrast_width) == (8, 32, 0)
    assert (config.vision.width, config.bert.width, config.text.width, config.text.depth) == (1408, 768, 4096, 32)
    small = RewindConfig.from_huggingface(CONFIG)
    assert small.perceiver == PerceiverConfig(
        width=12, depth=2, heads=3, ff_width=48, num_queries=3, video_width=16, text_width=12
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_conditioning": "film"}, "text_conditioning is 'film', but must be one of gated, shared, concat, none"),
        ({"heads": 5}, "width is 12, which must be divisible by 5"),
        ({"text_config": {"model_type": "opt"}}, "model_type of text_config is 'opt', but must be llama or qwen2"),
    ],
)
def test_config_that_cannot_be(changes, said):
    with pytest.raises(CheckpointError, match=said):
        RewindConfig.from_huggingface({**CONFIG, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_conditioning": "shared", "num_frame_positions": 9},
        {"text_conditioning": "concat", "contrast_width": 8},
    ],
)
def test_every_parameter_has_a_tensor_and_a_sharding(changes):
    config = {**CONFIG, **changes}
    table, settings = convert.table_for(config), RewindConfig.from_huggingface(config)
    for stacked in (False, True):
        module = jax.eval_shape(lambda stacked=stacked: Rewind(settings, stacked=stacked, rngs=nnx.Rngs(0)))
        keys = []
        for leaf in leaves(module):
            assert len(parameter_spec(leaf.path, len(leaf.value.shape))) <= len(leaf.value.shape)
            for path in leaf.part_paths:
                key, op = table.source(path)
                assert table.target(key) == (path, op)
                keys.append(key)
        assert len(keys) == len(set(keys))
        assert {"vision_model.post_layernorm.weight", "bert.pooler.dense.bias", "separator"} < set(keys)


@pytest.fixture(scope="module")
def model():
    return randomised(lambda: Rewind(RewindConfig.from_huggingface(CONFIG), rngs=nnx.Rngs(0)))


def test_saved_and_loaded(model, tmp_path, rng):
    """Its own layout: the same to the bit, and as a stack the same answer."""
    convert.save_huggingface(model, CONFIG, tmp_path / "saved", convert.table_for(CONFIG))
    loaded = convert.from_huggingface(tmp_path / "saved")
    for ours, theirs in zip(leaves(model), leaves(loaded), strict=True):
        assert ours.path == theirs.path
        np.testing.assert_array_equal(ours.value, theirs.value)
    features, numbers, valid = normal(rng, 2, 3, 5, 16), np.zeros((2, 3), np.int32), np.ones((2, 3), bool)
    words, words_valid = normal(rng, 2, 4, 12), np.ones((2, 4), bool)
    stack = convert.from_huggingface(tmp_path / "saved", stacked=True, part="perceiver")
    expected = perceive(model.perceiver, features, numbers, valid, words, words_valid)[1]
    close(perceive(stack, features, numbers, valid, words, words_valid)[1], expected)


def test_what_the_parts_make(model, rng):
    """Features are the patches'; a question's padding is of no account; what is told stands in its order."""
    frames = normal(rng, 2, 3, 16, 16, 3)
    features = jax.jit(Rewind.features)(model, frames)
    assert features.shape == (2, 3, 16, 16)
    close(features[1, 2], jax.jit(type(model.vision).__call__)(model.vision, frames[1, 2:])[0, 1:])

    ids = rng.integers(1, 40, (2, 8))
    instruct = jax.jit(Rewind.instruct)
    instruction = instruct(model, ids, np.arange(8) < np.array([[8], [5]]))
    alone = instruct(model, ids[1:, :5], np.ones((1, 5), bool))
    close(instruction.pooled[1], alone.pooled[0])
    close(instruction.tokens[1, :5], alone.tokens[0])
    close(alone.pooled[0], alone.tokens[0].mean(0))
    q = model.memory.queries(instruction.pooled[:, None])
    np.testing.assert_array_equal(model.asked(instruction), q)
    assert q.shape == (2, 3, 1, 4)

    tokens, details = normal(rng, 2, 4, 2, 12), normal(rng, 2, 3, 4, 16)
    seen, chosen = np.arange(4) < np.array([[4], [3]]), np.arange(3) < np.array([[3], [2]])
    vectors, there = jax.jit(Rewind.told)(model, tokens, seen, details, chosen)
    assert vectors.shape == (2, 8 + 1 + 12, 24)
    np.testing.assert_array_equal(there[1], [True] * 6 + [False] * 2 + [True] * 9 + [False] * 4)
    close(vectors[1, 5], model.memory_projection(tokens[1, 2, 1]))
    close(vectors[1, 8], model.separator[0])
    close(vectors[1, 9 + 4], model.detail_projection(details[1, 1, 0]))


def test_bfloat16(rng):
    """Everything stays as narrow as the parameters."""
    narrow = jax.eval_shape(lambda: Perceiver(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    features, numbers, valid, words, words_valid = given(rng)
    queries, out = jax.eval_shape(
        perceive, narrow, features.astype(jnp.bfloat16), numbers, valid, words.astype(jnp.bfloat16), words_valid
    )
    assert queries.dtype == out.dtype == jnp.bfloat16
