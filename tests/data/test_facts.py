"""Facts in place of frames: what they tell, where they stand, and batches of them."""

import numpy as np
import pytest

from longvid_jax.data import facts
from longvid_jax.data.batches import endless, tokenized
from longvid_jax.data.chat import QUERIES_FIRST_TEMPLATE
from longvid_jax.data.facts import FACT_WIDTH, FactBatches, FactSource, features, told
from longvid_jax.data.packing import packed_length
from longvid_jax.data.tokenizer import bert_tokenizer, world_tokenizer
from longvid_jax.errors import OptionError
from longvid_jax.video.synthetic import COLOURS, SHAPES, Event, World

SOURCE = FactSource(50, seconds=(8.0, 16.0), questions=6, offset=40, stride=3, temporal=1, slots=12)
VIDEO = 9


@pytest.fixture(scope="module")
def tokenizer():
    made = world_tokenizer()
    made.chat_template = QUERIES_FIRST_TEMPLATE
    return made


@pytest.fixture(scope="module")
def make(tokenizer):
    """FactBatches of the source, in the order of one seed."""
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")

    def make(size=4, source=SOURCE, **how):
        how = {"words": bert_tokenizer(), "text": (256, 512), **how}
        return FactBatches(endless(source, 5), tokenizer, video, how.pop("text"), size, **how)

    return make


def decoded(fact: np.ndarray) -> tuple:
    """(kind, colour, shape, what it becomes, start, end) that a fact tells, by its definition alone."""
    colours = list(COLOURS)
    kind, colour, shape, becomes, waves = np.split(fact, np.cumsum([2, 8, 6, 8]))
    sine, cosine = waves.reshape(2, 2, -1)  # each [start and end, periods]
    periods = 2 * np.sqrt(2.0) ** np.arange(24)
    times = []
    for angles in np.arctan2(sine, cosine) % (2 * np.pi):
        time = angles[-1] / (2 * np.pi) * periods[-1]  # rough, and then finer with each shorter period
        for angle, period in zip(angles[::-1], periods[::-1], strict=True):
            rest = angle / (2 * np.pi) * period
            time = rest + period * np.round((time - rest) / period)
        times.append(time)
    assert kind.sum() == colour.sum() == shape.sum() == 1 and becomes.sum() in (0, 1)
    turned = colours[becomes.argmax()] if becomes.any() else None
    return ("visit", "change")[kind.argmax()], colours[colour.argmax()], SHAPES[shape.argmax()], turned, *times


def test_features_tell_the_event():
    assert FACT_WIDTH == 2 + 8 + 6 + 8 + 4 * 24
    for seed in range(4):
        for event in World(seed, seconds=60).events:
            for offset, stride in ((0.0, 1.0), (37.5, 3.0), (2000.0, 1.0)):
                *named, start, end = decoded(features(event, offset, stride))
                assert named == [event.kind, event.colour, event.shape, event.becomes]
                ends = (event.start, event.end) if event.kind == "visit" else (event.at, event.at)
                np.testing.assert_allclose((start, end), offset + stride * np.array(ends), atol=1e-3)


def test_slots():
    """Each event in a slot of its own, zeros elsewhere; in half of the worlds in the order of time."""
    sorted_ = 0
    for seed in range(60):
        world = World(seed, seconds=16)
        rows = told(world, 12, (seed,), 0.0, 1.0)
        assert rows.shape == (12, FACT_WIDTH) and rows.dtype == np.float32
        used = np.flatnonzero(rows.any(1))
        events = world.events[:12]
        assert len(used) == len(events) > 1
        expected = {features(event).tobytes(): n for n, event in enumerate(events)}
        order = [expected[row.tobytes()] for row in rows[used]]
        assert sorted(order) == list(range(len(events)))
        sorted_ += order == sorted(order)
    assert 20 < sorted_ < 45
    few = told(World(3, seconds=60), 2, (3,), 0.0, 1.0)
    assert {row.tobytes() for row in few} == {features(event).tobytes() for event in World(3, seconds=60).events[:2]}


def test_an_example_tells_what_its_answers_say():
    """Times of facts and of answers are shifted and stretched alike."""
    from longvid_jax.video.synthetic import parse_span

    compared = 0
    for i in range(len(SOURCE)):
        example = SOURCE[i]
        rows = example.frames()
        assert rows.shape == (example.num_frames, FACT_WIDTH) == (12, FACT_WIDTH)
        np.testing.assert_array_equal(rows, SOURCE[i].frames())
        spans = {tuple(np.round(decoded(row)[4:]).astype(int)) for row in rows if row.any()}
        for tag, ((_, answer),) in zip(example.tags, example.conversations, strict=True):
            if tag == "when" and SOURCE.world(i).seconds == 16:
                asked = np.array(parse_span(answer))
                # What is told in whole seconds is rounded before it is stretched.
                near = [np.abs(asked - span).max() for span in spans]
                compared += 1
                assert min(near) <= 0.5 * example.stride + 1
    assert compared > 10


