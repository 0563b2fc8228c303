"""Batches: the same from any process, thread and start; in static shapes; with what cannot be read at weight 0."""

import dataclasses

import grain
import jax
import numpy as np
import pytest

from longvid_jax.data.batches import Batches, Example, Shapes, batches_from, endless, mixed
from longvid_jax.data.tokenizer import byte_tokenizer
from longvid_jax.data.world import WorldSource
from longvid_jax.errors import DataError, OptionError, VideoError
from longvid_jax.video.synthetic import FAMILIES, World, parse_span

SHAPES = Shapes(frames=(4, 8, 16, 32), text=(256, 1024, 4096), temporal=2, merged=28)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())


def make(tokenizer, source, batch_size=4, **how):
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    examples = source if isinstance(source, grain.MapDataset) else endless(source, seed=3)
    return Batches(examples, tokenizer, video, SHAPES, batch_size, **how)


WORLD = WorldSource(count=100, seconds=(2.0, 4.0, 8.0), questions=3)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_batch_depends_on_seed_and_number_alone(tokenizer):
    alone = [make(tokenizer, WORLD)[b] for b in range(6)]
    for workers in (1, 4):
        ahead = batches_from(make(tokenizer, WORLD), 2, workers=workers)
        for expected in alone[2:]:
            got = next(ahead)
            assert got.index == expected.index
            assert [e.id for e in got.examples] == [e.id for e in expected.examples]
            assert_same(got.arrays, expected.arrays)
    other = make(tokenizer, endless(WORLD, seed=4))[2]
    assert [e.id for e in other.examples] != [e.id for e in alone[2].examples]


def test_processes_share_a_batch(tokenizer):
    whole = make(tokenizer, WORLD)[1]
    parts = [make(tokenizer, WORLD, process=p, processes=2)[1] for p in range(2)]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *[part.arrays for part in parts])
    assert_same(together, whole.arrays)
    with pytest.raises(OptionError, match="multiple of the 3 processes"):
        make(tokenizer, WORLD, processes=3)


def test_the_smallest_shape_in_which_all_fit(tokenizer):
    seen = set()
    for b in range(8):
        batch = make(tokenizer, WORLD, batch_size=2)[b]
        longest = max(example.num_frames for example in batch.examples)
        frames = batch.arrays["frames"].shape[1]
        assert frames == min(size for size in SHAPES.frames if size >= longest)
        length = batch.arrays["tokens"].shape[1] - frames // 2 * 4
        used = (batch.arrays["groups"] >= 0).sum(1).max() - frames // 2 * 4
        assert length == min(size for size in SHAPES.text if size >= used)
        seen.add((frames, length))
    assert len({frames for frames, _ in seen}) > 1
    with pytest.raises(OptionError, match="clear/train/.* takes 34 frames, but the largest bucket has 32"):
        make(tokenizer, WorldSource(count=5, seconds=(17.0,), questions=1))[0]


def test_frames_are_the_worlds(tokenizer):
    batch = make(tokenizer, WORLD)[0]
    for row, example in enumerate(batch.examples):
        world = World(int(example.id.rsplit("/", 1)[1]), seconds=example.num_frames / 2)
        expected = world.render(np.arange(example.num_frames) / 2, (56, 56))
        got = batch.arrays["frames"][row]
        np.testing.assert_array_equal(got[: len(expected)], expected)
        assert (got[len(expected) :] == expected[-1]).all()
        answers = [question.answer for question in world.questions(3)]
        assert [turns[0][1] for turns in example.conversations] == answers
        assert set(example.tags) <= set(FAMILIES)


def test_letters(tokenizer):
    example = WorldSource(count=5, seconds=(16.0,), questions=7, letters=1.0)[3]
    asked = [turn[0] for turn in example.conversations]
    assert any("\nA. " in text and len(answer) == 1 for text, answer in asked)
    assert example.conversations == WorldSource(count=5, seconds=(16.0,), questions=7, letters=1.0)[3].conversations


def test_videos_stand_later_and_wider_apart_and_so_do_the_spans_told(tokenizer):
    """Where a span begins to be shown, by its words, is the position of the patch that shows it."""
    how = {"count": 300, "seconds": (16.0,), "families": ("when",), "questions": 2}
    plain, source = WorldSource(**how), WorldSource(**how, offset=10, stride=3, plain=0.5)
    moved = [source[i] for i in range(300)]
    assert 100 < sum((e.offset, e.stride) == (0, 1) for e in moved) < 200
    assert {e.offset for e in moved} == set(range(11)) and {e.stride for e in moved} == {1, 2, 3}
    for i, example in enumerate(moved):
        for (asked,), (as_it_is,) in zip(example.conversations, plain[i].conversations, strict=True):
            assert asked[0] == as_it_is[0]
            wanted = [example.offset + example.stride * second for second in parse_span(as_it_is[1])]
            assert list(parse_span(asked[1])) == wanted
    row = moved.index(next(e for e in moved if e.offset and e.stride == 3))
    arrays = make(tokenizer, grain.MapDataset.source([moved[row]]), batch_size=1)[0].arrays
    first = arrays["positions"][0][arrays["video_index"][0] == 0, 0] - moved[row].offset
    times = arrays["positions"][0][arrays["video_index"][0] >= 0, 0] - first
    assert sorted(set(times)) == [moved[row].offset + 3 * n for n in range(16)]


class Broken:
    """Examples of which every other one cannot be read."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        def fail():
            raise VideoError(f"{i} cannot be decoded.")

        return dataclasses.replace(self.source[i], frames=fail) if i % 2 else self.source[i]


def test_what_cannot_be_read_keeps_its_place_at_weight_0(tokenizer):
    batch = make(tokenizer, Broken(WORLD), batch_size=8)[0]
    broken = [int(example.id.rsplit("/", 1)[1]) % 2 == 1 for example in batch.examples]
    assert any(broken) and not all(broken)
    assert batch.undecodable.keys() == {e.id for e, b in zip(batch.examples, broken, strict=True) if b}
    assert "cannot be decoded" in next(iter(batch.undecodable.values()))
    np.testing.assert_array_equal(batch.arrays["weights"].sum(1) == 0, broken)
    whole = make(tokenizer, WORLD, batch_size=8)[0]
    assert [e.id for e in whole.examples] == [e.id for e in batch.examples]


def test_mixing():
    def source(name, count):
        return [Example(f"{name}{i}", (), 1, (1, 1), None) for i in range(count)]

    examples = mixed([source("a", 10), source("b", 3)], [3, 1], seed=0)
    drawn = [examples[i].id[0] for i in range(400)]
    assert drawn.count("a") == 300 and drawn.count("b") == 100
    with pytest.raises(DataError, match="data set is empty"):
        mixed([source("a", 10), []], [1, 1], seed=0)
    with pytest.raises(OptionError, match="positive number for each of 2 sources"):
        mixed([source("a", 1), source("b", 1)], [1], seed=0)


def test_an_empty_data_set(tokenizer):
    with pytest.raises(DataError, match="data set is empty"):
        make(tokenizer, WorldSource(count=0))


def test_examples_of_several_sizes(tokenizer):
    examples = mixed([WORLD, dataclasses.replace(WORLD, size=(84, 56))], [1, 1], seed=0)
    with pytest.raises(OptionError, match="sizes"):
        make(tokenizer, examples)[0]
