"""Questions on a script, with answers that only the video gives.

Each family has several ways to ask and a closed set of answers of which, given the text of the question, each is as
likely as the next. What a question names is the only such thing in its world. In videos of `WIDE` seconds or more the
frame in the middle shows no needle that is asked for, and of a change only the colour that is not asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from longvid_jax.video import synthetic_text as text
from longvid_jax.video.synthetic_script import APART, Event, Script
from longvid_jax.video.synthetic_things import COLOURS, HELD_OUT, SHAPES, Thing, allowed, stream

WIDE = 4.0  # seconds: shorter videos are practice in seeing
TOLD = 10  # events in a caption, at most


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answer, and the answers that it could have."""

    family: str
    text: str
    answer: str
    choices: tuple[str, ...]
    span: tuple[float, float] | None  # exact seconds in which the answer is to be seen; None: anywhere
    held_out: bool  # about a colour-shape pair that training never shows


@dataclasses.dataclass(frozen=True)
class Fact:
    """What can be asked in several ways."""

    template: str
    words: dict[str, object]
    answer: str
    choices: tuple[str, ...]
    span: tuple[float, float] | None
    things: tuple[Thing, ...]


def ask(script: Script, count: int | None, families: Sequence[str]) -> tuple[Question, ...]:
    """At most count questions, none twice, the families in turn; None is one of each family that the script allows."""
    streams = [_asked(script, family) for family in families]
    turns = stream(script.split, 3, script.seed)
    questions: dict[str, Question] = {}
    while streams and (count is None or len(questions) < count):
        for i in turns.permutation(len(streams)):
            question = next((q for q in streams[i] if q.text not in questions), None)
            if question is None:
                streams[i] = None
            elif count is None or len(questions) < count:
                questions[question.text] = question
        streams = [asked for asked in streams if asked is not None]
        if count is None:
            break
    return tuple(questions.values())


def _asked(script: Script, family: str) -> Iterator[Question]:
    """Every fact of a family in each of its ways, at random."""
    rng = stream(script.split, 4, list(FAMILIES).index(family), script.seed)
    facts = list(FAMILIES[family](script, rng))
    ways = [list(rng.permutation(len(text.TEMPLATES[fact.template]))) for fact in facts]
    for turn in range(max(map(len, ways), default=0)):
        for i in rng.permutation(len(facts)):
            fact = facts[i]
            if turn < len(ways[i]):
                yield Question(
                    family=family,
                    text=text.TEMPLATES[fact.template][ways[i][turn]].format(**fact.words),
                    answer=fact.answer,
                    choices=fact.choices,
                    span=fact.span,
                    held_out=not HELD_OUT.isdisjoint(fact.things),
                )


def _singles(script: Script) -> list[Event]:
    """Visits of things that come once."""
    visits = [event for event in script.events if event.kind == "visit"]
    things = [event.thing for event in visits]
    return [event for event in visits if things.count(event.thing) == 1]


def _shown_midway(script: Script, start: float, end: float) -> bool:
    return script.seconds >= WIDE and not script.placed and start <= script.seconds / 2 < end


def _needle(script, rng) -> Iterator[Fact]:
    for event in _singles(script):
        if _shown_midway(script, event.start, event.end):
            continue
        others = [thing for thing in script.things if thing != event.thing]
        rest = ((event.start, event.end), (event.thing,))
        if all(thing.shape != event.shape for thing in others):
            yield Fact("needle colour", {"shape": event.shape}, event.colour, tuple(COLOURS), *rest)
        if all(thing.colour != event.colour for thing in others):
            yield Fact("needle shape", {"colour": event.colour}, event.shape, SHAPES, *rest)
        if len(script.events) == 1:
            yield Fact("needle thing", {}, str(event.thing), tuple(map(str, allowed(script.split))), *rest)


def _order(script, rng) -> Iterator[Fact]:
    for early, late in itertools.combinations(_singles(script), 2):
        if late.start - early.start < APART or late.end < early.end:
            continue  # neither would come "first" and go "last"
        named = [early, late] if rng.integers(2) else [late, early]
        words = {"first": named[0].thing, "second": named[1].thing}
        choices = (str(words["first"]), str(words["second"]))
        asked, answer = (("first", early), ("last", late))[rng.integers(2)]
        span = (early.start, max(early.end, late.end))
        yield Fact(f"order {asked}", words, str(answer.thing), choices, span, (early.thing, late.thing))


def _count(script, rng) -> Iterator[Fact]:
    if script.counted is None or script.most < 2:
        return
    visits = [event for event in script.events if event.thing == script.counted and event.kind == "visit"]
    choices = tuple(str(n) for n in range(1, script.most + 1))
    span = (visits[0].start, visits[-1].end)
    yield Fact("count", _name(script.counted), str(len(visits)), choices, span, (script.counted,))


def _when(script, rng) -> Iterator[Fact]:
    for event in _singles(script):
        length = text.whole_seconds(event.end) - text.whole_seconds(event.start)
        choices, span = _spans(length, text.whole_seconds(script.seconds)), (event.start, event.end)
        if len(choices) > 1:
            yield Fact("when", _name(event.thing), text.span(*span), choices, span, (event.thing,))


