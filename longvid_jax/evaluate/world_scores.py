"""`longvid eval --benchmark world`: how often a model is right, by family of questions, beside what guessing earns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from longvid_jax.evaluate import world
from longvid_jax.evaluate.metrics import THRESHOLDS, event_score, grounding, interval, span_iou
from longvid_jax.evaluate.world import Asked, Setup
from longvid_jax.systems.base import VideoModel
from longvid_jax.video.synthetic import FAMILIES, parse_span, text_only
from longvid_jax.video.synthetic_text import LETTERS

TAUGHT = 8000  # questions of the training split from which the words' bias is learned
ALL = "all"


def run(
    model: VideoModel,
    setup: Setup,
    *,
    baselines: bool = True,
    progress: Callable[[str, int], None] = lambda what, count: None,
) -> dict:
    """Asks, scores and compares; returns plain values, ready for JSON.

    baselines: also the best guesses from the words of a question alone, learned on the training split, and the same
    model shown nothing but the frame in the middle. progress(what, count) is told of questions that were answered.
    """
    start = time.perf_counter()
    worlds, asked = world.ask(setup)
    told = world.answers(
        model, worlds, asked, setup.times, setup.size, progress=lambda count: progress("answering", count)
    )
    took = {"questions": time.perf_counter() - start}
    result = {
        "benchmark": "world",
        "setup": dataclasses.asdict(setup),
        "method": None if model.method is None else dataclasses.asdict(model.method),
        "videos": len(worlds),
        "families": by_family(asked, told),
        **details(asked, told),
    }
    if baselines:
        start = time.perf_counter()
        result["baselines"] = {
            "text_only": _text_only(setup, asked),
            "middle_frame": _middle_frame(model, setup, worlds, asked, lambda count: progress("one frame", count)),
        }
        took["baselines"] = time.perf_counter() - start
    return {**result, "took": took}


def by_family(asked: Sequence[Asked], told: Sequence[str]) -> dict[str, dict]:
    """Of each family and of all together: questions, accuracy and its 95 % interval, chance; and of held-out pairs."""
    right = np.array([text == one.answer for one, text in zip(asked, told, strict=True)])
    family = np.array([one.question.family for one in asked])
    held_out = np.array([one.question.held_out for one in asked])
    videos = np.array([one.video for one in asked])
    chance = np.array([_chance(one) for one in asked])
    result = {}
    for name in (*FAMILIES, ALL):
        here = (family == name) | (name == ALL)
        if here.any():
            result[name] = {
                "questions": int(here.sum()),
                "accuracy": float(right[here].mean()),
                "interval": list(interval(right[here], videos[here])),
                "chance": float(chance[here].mean()),
                "held_out": _part(right, here & held_out),
                "not_held_out": _part(right, here & ~held_out),
            }
    return result


def details(asked: Sequence[Asked], told: Sequence[str]) -> dict[str, dict | None]:
    """What families have beside accuracy, where they were answered in full; None where they were not.

    when: mean IoU and R@1 with the exact seconds, how many answers tell no span, and what the right answers, which are
    in whole seconds, would get. caption: the share that is exactly right, and the F1 score of events in order.
    """
    open_ended = [(one, text) for one, text in zip(asked, told, strict=True) if not one.letters]
    when = [(one, text) for one, text in open_ended if one.question.family == "when"]
    caption = [(one, text) for one, text in open_ended if one.question.family == "caption"]
    result = {"when": None, "caption": None}
    if when:
        ious = [span_iou(text, one.question.span) for one, text in when]
        result["when"] = {
            "questions": len(when),
            **grounding(ious),
            "without_span": sum(parse_span(text) is None for _, text in when),
            "right_answers": grounding([span_iou(one.answer, one.question.span) for one, _ in when]),
        }
    if caption:
        result["caption"] = {
            "questions": len(caption),
            "exact": float(np.mean([text == one.answer for one, text in caption])),
            "events": float(np.mean([event_score(text, one.answer) for one, text in caption])),
        }
    return result


def _part(right: np.ndarray, here: np.ndarray) -> dict | None:
    return {"questions": int(here.sum()), "accuracy": float(right[here].mean())} if here.any() else None


def _chance(one: Asked) -> float:
    """What guessing among the answers that the question could have earns; a caption could be any of countless ones."""
    if one.question.family == "caption" and not one.letters:
        return 0.0
    count = len(one.question.choices)
    return 1 / (min(count, len(LETTERS)) if one.letters else count)


def _text_only(setup: Setup, asked: Sequence[Asked]) -> dict[str, float]:
    """Accuracy by family of the best guess from a question's words."""
    taught = dataclasses.replace(setup, split="train", seed=0, examples=TAUGHT)
    _, lessons = world.ask(taught)
    found = text_only(map(_as_put, lessons), map(_as_put, asked))
    total = sum(one["questions"] for one in found.values())
    found[ALL] = {"accuracy": sum(one["accuracy"] * one["questions"] for one in found.values()) / total}
    return {name: found[name]["accuracy"] for name in (*FAMILIES, ALL) if name in found}


