"""Conversations as tokens: which are learned, where they stand, and that packing them changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax import convert
from longvid_jax.data.packing import Turns, pack, packed_length, tokenize
from longvid_jax.errors import PromptError
from longvid_jax.evaluate import tiny

CONVERSATIONS = [[("What is it?", "A cat."), ("Which colour?", "Red")], [("Why?", "No idea")], [("Is it big?", "yes")]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", width=64, depth=2, vision_width=32)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def video_token(tokenizer):
    return tokenizer.convert_tokens_to_ids("<|video_pad|>")


def test_answers_and_what_ends_them_are_learned(tokenizer, video_token):
    turns = tokenize(tokenizer, CONVERSATIONS[0], video_token)
    learned = [i for i, answer in zip(turns.ids, turns.is_answer, strict=True) if answer]
    assert tokenizer.decode(learned) == "A cat.<|im_end|>Red<|im_end|>"
    assert tokenizer.decode(turns.before).endswith("<|im_start|>user\n<|vision_start|>")
    whole = tokenizer.decode(turns.ids)
    assert whole.startswith("<|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n")


def test_the_question_is_written_as_it_is_asked(tokenizer, video_token):
    """Training sees what `ask` gives the model."""
    from longvid_jax.data.chat import video_prompt

    before, behind = video_prompt(tokenizer, "Why?", video_token)
    turns = tokenize(tokenizer, [("Why?", "No")], video_token)
    assert list(turns.before) == before
    assert list(turns.ids[: len(behind)]) == behind
    assert turns.is_answer.index(True) == len(behind)


def test_where_everything_stands():
    turns = [Turns((1, 2), (3, 4, 5), (False, True, True)), Turns((1, 2), (6, 7), (False, True))]
    got = pack(turns, (3, 1, 2), 16, video_token=9, times=np.array([0, 4, 8]))
    assert packed_length(turns, 6) == 13
    np.testing.assert_array_equal(got["tokens"], [1, 2, 9, 9, 9, 9, 9, 9, 3, 4, 5, 6, 7, 0, 0, 0])
    np.testing.assert_array_equal(got["groups"], [0] * 8 + [1] * 3 + [2] * 2 + [-1] * 3)
    np.testing.assert_array_equal(got["video_index"], [-1, -1, 0, 1, 2, 3, 4, 5] + [-1] * 8)
    time, row, column = got["positions"][:13].T
    np.testing.assert_array_equal(time, [0, 1, 2, 2, 6, 6, 10, 10, 11, 12, 13, 11, 12])
    np.testing.assert_array_equal(row, [0, 1, 2, 2, 2, 2, 2, 2, 11, 12, 13, 11, 12])
    np.testing.assert_array_equal(column, [0, 1, 2, 3, 2, 3, 2, 3, 11, 12, 13, 11, 12])
    np.testing.assert_array_equal(got["targets"][8:13], [4, 5, 0, 7, 0])
    np.testing.assert_array_equal(np.flatnonzero(got["weights"]), [8, 9, 11])


def test_packed_conversations_are_as_alone(folder, tokenizer, video_token):
    model = convert.from_huggingface(folder, dtype="float32")
    grid, size = (4, 2, 2), 14 * 14 * 2 * 3
    turns = [tokenize(tokenizer, conversation, video_token) for conversation in CONVERSATIONS]
    patches = np.random.default_rng(0).normal(size=(1, 4, 16, size)).astype(np.float32)

    @jax.jit
    def logits(batch):
        batch = {name: batch[name] for name in ("tokens", "positions", "groups", "video_index")}
        return model.text.logits(model(**batch, patches=patches, grid=(4, 4)))

    def run(turns):
        arrays = pack(turns, grid, 256, video_token=video_token)
        return np.asarray(logits(jax.tree.map(lambda x: jnp.asarray(x)[None], arrays)))[0], arrays["groups"]

    together, groups = run(turns)
    for n, turn in enumerate(turns, 1):
        alone, group = run([turn])
        np.testing.assert_allclose(together[groups == n], alone[group == 1], atol=2e-5)
    np.testing.assert_allclose(together[groups == 0], alone[group == 0], atol=2e-5)


def test_what_cannot_be_packed(tokenizer, video_token):
    turns = [tokenize(tokenizer, conversation, video_token) for conversation in CONVERSATIONS]
    with pytest.raises(PromptError, match="the bucket has 64"):
        pack(turns, (4, 2, 2), 64, video_token=video_token)
    with pytest.raises(PromptError, match="same text before it"):
        pack([turns[0], Turns((1,), (2,), (True,))], (1, 1, 1), 256, video_token=video_token)
    with pytest.raises(PromptError, match="2 times instead of once"):
        tokenize(tokenizer, [("What is <|video_pad|>?", "x")], video_token)