def _state(script, rng) -> Iterator[Fact]:
    for event in script.events:
        if event.kind != "change":
            continue
        spans = (event.start, event.at), (event.at, event.end)
        for asked, thing, span in zip(("before", "after"), event.things, spans, strict=True):
            if not _shown_midway(script, *span):
                words = {"shape": event.shape}
                yield Fact(f"state {asked}", words, thing.colour, tuple(COLOURS), span, event.things)


def _presence(script, rng) -> Iterator[Fact]:
    """Yes: a visit. No: the colour of one visit in the shape of another. Fair coins, as many as both last."""
    came = list(dict.fromkeys(event.thing for event in script.events if event.kind == "visit"))
    pairs = {Thing(one.colour, other.shape) for one in came for other in came}
    absent = sorted(pairs.difference(script.things).intersection(allowed(script.split)))
    if not absent:
        return
    # Shapes of which more is held out can be paired less often, so they are chosen more often.
    weights = np.array([1.0 / (_colours_of(script.split, thing.shape) - 1) for thing in absent])
    absent = [absent[i] for i in rng.choice(len(absent), len(absent), replace=False, p=weights / weights.sum())]
    came = [came[i] for i in rng.permutation(len(came))]
    for yes in rng.random(min(len(came), len(absent))) < 0.5:
        thing = (came if yes else absent).pop()
        visit = next((event for event in script.events if event.thing == thing), None)
        span = (visit.start, visit.end) if yes else None
        yield Fact("presence", _name(thing), "yes" if yes else "no", ("yes", "no"), span, (thing,))


def _caption(script, rng) -> Iterator[Fact]:
    """The other choices are the same events in other orders; of only one or two, in other colours."""
    moments = np.array([event.moment for event in script.events])
    if not 0 < len(moments) <= TOLD or np.diff(moments).min(initial=APART) < APART - 0.01:
        return
    answer = text.caption(script.events)
    few = len({event.things for event in script.events}) < 3
    choices = {answer}
    for _ in range(32):
        if len(choices) == len(text.LETTERS):
            break
        order = rng.permutation(len(moments))
        choices.add(text.caption(_recoloured(script, rng) if few else [script.events[i] for i in order]))
    listed = sorted(choices)
    listed = tuple(listed[i] for i in rng.permutation(len(listed)))
    yield Fact("caption", {}, answer, listed, None, tuple(thing for event in script.events for thing in event.things))


def _recoloured(script: Script, rng: np.random.Generator) -> list[Event]:
    events = []
    for event in script.events:
        colours = [thing.colour for thing in allowed(script.split) if thing.shape == event.shape]
        one, other = (colours[i] for i in rng.permutation(len(colours))[:2])
        events.append(dataclasses.replace(event, colour=one, becomes=other if event.becomes else None))
    return events


@functools.cache
def _colours_of(split: str, shape: str) -> int:
    return sum(thing.shape == shape for thing in allowed(split))


@functools.lru_cache(maxsize=256)
def _spans(length: int, seconds: int) -> tuple[str, ...]:
    """Every span of that many whole seconds in a video."""
    return tuple(text.span(start, start + length) for start in range(seconds - length + 1))


def _name(thing: Thing) -> dict[str, object]:
    return {"a": text.with_article(thing)}


FAMILIES = {
    "needle": _needle,
    "order": _order,
    "count": _count,
    "when": _when,
    "state": _state,
    "presence": _presence,
    "caption": _caption,
}


def multiple_choice(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    """The question with up to four of its choices in random order, a line "A. red" each; and the right letter.

    Spans of time to choose from do not overlap, where the video has room for that.
    """
    others = [choice for choice in question.choices if choice != question.answer]
    others = [others[i] for i in rng.permutation(len(others))]
    if question.family == "when":
        apart = [question.answer]
        for choice in others:
            (start, end), taken = text.parse_span(choice), map(text.parse_span, apart)
            if len(apart) < len(text.LETTERS) and all(end <= one or start >= other for one, other in taken):
                apart.append(choice)
        others = apart[1:] or others
    options = [question.answer, *others[: len(text.LETTERS) - 1]]
    options = [options[i] for i in rng.permutation(len(options))]
    lines = [f"{letter}. {option}" for letter, option in zip(text.LETTERS, options, strict=False)]
    return "\n".join([question.text, *lines]), text.LETTERS[options.index(question.answer)]


def retimed(question: Question, later: float, slower: float) -> Question:
    """The question with every span that its answers tell as if the video had come `slower` times as slow, and `later`.

    Whole seconds are mapped, and rounded once more.
    """
    if question.family != "when":
        return question
    spans = {choice: text.parse_span(choice) for choice in (question.answer, *question.choices)}
    moved = {choice: text.span(*(later + slower * time for time in span)) for choice, span in spans.items()}
    return dataclasses.replace(
        question, answer=moved[question.answer], choices=tuple(moved[choice] for choice in question.choices)
    )