def test_where_all_stands(make, tokenizer):
    batch = make()[0]
    arrays, slots = batch.arrays, SOURCE.slots
    assert arrays["facts"].shape == (4, slots, FACT_WIDTH) and arrays["positions"].shape[-1] == 1
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    for row, example in enumerate(batch.examples):
        np.testing.assert_array_equal(arrays["facts"][row], example.frames())
        # The facts first, one position each; then each conversation from the same position on.
        np.testing.assert_array_equal(arrays["video_index"][row][:slots], np.arange(slots))
        assert (arrays["video_index"][row][slots:] == -1).all()
        np.testing.assert_array_equal(arrays["positions"][row][:slots, 0], np.arange(slots))
        assert (arrays["tokens"][row][:slots] == video).all() and (arrays["groups"][row][:slots] == 0).all()
        for n, ((question, answer),) in enumerate(example.conversations, 1):
            mine = np.flatnonzero(arrays["groups"][row] == n)
            np.testing.assert_array_equal(arrays["positions"][row][mine, 0], slots + np.arange(len(mine)))
            said = tokenizer.decode(arrays["tokens"][row][mine])
            assert said == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            told = mine[arrays["weights"][row][mine] > 0]
            assert tokenizer.decode(arrays["targets"][row][told]) == f"{answer}<|im_end|>"
        assert (arrays["groups"][row] == -1).sum() == arrays["tokens"].shape[1] - (arrays["groups"][row] >= 0).sum()
    longest = max(packed_length(tokenized(e, tokenizer, video), slots) for e in batch.examples)
    assert arrays["tokens"].shape[1] == next(size for size in (256, 512) if size >= longest)


def test_words_that_are_hidden(make):
    words, hidden, special, shares = bert_tokenizer(), 0, 0, []
    for b in range(3):
        batch = make()[b]
        ids, mask = batch.arrays["words"], batch.arrays["hidden"]
        assert ids.shape == mask.shape == (4, 4, 32)
        for row, example in enumerate(batch.examples):
            for n, ((question, _),) in enumerate(example.conversations[:4]):
                expected = words(question)["input_ids"][:32]
                assert ids[row, n][ids[row, n] >= 0].tolist() == expected
        fixed = np.isin(ids, words.all_special_ids) | (ids < 0)
        assert not mask[fixed].any()
        hidden, special = hidden + mask.sum(), special + fixed.sum()
        shares.append(mask[~fixed].mean())
    assert hidden > 40 and special > 100
    assert np.mean(shares) == pytest.approx(facts.IGNORED, abs=0.04)


def test_fewer_questions_than_are_read(make):
    batch = make(source=FactSource(20, seconds=(8.0,), questions=2, slots=12))[0].arrays
    assert (batch["words"][:, :2, 0] >= 0).all() and (batch["words"][:, 2:] == -1).all()
    assert not batch["hidden"][:, 2:].any()


def test_long_questions_are_cut(make):
    whole, cut = make()[0].arrays, make(length=5)[0].arrays
    np.testing.assert_array_equal(cut["words"], whole["words"][..., :5])


def test_batches_are_functions_of_seed_and_number(make):
    one, again, other = make()[3], make()[3], make()[4]
    assert [example.id for example in one.examples] == [example.id for example in again.examples]
    for name in ("facts", "tokens", "words", "hidden", "weights"):
        np.testing.assert_array_equal(one.arrays[name], again.arrays[name])
        assert not np.array_equal(one.arrays[name], other.arrays[name])


def test_processes_share_a_batch(make):
    whole, halves = make()[1], [make(process=n, processes=2)[1] for n in range(2)]
    assert whole.arrays["packed"] == halves[0].arrays["packed"] == halves[1].arrays["packed"]
    for name, array in whole.arrays.items():
        if name != "packed":
            np.testing.assert_array_equal(np.concatenate([half.arrays[name] for half in halves]), array, err_msg=name)
    assert [example.id for example in halves[1].examples] == [example.id for example in whole.examples]


def test_what_does_not_fit(make):
    with pytest.raises(OptionError, match="batch_size is 3, but must be a multiple of the 2 processes"):
        make(3, processes=2)
    with pytest.raises(OptionError, match=r"clear/train/\d+ takes \d+ tokens, but the largest bucket has 64"):
        make(text=(32, 64))[0]


def test_a_change_is_told_by_its_moment():
    event = Event("change", "red", "ring", 3.0, 9.0, at=5.0, becomes="cyan")
    kind, colour, shape, becomes, start, end = decoded(features(event, 10.0, 2.0))
    assert (kind, colour, shape, becomes) == ("change", "red", "ring", "cyan")
    np.testing.assert_allclose((start, end), 20.0, atol=1e-4)
