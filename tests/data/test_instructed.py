"""Questions put to their videos one by one: what stands where, what is to be said, and batches of it."""

from functools import partial

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longvid_jax.data.batches import Example, endless
from longvid_jax.data.chat import QUERIES_FIRST_TEMPLATE, QWEN2_VL_TEMPLATE, queries_prompt
from longvid_jax.data.instructed import STEP, InstructedBatches, conversation
from longvid_jax.data.tokenizer import bert_tokenizer, world_tokenizer
from longvid_jax.data.world import WorldSource
from longvid_jax.errors import DataError, OptionError, PromptError, VideoError

QUESTION, ANSWER, QUERIES = "what is it?", "a red star", 3


@pytest.fixture(scope="module")
def llama():
    """Of Llama's kind: no chat template, <s> before all that is encoded, </s> at the end of what is said."""
    pieces = ["<unk>", "<s>", "</s>", *(f"▁{word}" for word in "what is it? a red star".split())]
    words = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def world():
    made = world_tokenizer()
    made.chat_template = QUERIES_FIRST_TEMPLATE
    return made


def video_token(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids("<|video_pad|>")


# --- one conversation -------------------------------------------------------------------------------------------------


def test_without_a_chat_template(llama):
    """As InstructBLIP is trained: queries, <s>, the question, the answer, </s>."""
    assert llama("what is it?")["input_ids"] == [1, 3, 4, 5]
    ids, places, is_answer = conversation(llama, QUESTION, ANSWER, None, QUERIES)
    assert ids == [0, 0, 0, 1, 3, 4, 5, 6, 7, 8, 2]
    assert places == [0, 1, 2, *[-1] * 8]
    assert is_answer == [False] * 7 + [True] * 4
    assert conversation(llama, QUESTION, ANSWER, 99, QUERIES)[0] == ids  # which it has no template to put anywhere


@pytest.mark.parametrize("template", [QUERIES_FIRST_TEMPLATE, QWEN2_VL_TEMPLATE])
def test_with_a_chat_template(template):
    tokenizer = world_tokenizer()
    tokenizer.chat_template = template
    ids, places, is_answer = conversation(tokenizer, QUESTION, ANSWER, video_token(tokenizer), QUERIES)
    at = places.index(0)
    assert places == [-1] * at + [0, 1, 2] + [-1] * (len(ids) - at - 3)
    assert ids[at : at + 3] == [0, 0, 0] and video_token(tokenizer) not in ids
    assert at == 0 or template is QWEN2_VL_TEMPLATE
    said = [token for token, told in zip(ids, is_answer, strict=True) if told]
    assert said == [*tokenizer(ANSWER, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    first = is_answer.index(True)
    assert is_answer == [False] * first + [True] * len(said) + [False] * (len(ids) - first - len(said))
    asked = tokenizer.decode([token for token, place in zip(ids[:first], places, strict=False) if place < 0])
    assert asked.endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n") or (
        template is QWEN2_VL_TEMPLATE and asked.endswith(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    )


@pytest.mark.parametrize("kind", ["llama", "world"])
def test_it_begins_as_prompts_do(kind, request):
    tokenizer = request.getfixturevalue(kind)
    video = None if kind == "llama" else video_token(tokenizer)
    ids, places, is_answer = conversation(tokenizer, QUESTION, ANSWER, video, QUERIES)
    prompt = queries_prompt(tokenizer, QUESTION, video, QUERIES)
    first = is_answer.index(True)
    assert (ids[:first], places[:first]) == prompt


def test_what_ends_no_answer(llama):
    without = PreTrainedTokenizerFast(tokenizer_object=llama.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(
        PromptError, match="has no token that ends answers; name its eos_token in tokenizer_config.json"
    ):
        conversation(without, QUESTION, ANSWER, None, QUERIES)


# --- batches ----------------------------------------------------------------------------------------------------------

SOURCE = WorldSource(40, seconds=(4.0, 3.0), size=(28, 28), questions=6, temporal=1, offset=30, stride=3)


@pytest.fixture(scope="module")
def make(world):
    words = bert_tokenizer()

    def make(size=4, examples=None, **how):
        how = {"frames": (4, 8), "text": (64, 128), "queries": lambda frames: QUERIES, "reads": 64, **how}
        examples = endless(SOURCE, 5) if examples is None else examples
        return InstructedBatches(examples, world, words, video_token(world), size, **how)

    return make


def example(name: str, turns=((QUESTION, ANSWER),), frames: int = 3, fails: bool = False) -> Example:
    def read(count: int) -> np.ndarray:
        if fails:
            raise VideoError(f"{name}.mp4 does not exist.")
        return np.full((count, 28, 28, 3), frames, np.uint8)

    return Example(name, tuple((turn,) for turn in turns), frames, (28, 28), partial(read, frames))


def test_what_a_batch_holds(make, world):
    batch, words = make()[0], bert_tokenizer()
    arrays = batch.arrays
    asked, read, length = (arrays[name].shape[i] for name, i in (("tokens", 1), ("words", 2), ("tokens", 2)))
    assert (asked, length) == (8, 64) and arrays["frames"].shape == (4, 8, 28, 28, 3)  # six questions, and room for two
    longest = 0
    for row, one in enumerate(batch.examples):
        count = one.num_frames
        np.testing.assert_array_equal(arrays["frames"][row][:count], one.frames())
        np.testing.assert_array_equal(arrays["shown"][row], np.arange(8) < count)
        np.testing.assert_array_equal(arrays["number"][row], one.offset + one.stride * np.arange(8))
        groups = arrays["groups"][row].reshape(asked, length)
        for n, ((question, answer),) in enumerate(one.conversations):
            ids, places, is_answer = conversation(world, question, answer, video_token(world), QUERIES)
            size, heard = len(ids), words(question)["input_ids"]
            longest = max(longest, len(heard))
            assert arrays["tokens"][row, n].tolist() == ids + [-1] * (length - size)
            assert arrays["places"][row, n].tolist() == places + [-1] * (length - size)
            assert groups[n].tolist() == [n + 1] * size + [-1] * (length - size)
            assert arrays["words"][row, n].tolist() == heard + [-1] * (read - len(heard))
            told = np.flatnonzero(arrays["weights"][row, n])
            np.testing.assert_array_equal(told + 1, np.flatnonzero(is_answer))
            assert [arrays["targets"][row, n, at] for at in told] == [ids[at + 1] for at in told]
            assert world.decode(arrays["targets"][row, n][told]) == f"{answer}<|im_end|>"
        empty = slice(len(one.conversations), None)
        assert all((arrays[name][row, empty] == -1).all() for name in ("words", "tokens", "places"))
        assert (groups[empty] == -1).all() and not arrays["weights"][row, empty].any()
    assert read == -(-longest // STEP) * STEP
    assert {one.offset > 0 for one in batch.examples} == {True, False}
    assert {name: array.dtype for name, array in arrays.items()} == {
        **dict.fromkeys(("words", "tokens", "places", "targets", "groups", "number"), np.dtype(np.int32)),
        "frames": np.dtype(np.uint8),
        "shown": np.dtype(bool),
        "weights": np.dtype(np.float32),
    }


def test_shapes(make):
    few = make(1, [example("a")])[0].arrays
    assert few["tokens"].shape == (1, 1, 64) and few["frames"].shape[1] == 4
    more = make(2, [example("a", frames=5), example("b", ((QUESTION, ANSWER),) * 5)])[0].arrays
    assert more["tokens"].shape == (2, 8, 64) and more["frames"].shape[1] == 8
    longer = make(1, [example("a", ((QUESTION, " ".join(["red star"] * 30)),))])[0].arrays
    assert longer["tokens"].shape == (1, 1, 128)
    with pytest.raises(OptionError, match="a takes 9 frames, but the largest bucket has 8; add a larger one"):
        make(1, [example("a", frames=9)])[0]
    with pytest.raises(OptionError, match=r"a takes \d+ tokens, but the largest bucket has 128; add a larger one"):
        make(1, [example("a", ((QUESTION, " ".join(["red star"] * 99)),))])[0]


def test_a_question_longer_than_the_q_former_reads_is_cut(make):
    examples = [example("a", ((" ".join(["red star"] * 20), ANSWER),))]
    whole, cut = (make(1, examples, reads=reads)[0].arrays for reads in (64, 10))
    assert whole["words"].shape == (1, 1, 48) and (whole["words"] >= 0).sum() == 42
    np.testing.assert_array_equal(cut["words"], whole["words"][..., :10])
    np.testing.assert_array_equal(cut["tokens"], whole["tokens"])


def test_a_video_that_does_not_decode_keeps_its_slot(make):
    examples = [example("a"), example("b", fails=True), example("c")]
    batch = make(3, examples)[0]
    assert [one.id for one in batch.examples] == ["a", "b", "c"] and batch.undecodable == {"b": "b.mp4 does not exist."}
    assert [weights.any() for weights in batch.arrays["weights"]] == [True, False, True]
    np.testing.assert_array_equal(batch.arrays["shown"][1], [True, False, False, False])  # something to look at
    assert not batch.arrays["frames"][1].any()


def test_batches_are_functions_of_seed_and_number(make):
    one, again, other = make()[3], make()[3], make()[4]
    assert [example.id for example in one.examples] == [example.id for example in again.examples]
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert (one.arrays["frames"] != other.arrays["frames"]).any()


def test_processes_share_a_batch(make):
    """Shapes are of all rows, whichever a process has: here one half is shorter than the other."""
    long = " ".join(["red star"] * 12)
    examples = [example("a"), example("b"), example("c", ((long, long),) * 3, frames=6), example("d", fails=True)]
    whole, halves = make(4, examples)[0], [make(4, examples, process=n, processes=2)[0] for n in range(2)]
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(np.concatenate([half.arrays[name] for half in halves]), array, err_msg=name)
    assert [half.undecodable for half in halves] == [{}, whole.undecodable] and whole.undecodable
    assert all(half.examples == whole.examples for half in halves)


def test_without_a_q_former_that_reads(llama):
    batch = InstructedBatches(
        [example("a")], llama, None, None, 1, frames=(4,), text=(16,), queries=lambda frames: 2, reads=512
    )[0]
    assert batch.arrays["words"].tolist() == [[[-1] * STEP]]
    assert batch.arrays["tokens"][0, 0].tolist() == [0, 0, 1, 3, 4, 5, 6, 7, 8, 2, *[-1] * 6]


def test_what_does_not_fit(make):
    with pytest.raises(OptionError, match="batch_size is 3, but must be a multiple of the 2 processes"):
        make(3, processes=2)
    with pytest.raises(DataError, match="the data set is empty"):
        make(1, [])
    wide = example("b").__class__("b", (((QUESTION, ANSWER),),), 1, (28, 56), lambda: None)
    with pytest.raises(OptionError, match=r"sizes \[\(28, 28\), \(28, 56\)\]; give sources of one size"):
        make(2, [example("a"), wide])[0]
    with pytest.raises(PromptError, match="a: The conversation holds the video token"):
        make(1, [example("a", (("what is <|video_pad|>?", ANSWER),))])[0]
