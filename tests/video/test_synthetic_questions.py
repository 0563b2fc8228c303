"""Questions on the made-up world: true, unambiguous, and not to be guessed."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from longvid_jax.errors import OptionError
from longvid_jax.video.synthetic import (
    COLOURS,
    FAMILIES,
    LEVELS,
    SHAPES,
    World,
    multiple_choice,
    parse_caption,
    parse_span,
    sentences,
    text_only,
    vocabulary,
)

WORLDS = 800
LAST = re.compile(r"\b(last|later)\b")
BEFORE = re.compile(r"\b(before|at first)\b")


@pytest.fixture(scope="module")
def asked():
    """By (level, split): one question of each family on each of many worlds."""
    return {
        (level, split): [q for seed in range(WORLDS) for q in World(seed, level=level, split=split).questions()]
        for level in ("clear", "wild")
        for split in ("train", "test")
    }


def sightings(world):
    """When each thing is there to be seen: {thing: list of (from, to)}, by looking every 10 milliseconds."""
    times = np.arange(0, world.seconds, 0.01)
    seen = defaultdict(list)
    for i, time in enumerate(times):
        for thing in world.visible(time):
            runs = seen[str(thing)]
            if runs and runs[-1][1] == i:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
    return {thing: [(start * 0.01, end * 0.01) for start, end in runs] for thing, runs in seen.items()}


def truth(question, seen):
    """The answer by what is seen; fails where what the question names is not one thing."""
    text = question.text
    things = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)
    named = [" ".join(thing) for thing in things]
    if question.family in ("needle", "state"):
        words = [word for word in (*COLOURS, *SHAPES) if re.search(rf"\b{word}\b", text)]
        (word,) = words
        those = sorted((thing for thing in seen if word in thing.split()), key=lambda thing: seen[thing][0])
        if question.family == "needle":
            (thing,) = those
            return thing.split()[word in COLOURS]
        before, after = those
        assert seen[before][0][1] == pytest.approx(seen[after][0][0])
        return (before if BEFORE.search(text) else after).split()[0]
    if question.family == "order":
        (one,), (other,) = (seen[thing] for thing in named)
        assert len({np.ceil(2 * start) for start, _ in (one, other)}) == 2  # told apart at 2 frames a second
        return named[(one < other) == bool(LAST.search(text))]
    if question.family == "count":
        return str(len(seen[named[0]]))
    if question.family == "presence":
        return "yes" if named[0] in seen else "no"
    ((start, end),) = seen[named[0]]
    assert question.family == "when" and question.span == pytest.approx((start, end), abs=0.02)
    return question.answer


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seconds", [4, 16, 40])
def test_answers_are_true_and_what_is_named_is_one_thing(level, seconds):
    families = Counter()
    for seed in range(6):
        world = World(seed, level=level, seconds=seconds, split="test")
        seen = sightings(world)
        for question in world.questions(30):
            assert question.answer in question.choices and len(set(question.choices)) == len(question.choices) > 1
            families[question.family] += 1
            if question.family == "caption":
                told = [(event.colour, event.shape, event.becomes) for event in world.events]
                assert list(parse_caption(question.answer)) == told
                assert all(None not in parse_caption(choice) for choice in question.choices)
            else:
                assert truth(question, seen) == question.answer, question
    assert set(families) == set(FAMILIES) - ({"count"} if seconds == 4 else set())


def test_spans_show_the_answer():
    for seed in range(30):
        for question in World(seed, split="test").questions(20):
            if question.family == "caption" or question.answer == "no":
                assert question.span is None
            else:
                start, end = question.span
                assert 0 <= start and end - start >= 1 and end <= 16
            if question.family == "when":
                (low, high), (start, end) = parse_span(question.answer), question.span
                assert abs(low - start) <= 0.5 and abs(high - end) <= 0.5 and high - low >= 1


def test_the_middle_frame_shows_no_needle_and_no_colour_that_is_asked_for(asked):
    for question in asked["clear", "test"]:
        start, end = question.span or (0, 0)
        if question.family in ("needle", "state"):
            assert not start <= 8 < end


@pytest.mark.parametrize("level", ["clear", "wild"])
def test_words_alone_give_no_answer(asked, level):
    """The most frequent answer to the same words is right as often as a guess: within 4 standard deviations."""
    train, test = (asked[level, split] for split in ("train", "test"))
    scores = text_only(train, test)
    assert set(scores) == set(FAMILIES)
    for family, score in scores.items():
        slack = 4 * np.sqrt(score["chance"] * (1 - score["chance"]) / score["questions"])
        assert score["questions"] > 0.8 * WORLDS and score["accuracy"] < score["chance"] + slack, (family, score)
    assert 0.14 < scores["needle"]["chance"] < 0.15 and scores["order"]["chance"] == scores["presence"]["chance"] == 0.5


def test_a_giveaway_would_be_found(asked):
    """The check of the check: answers that follow from a word in the question are learned."""
    train, test = (asked["clear", split] for split in ("train", "test"))
    presence = [[q for q in questions if q.family == "presence"] for questions in (train, test)]
    rigged = [q for q in presence[0] if "red " not in q.text or q.answer == "yes"]
    red = [q for q in presence[1] if "red " in q.text and q.answer == "yes"]
    assert len(red) > 20 and text_only(rigged, red)["presence"]["accuracy"] > 0.95
    first = [[q for q in questions if q.family == "order" and q.answer == q.choices[0]] for questions in (train, test)]
    assert text_only(*first)["order"]["accuracy"] == 1


def unlikely(counts):
    """How far counts are from equal, in standard deviations of the chi-square statistic."""
    counts = np.array(counts, float)
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (chi - (len(counts) - 1)) / np.sqrt(2 * (len(counts) - 1))


@pytest.mark.parametrize("level", ["clear", "wild"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_equally_frequent(asked, level, split):
    answers = defaultdict(Counter)
    for question in asked[level, split]:
        if question.family in ("needle", "count", "state", "presence"):
            answers[question.family, question.choices][question.answer] += 1
        elif question.family == "order":
            asks = "last" if LAST.search(question.text) else "first"
            answers["order", asks][question.choices.index(question.answer)] += 1
            answers["order", ""][asks] += 1
        elif question.family == "when":
            answers["when", "start"][int(question.span[0] / 15 * 10)] += 1  # starts lie in the first 15 of 16 seconds
    lengths = {"needle": (6, 8), "count": (5,), "state": (8,), "presence": (2,), "order": (2,), "when": (10,)}
    for (family, kind), counts in answers.items():
        assert len(counts) in lengths[family]
        assert unlikely(list(counts.values())) < 5, (family, kind, counts)
    assert len(answers) == 2 + 1 + 1 + 1 + 3 + 1


def test_presence_is_even_for_every_pair(asked):
    votes = defaultdict(list)
    for level in ("clear", "wild"):
        for question in asked[level, "test"]:
            if question.family == "presence":
                votes[re.search(rf"({'|'.join(COLOURS)}) \w+", question.text)[0]].append(question.answer == "yes")
    assert len(votes) == 48
    scores = [(np.mean(vote) - 0.5) * 2 * np.sqrt(len(vote)) for vote in votes.values()]
    assert np.abs(scores).max() < 4.5 and np.std(scores) < 1.4


def test_absent_things_are_put_together_of_what_is_there():
    for seed in range(60):
        world = World(seed, level="busy", split="test")
        visits = [event.thing for event in world.events if event.kind == "visit"]
        for question in world.questions(20, ["presence"]):
            colour, shape = re.search(rf"({'|'.join(COLOURS)}) (\w+)", question.text).groups()
            assert colour in [thing.colour for thing in visits] and shape in [thing.shape for thing in visits]


@pytest.mark.parametrize("split", ["train", "test"])
def test_held_out_is_said(asked, split):
    share = np.mean([question.held_out for question in asked["clear", split] if question.family == "needle"])
    assert share == 0 if split == "train" else 0.1 < share < 0.24  # a sixth of the pairs


def test_few_questions_are_the_first_of_many():
    world = World(4, level="busy", split="validation")
    many = world.questions(40)
    assert [world.questions(n) for n in (0, 1, 5, 13)] == [many[:n] for n in (0, 1, 5, 13)]
    assert len({question.text for question in many}) == len(many)
    assert set(world.questions()) == set(many[: len(world.questions())])
    assert {q.family for q in world.questions()} == set(FAMILIES)
    alone = world.questions(3, ["when"])
    assert [question for question in many if question.family == "when"][: len(alone)] == list(alone)


def test_every_way_to_ask_is_used(asked):
    from longvid_jax.video.synthetic_text import TEMPLATES

    texts = [question.text for question in asked["clear", "train"]]
    texts += [q.text for seed in range(40) for q in World.needle(seed, seconds=8, depth=0.2).questions(20)]
    for template in (template for templates in TEMPLATES.values() for template in templates):
        pattern = re.compile(re.sub(r"\\\{\w+\\\}", r"[a-z ]+", re.escape(template)))
        assert any(map(pattern.fullmatch, texts)), template


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a red star appears, then an orange ring turns white", (("red", "star", None), ("orange", "ring", "white"))),
        ("A red star appears.", (("red", "star", None),)),
        ("a red star appears, then nothing", (("red", "star", None), None)),
        ("a pink star appears, then a red star turns pink", (None, None)),
        ("", ()),
    ],
)
def test_captions_are_read(text, told):
    assert parse_caption(text) == told


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("from 3 to 5 seconds", (3, 5)),
        ("It appears From 10 to 112 seconds.", (10, 112)),
        ("from 5 to 3 seconds", None),
        ("from 3 to 3 seconds", None),
        ("at noon", None),
    ],
)
def test_spans_are_read(text, span):
    assert parse_span(text) == span


def test_letters(asked):
    rng, letters = np.random.default_rng(0), defaultdict(Counter)
    for question in asked["clear", "test"]:
        text, letter = multiple_choice(question, rng)
        first, *lines = text.split("\n")
        options = dict(line.split(". ", 1) for line in lines)
        assert first == question.text and options[letter] == question.answer
        assert "ABCD".startswith("".join(options))
        assert len(options) == min(4, len(question.choices)) or (question.family == "when" and len(options) > 1)
        assert len(set(options.values())) == len(options) and set(options.values()) <= set(question.choices)
        letters[len(options)][letter] += 1
        if question.family == "when":
            spans = sorted(map(parse_span, options.values()))
            assert len({end - start for start, end in spans}) == 1
            assert all(early[1] <= late[0] for early, late in zip(spans, spans[1:], strict=False))
    for number in (2, 4):
        assert len(letters[number]) == number and unlikely(list(letters[number].values())) < 5


def test_the_vocabulary_covers_all_text(asked):
    words = set(vocabulary())
    assert len(words) < 250 and list(words) and set(sentences())
    rng = np.random.default_rng(0)
    worlds = [
        World(seed, level="wild", split="test", seconds=seconds) for seed in range(40) for seconds in (3, 16, 4000)
    ]
    questions = [q for world in worlds for q in world.questions(12)] + asked["wild", "test"][:2000]
    for question in questions:
        for text in (multiple_choice(question, rng)[0], question.answer):
            assert words.issuperset(re.findall(r"[^\W\d]+|\d|[^\w\s]", text)), text


def test_bad_questions():
    with pytest.raises(OptionError, match="family is 'why', expected one of needle, order"):
        World(0).questions(families=["why"])
    with pytest.raises(OptionError, match="count is -1"):
        World(0).questions(-1)