def _as_put(one: Asked):
    """The question as it was asked, which may be in letters."""
    if not one.letters:
        return one.question
    choices = tuple(LETTERS[: len(one.question.choices)])
    return dataclasses.replace(one.question, text=one.text, answer=one.answer, choices=choices)


def _middle_frame(model: VideoModel, setup: Setup, worlds, asked: Sequence[Asked], progress) -> dict:
    told = world.answers(world.glimpse(model), worlds, asked, world.middle, setup.size, progress=progress)
    families = by_family(asked, told)
    return {
        "families": {name: one["accuracy"] for name, one in families.items()},
        **details(asked, told),
    }


# --- as text ----------------------------------------------------------------------------------------------------------


def report(result: dict) -> str:
    """The result of `run` as text."""
    setup, families, baselines = result["setup"], result["families"], result.get("baselines")
    lines = [
        f"{families[ALL]['questions']} questions{' in letters' * setup['letters']} on {result['videos']} worlds of "
        f"{setup['seconds']:g} seconds: {setup['level']}, split {setup['split']}, seed {setup['seed']}",
        "",
        f"{'':10}{'questions':>10}{'right':>8}   {'95 % interval':18}{'held-out pairs':>18}{'guessing':>11}"
        + (f"{'words only':>12}{'one frame':>11}" if baselines else ""),
    ]
    for name, one in families.items():
        low, high = one["interval"]
        held_out = one["held_out"]
        line = (
            f"{name:10}{one['questions']:10}{_percent(one['accuracy']):>8}   {_percent(low)} to {_percent(high)}"
            f"{'-' if held_out is None else _percent(held_out['accuracy']) + ' of ' + str(held_out['questions']):>18}"
            f"{_percent(one['chance']):>11}"
        )
        if baselines:
            alone, glimpse = baselines["text_only"][name], baselines["middle_frame"]["families"][name]
            line += f"{_percent(alone):>12}{_percent(glimpse):>11}"
        lines.append(line)
    lines.append("")
    if when := result["when"]:
        lines.append(f"when: {_spans(when)}; {when['without_span']} of {when['questions']} answers tell no span")
        lines.append(f"      the right answers, in whole seconds: {_spans(when['right_answers'])}")
        if baselines:
            lines.append(f"      from one frame: {_spans(baselines['middle_frame']['when'])}")
    if caption := result["caption"]:
        lines.append(f"caption: {_percent(caption['exact'])} exact, events in order (F1) {caption['events']:.3f}")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:5.1f} %"


def _spans(one: dict) -> str:
    reached = ", ".join(f"{_percent(one[f'r1@{least}']).strip()} at {least}" for least in THRESHOLDS)
    return f"mIoU {one['miou']:.3f}, R@1 by IoU {reached}"
