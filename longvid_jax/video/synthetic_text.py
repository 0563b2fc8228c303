"""The words of a made-up world: how questions are put, and how captions and spans of time are written and read."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable

from longvid_jax.video.synthetic_script import MOST, Event
from longvid_jax.video.synthetic_things import COLOURS, SHAPES, Thing

LETTERS = "ABCD"

# By family and what is asked: ways to put it. {a} is "a red star", {the} is "red star", {first} and {second} likewise.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "needle colour": (
        "What colour is the {shape} that appears?",
        "A {shape} appears for a short time. Which colour is it?",
        "Name the colour of the {shape} that comes and goes.",
        "What is the color of the {shape} that shows up briefly?",
    ),
    "needle shape": (
        "What shape is the {colour} object that appears?",
        "Something {colour} appears for a short time. Which shape is it?",
        "Name the shape of the {colour} object that comes and goes.",
        "What is the shape of the {colour} thing that shows up briefly?",
    ),
    "needle thing": (
        "Which object appears for a short time?",
        "What comes and goes in the video?",
        "Name the colour and shape of the object that shows up briefly.",
    ),
    "order first": (
        "Which appears first, the {first} or the {second}?",
        "Which object comes earlier: the {first} or the {second}?",
        "Of the {first} and the {second}, which one is seen first?",
    ),
    "order last": (
        "Which appears last, the {first} or the {second}?",
        "Which object comes later: the {first} or the {second}?",
        "Of the {first} and the {second}, which one is seen last?",
    ),
    "count": (
        "How many times does {a} appear?",
        "How often does {a} show up?",
        "Count how many times {a} comes and goes.",
        "What is the number of times that {a} appears?",
    ),
    "when": (
        "When does {a} appear?",
        "From when to when is {a} in the video?",
        "During which seconds can {a} be seen?",
        "At what time does {a} come and go?",
    ),
    "state before": (
        "What colour is the {shape} before it changes?",
        "The {shape} changes its colour. What was it before?",
        "Which colour did the {shape} have at first?",
        "What was the color of the {shape} before the change?",
    ),
    "state after": (
        "What colour is the {shape} at the end?",
        "The {shape} changes its colour. What is it afterwards?",
        "Which colour does the {shape} turn?",
        "What is the color of the {shape} after the change?",
    ),
    "presence": (
        "Does {a} appear?",
        "Is there {a} at any time in the video?",
        "Can {a} be seen at some point?",
        "Is {a} ever shown?",
    ),
    "caption": (
        "Describe what happens, in order.",
        "List the events of the video in the order in which they happen.",
        "What happens in this video?",
        "Tell what appears and what changes, from first to last.",
    ),
}
_CAPTION = re.compile(r"an? (\w+) (\w+) (?:appears|turns (\w+))")
_SPAN = re.compile(r"from (\d+) to (\d+)")


def with_article(thing: Thing) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing}"


def caption(events: Iterable[Event]) -> str:
    """ "a red star appears, then a blue square turns green": events by moment."""
    return ", then ".join(
        f"{with_article(event.thing)} {'appears' if event.becomes is None else f'turns {event.becomes}'}"
        for event in events
    )


def parse_caption(text: str) -> tuple[tuple[str, str, str | None] | None, ...]:
    """The (colour, shape, what it turns or None) of each event that a caption tells; None for what is no event."""
    told = []
    for part in text.strip().removesuffix(".").lower().split(", then ") if text.strip() else ():
        match = _CAPTION.fullmatch(part.strip())
        colour, shape, becomes = match.groups() if match else (None, None, None)
        known = colour in COLOURS and shape in SHAPES and (becomes is None or becomes in COLOURS)
        told.append((colour, shape, becomes) if known else None)
    return tuple(told)


def whole_seconds(time: float) -> int:
    """To the nearest second, halves up."""
    return math.floor(time + 0.5)


def span(start: float, end: float) -> str:
    """ "from 3 to 5 seconds", each end to the nearest second; never empty for a second or more."""
    return f"from {whole_seconds(start)} to {whole_seconds(end)} seconds"


def parse_span(text: str) -> tuple[float, float] | None:
    """The (start, end) in seconds that a text tells, or None where it tells none that has a length."""
    match = _SPAN.search(text.lower())
    start, end = map(float, match.groups()) if match else (0.0, 0.0)
    return (start, end) if start < end else None


@functools.cache
def sentences() -> tuple[str, ...]:
    """Text with every word, digit and sign of all questions, options and answers, to train a tokenizer on."""
    lines = []
    for colour in COLOURS:
        for shape in SHAPES:
            thing = Thing(colour, shape)
            words = {"colour": colour, "shape": shape, "a": with_article(thing), "first": thing, "second": thing}
            lines += [template.format(**words) for templates in TEMPLATES.values() for template in templates]
        one, other = Thing(colour, SHAPES[0]), Thing(colour, SHAPES[1])
        lines.append(caption([Event("visit", *one, 0, 1), Event("change", *other, 0, 2, 1, colour)]))
    answers = [*COLOURS, *SHAPES, *map(str, range(1, MOST + 1)), "yes", "no"]
    answers += [span(start, start + 3) for start in range(100)]
    lines += [f"{LETTERS[i % len(LETTERS)]}. {answer}" for i, answer in enumerate(answers)]
    return tuple(dict.fromkeys([*lines, *LETTERS, *answers]))


def vocabulary() -> tuple[str, ...]:
    """Every word (digits and signs one by one) of all texts, sorted."""
    return tuple(sorted({word for line in sentences() for word in re.findall(r"[^\W\d]+|\d|[^\w\s]", line)}))
