"""What the words of a question give away: the most frequent answer to it, learned without any video."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from longvid_jax.video.synthetic_questions import Question
from longvid_jax.video.synthetic_things import COLOURS, SHAPES

_NAMES = re.compile(rf"\b({'|'.join([*COLOURS, *SHAPES])})\b")
ENOUGH = 8  # questions with something in common to learn from


def text_only(train: Iterable[Question], test: Iterable[Question]) -> dict[str, dict[str, float]]:
    """Accuracy of the best constant answer to questions with the same words, template or one colour or shape.

    Of these the one is followed that leaned most to one answer in training.

    Returns:
      By family: "accuracy" on test, "chance" (guessing among the choices) and the number of "questions".
    """
    seen: dict[tuple, Counter] = defaultdict(Counter)
    for question in train:
        for clue in _clues(question):
            seen[clue][_answer(question)] += 1
    guesses = {clue: _leaning(counts) for clue, counts in seen.items() if counts.total() >= ENOUGH}
    right, chance, total = Counter(), Counter(), Counter()
    for question in test:
        guess = max((guesses[clue] for clue in _clues(question) if clue in guesses), default=(0.0, None))[1]
        right[question.family] += guess == _answer(question)
        chance[question.family] += 1 / len(question.choices)
        total[question.family] += 1
    return {
        family: {"accuracy": right[family] / count, "chance": chance[family] / count, "questions": count}
        for family, count in total.items()
    }


def _leaning(counts: Counter) -> tuple[float, str]:
    """The most frequent answer after its share, less what few examples may add to that."""
    (answer, count), total = counts.most_common(1)[0], counts.total()
    return count / total - 0.5 / total**0.5, answer


def _clues(question: Question) -> list[tuple]:
    names = _NAMES.findall(question.text)
    template = _NAMES.sub("*", question.text)
    places = [(question.family, place, name) for place, name in enumerate(names)]
    return [(question.family, question.text), (question.family, template), (question.family, *names), *places]


def _answer(question: Question) -> str:
    """Of two named things, whether it is the one named first."""
    return str(question.choices.index(question.answer)) if question.family == "order" else question.answer
