"""What answers a question, told as facts."""

import dataclasses

import numpy as np
import pytest

from longvid_jax.data.batches import endless
from longvid_jax.data.chat import QUERIES_FIRST_TEMPLATE
from longvid_jax.data.facts import FACT_WIDTH, features
from longvid_jax.data.telling import TellingBatches, TellingSource, noted, relevant, told
from longvid_jax.data.tokenizer import bert_tokenizer, world_tokenizer
from longvid_jax.errors import OptionError
from longvid_jax.video.synthetic import World

FAMILIES = ("needle", "order", "count", "when", "state", "presence")


def test_the_events_that_answer_are_found():
    counted = dict.fromkeys(FAMILIES, 0)
    for seed in range(60):
        world = World(seed, seconds=16.0)
        for question in world.questions(12, FAMILIES):
            events, family = relevant(world, question), question.family
            counted[family] += 1
            if family in ("needle", "when"):
                assert [(event.start, event.end) for event in events] == [question.span]
            if family == "needle":
                assert question.answer in (events[0].colour, events[0].shape, str(events[0].thing))
            if family == "presence":
                assert bool(events) == (question.answer == "yes")
            if family == "count":
                assert len(events) == int(question.answer)
                assert len({event.thing for event in events}) == 1
            if family == "order":
                assert sorted(str(event.thing) for event in events) == sorted(question.choices)
                first = "first" in question.text or "earlier" in question.text
                assert str(events[0 if first else -1].thing) == question.answer
            if family == "state":
                (event,) = events
                assert question.answer in (event.colour, event.becomes)
    assert min(counted.values()) > 10


def test_facts_stand_in_order_and_are_moved_in_time():
    world = World(3, seconds=16.0)
    questions = world.questions(12, FAMILIES)
    facts = told(world, questions, 4, 10.0, 2.0)["facts"]
    assert facts.shape == (len(questions), 4, FACT_WIDTH)
    for row, question in zip(facts, questions, strict=True):
        events = relevant(world, question)[:4]
        for n in range(4):
            wanted = features(events[n], 10.0, 2.0) if n < len(events) else np.zeros(FACT_WIDTH)
            np.testing.assert_array_equal(row[n], wanted)


@pytest.mark.parametrize("clip_frames", [4, 8])
def test_an_event_is_noted_down_once_as_far_as_its_clip_knows_it(clip_frames):
    times, cut = np.arange(32) / 2, 0
    for seed in range(20):
        world = World(seed, seconds=16.0)
        questions = world.questions(12, FAMILIES)
        notes = noted(world, questions, times, clip_frames, 2)
        facts = notes["facts"]
        assert facts.shape == (len(questions), 32, 2, FACT_WIDTH)
        assert notes["seen"].shape == (len(questions), 32)
        for row, seen, question in zip(facts, notes["seen"], questions, strict=True):
            events = relevant(world, question)
            for t, time in enumerate(times):
                assert seen[t] == any(event.start <= time < event.end for event in events)
                begun = [event for event in events if time - 0.5 < event.moment <= time < event.end]
                clip_ends = times[t - t % clip_frames + clip_frames - 1]
                known = [dataclasses.replace(event, end=min(event.end, clip_ends)) for event in begun]
                cut += sum(one.end != other.end for one, other in zip(known, begun, strict=True))
                for n in range(2):
                    wanted = features(known[n]) if n < len(known) else np.zeros(FACT_WIDTH)
                    np.testing.assert_array_equal(row[t, n], wanted)
    assert cut > 10


def test_a_world_of_which_nothing_can_be_asked_gives_way():
    source = TellingSource(10, seconds=(4.0,), families=("presence",), questions=1)
    silent = [n for n in range(40) if not World(n, seconds=4.0).questions(1, ("presence",))]
    assert silent
    other = TellingSource(silent[0] + 1, seconds=(4.0,), families=("presence",), questions=1)
    assert other.world(silent[0]).seed == next(n for n in range(silent[0], 10**6, silent[0] + 1) if n not in silent)
    assert [source.world(n).seed for n in range(10) if n not in silent] == [n for n in range(10) if n not in silent]


def test_worlds_too_short_for_what_is_asked():
    with pytest.raises(OptionError, match="worlds of 4 seconds have no questions of count; make them longer"):
        TellingSource(10, seconds=(4.0,), families=("count",))[3]


def test_frames_are_filled_up_to_the_bucket():
    how = {"size": (28, 28), "questions": 3, "families": FAMILIES, "temporal": 1}
    source = TellingSource(50, **how, seconds=(4.0, 8.0), slots=2, clip_frames=8)
    tokenizer = world_tokenizer()
    tokenizer.chat_template = QUERIES_FIRST_TEMPLATE
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    sizes = {"frames": (32,), "text": (96,), "queries": lambda frames: 4, "reads": 64}
    batch = TellingBatches(endless(source, 0), tokenizer, bert_tokenizer(), video, 8, **sizes)[0]
    assert {example.num_frames for example in batch.examples} == {8, 16}
    assert batch.arrays["seen"].shape == (8, 4, 32) and batch.arrays["facts"].shape == (8, 4, 64, FACT_WIDTH)
    for facts, seen, example in zip(batch.arrays["facts"], batch.arrays["seen"], batch.examples, strict=True):
        told, count, frames = example.told(), len(example.conversations), example.num_frames
        np.testing.assert_array_equal(facts[:count].reshape(count, 32, 2, FACT_WIDTH)[:, :frames], told["facts"])
        np.testing.assert_array_equal(seen[:count, :frames], told["seen"])
        assert not seen[:, frames:].any() and not facts[:, 2 * frames :].any()


@pytest.mark.parametrize(("slots", "clip_frames", "facts"), [(4, 0, 4), (2, 8, 2 * 16)])
def test_batches_have_a_row_of_facts_for_each_question(slots, clip_frames, facts):
    how = {"seconds": (8.0,), "size": (28, 28), "questions": 5, "families": FAMILIES, "temporal": 1}
    source = TellingSource(50, **how, slots=slots, clip_frames=clip_frames)
    tokenizer = world_tokenizer()
    tokenizer.chat_template = QUERIES_FIRST_TEMPLATE

    def batches(process: int = 0, processes: int = 1) -> TellingBatches:
        return TellingBatches(
            endless(source, 0),
            tokenizer,
            bert_tokenizer(),
            tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            4,
            frames=(16,),
            text=(96,),
            queries=lambda frames: 4,
            reads=64,
            process=process,
            processes=processes,
        )

    batch = batches()[3]
    assert batch.arrays["facts"].shape == (4, batch.arrays["tokens"].shape[1], facts, FACT_WIDTH)
    for row, example in zip(batch.arrays["facts"], batch.examples, strict=True):
        asked = len(example.conversations)
        np.testing.assert_array_equal(row[:asked], example.told()["facts"].reshape(asked, facts, FACT_WIDTH))
        assert not row[asked:].any()
    halves = [batches(n, 2)[3].arrays["facts"] for n in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), batch.arrays["facts"])
