"""What answers a question, told as facts."""

import numpy as np

from longvid_jax.data.batches import endless
from longvid_jax.data.chat import QUERIES_FIRST_TEMPLATE
from longvid_jax.data.facts import FACT_WIDTH, features
from longvid_jax.data.telling import TellingBatches, TellingSource, relevant, told
from longvid_jax.data.tokenizer import bert_tokenizer, world_tokenizer
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
    facts = told(world, questions, 4, 10.0, 2.0)
    assert facts.shape == (len(questions), 4, FACT_WIDTH)
    for row, question in zip(facts, questions, strict=True):
        events = relevant(world, question)[:4]
        for n in range(4):
            wanted = features(events[n], 10.0, 2.0) if n < len(events) else np.zeros(FACT_WIDTH)
            np.testing.assert_array_equal(row[n], wanted)


def test_batches_have_a_row_of_facts_for_each_question():
    source = TellingSource(50, seconds=(8.0,), size=(28, 28), questions=5, families=FAMILIES, temporal=1, slots=4)
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
    assert batch.arrays["facts"].shape == (4, batch.arrays["tokens"].shape[1], 4, FACT_WIDTH)
    for row, example in zip(batch.arrays["facts"], batch.examples, strict=True):
        asked = len(example.conversations)
        np.testing.assert_array_equal(row[:asked], example.told())
        assert not row[asked:].any()
    halves = [batches(n, 2)[3].arrays["facts"] for n in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), batch.arrays["facts"])
