"""Why frame selection adds what it does: how many frames in detail have to show what is asked, and how many do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from longvid_jax.evaluate import rewind_watch, world
from longvid_jax.evaluate.metrics import interval
from longvid_jax.evaluate.results import Results, fingerprint
from longvid_jax.evaluate.rewind_watch import Variant
from longvid_jax.evaluate.world import Rendered, Setup

SELECTED = "selected"


def run(
    variants: Callable[[int | None], Variant], plan, results: Results, progress: Callable[[str, int], None]
) -> list[dict]:
    """A row for each length of seed 0 and each of plan.views, and one for the frames that are selected.

    variants: makes one that looks at so many frames in detail, all of which show what is asked; for None at those
    selected. value: right answers, of all questions but *when* that some frame shows the answer to; shows: frames in
    detail that do, a question; covered: questions that have one.
    """
    ways = {str(n): variants(n) for n in plan.views} | {SELECTED: variants(None)}
    weights, rows = fingerprint(ways[SELECTED].model), []
    for length in plan.lengths:
        setup, what = plan.at(0, length), f"{length}x views"
        key = {"benchmark": "claims rewind views", "length": length, "views": list(plan.views), "weights": weights}
        if (have := results.get(key)) is None:
            have = results.put(key, _asked(ways, setup, lambda count, what=what: progress(what, count)))
        else:
            progress(what, len(ways) * setup.examples)
        for way, found in have.items():
            value, group = [right for _, right, _ in found], [video for video, *_ in found]
            shows = np.array([count for *_, count in found])
            row = {"length": length, "views": way, "questions": len(found), "value": float(np.mean(value))}
            row["low"], row["high"] = interval(np.array(value, float), group)
            rows.append(row | {"shows": float(shows.mean()), "covered": float((shows > 0).mean())})
    return rows


def _asked(ways: dict[str, Variant], setup: Setup, done: Callable[[int], None]) -> dict[str, list]:
    """By way, of each question: its video, whether it is right, and how many frames in detail show what it asks."""
    worlds, asked = world.ask(setup)
    worlds, found = [Rendered(one, setup) for one in worlds], {way: [] for way in ways}
    anyone = next(iter(ways.values()))
    for here, memory, seen in rewind_watch.memories(anyone, worlds, asked, setup.times, setup.size):
        for way, variant in ways.items():
            variant.seen = seen
            chosen = variant._look_back(memory)[1].selected
            indices, valid = np.asarray(chosen.indices), np.asarray(chosen.valid)
            for row, (i, text) in enumerate(zip(here, rewind_watch.said(variant, memory), strict=False)):
                if seen[row].any() and asked[i].question.family != "when":
                    shows = int(seen[row][indices[row][valid[row]]].sum())
                    found[way].append([asked[i].video, text == asked[i].answer, shows])
            done(len(here))
    return found
