"""ReWind's published claims (arXiv 2411.15556) put to the test: what its memory and its frame selection each add.

Every way sees the same worlds and is asked the same questions, so that differences are paired; intervals are bootstraps
over videos.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import claims_rewind_views, rewind_watch, world
from longvid_jax.evaluate.compare import TIMELESS, compare, verdict
from longvid_jax.evaluate.heatmap import questions
from longvid_jax.evaluate.metrics import interval
from longvid_jax.evaluate.results import Results, fingerprint
from longvid_jax.evaluate.rewind_watch import ORACLE, RELEVANT, SELECTED, UNIFORM, Variant
from longvid_jax.evaluate.world import APART, Asked, Rendered, Setup
from longvid_jax.memory.state import RewindMemory
from longvid_jax.systems.rewind import ReWind, RewindModel
from longvid_jax.video.synthetic import World

LENGTHS = (1, 4, 16)  # times the seconds of the setup
FAMILIES = ("needle", "order", "count", "when", "state", "presence")
MANY = 64  # frames, without memory
FEW = 16  # candidates: at four times the length as large a share of the frames as the paper's 64 of at least 512
GIVEN, OWN = "the same weights", "trained anew"
LONG = 512  # frames from which recall is claimed
WIDE = 6  # sampled frames that a needle spans, from which it is to be among the selected
CANDIDATES, AMONG = 0.95, 0.90  # of needles: to be among the candidates, and among the selected


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to look: with memory or not, and which frames in detail, how many, of how many candidates (None: as given).

    weights: the way with which a model was trained that this one shares; its own if empty.
    """

    says: str
    memory: bool = True
    frames: str = SELECTED
    count: int = 8
    candidates: int | None = None
    weights: str = ""


NONE, MEMORY, REWIND, FEWER, BEST = "none", "memory", "rewind", "fewer", "oracle"
WAYS = {
    NONE: Way(f"no memory, {MANY} frames spread evenly", memory=False, frames=UNIFORM, count=MANY),
    MEMORY: Way("memory, 8 frames spread evenly", frames=UNIFORM),
    REWIND: Way("memory and frame selection"),
    FEWER: Way(f"the same among {FEW} candidates", candidates=FEW, weights=REWIND),
    BEST: Way("memory, 8 frames that show it", frames=ORACLE),
}
BESIDE = {MEMORY: NONE, REWIND: MEMORY, FEWER: MEMORY, BEST: REWIND}  # the step before
TRAINABLE = tuple(way for way, one in WAYS.items() if not one.weights)
PARTS = ("accuracy", "spans", "views")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: seeds 0 ... seeds - 1 of a setup at each length, each way; and needles of so many frames.

    spans: sampled frames, one a second, that a needle is in sight, of `needles` videos of LONG frames each. views:
    frames in detail that show what is asked.
    """

    setup: Setup
    seeds: int = 5
    lengths: Sequence[int] = LENGTHS
    parts: Sequence[str] = PARTS
    spans: Sequence[int] = (1, 2, 4, 8)
    needles: int = 200
    views: Sequence[int] = (1, 2, 4, 8)

    def at(self, seed: int, length: int) -> Setup:
        return dataclasses.replace(self.setup, seed=seed, seconds=self.setup.seconds * length)

    def __len__(self) -> int:
        """Questions to answer or look for."""
        asked = self.seeds * len(self.lengths) * len(WAYS) * self.setup.examples if "accuracy" in self.parts else 0
        found = len(self.spans) * self.needles if "spans" in self.parts else 0
        looked = len(self.lengths) * (len(self.views) + 1) * self.setup.examples if "views" in self.parts else 0
        return asked + found + looked


def run(models: Mapping[str, RewindModel], plan: Plan, results: Results, progress: Callable[[str, int], None]) -> dict:
    """Answers what `results` do not have yet and compares: plain values, ready for JSON.

    models: by way those that were trained with it, and at "" the one that stands for the others.
    """
    trained = {way: WAYS[way].weights or way for way in WAYS}
    of = {way: models.get(trained[way], models[""]) for way in WAYS}
    prints, given = {way: fingerprint(model.model) for way, model in of.items()}, fingerprint(models[""].model)
    own = {way: {"weights": one} if one != given else {} for way, one in prints.items()}  # of the results' keys
    # Those that differ in the decoder alone have the same memory, which is then made once.
    watching = {way: _watching(model) for way, model in of.items()}
    rows, recall = [], []
    for length in plan.lengths if "accuracy" in plan.parts else ():
        asked, videos, told, found = [], [], {way: [] for way in WAYS}, []

        def done(way: str, count: int, length: int = length) -> None:
            progress(f"{length}x {way}", count)

        for seed in range(plan.seeds):
            setup = plan.at(seed, length)
            worlds, here = world.ask(setup)
            worlds = [Rendered(one, setup) for one in worlds]
            asked += here
            videos += [f"{seed}/{one.video}" for one in here]
            keys = {way: {"benchmark": "claims rewind", "length": length, "seed": seed, "way": way} for way in WAYS}
            keys = {way: key | own[way] for way, key in keys.items()}
            missing = [way for way in WAYS if results.get(keys[way]) is None]
            for one in dict.fromkeys(watching[way] for way in missing):
                those = {way: of[way] for way in missing if watching[way] == one}
                for way, answers in _answer(those, setup, worlds, here, done).items():
                    results.put(keys[way], answers)
            for way, key in keys.items():
                have = results.get(key)
                if way not in missing:
                    done(way, len(here))
                told[way] += have["told"]
                found += [(f"{seed}/{video}", *rest) for video, *rest in have["recall"]] if way == REWIND else []
        for way in WAYS:
            others = {"before": told[BESIDE[way]] if way in BESIDE else None, "none": told[NONE]}
            place = {"length": length, "way": way, "weights": OWN if trained[way] in models else GIVEN}
            rows += [place | row for row in compare(asked, videos, told[way], others)]
        frames = len(setup.times(setup.world(0)))
        kind = OWN if REWIND in models else GIVEN
        recall.append({"length": length, "frames": frames, "weights": kind, **_recall(found)})
    spans, views = [], []
    if "spans" in plan.parts:
        spans = _spans(of[REWIND], watching[REWIND], plan, results, progress)
    if "views" in plan.parts:
        views = claims_rewind_views.run(partial(_looking, of[REWIND]), plan, results, progress)
    return {"rows": rows, "recall": recall, "spans": spans, "views": views, "claims": _claims(rows, recall)}


def _watching(model: RewindModel) -> str:
    """A hash of all that a memory comes from."""
    whole = model.model
    return fingerprint((whole.vision, whole.bert, whole.perceiver, whole.memory))


def _variant(model: RewindModel, way: Way) -> Variant:
    candidates = max(way.count, way.candidates or model.choices.num_candidates)
    method = dataclasses.replace(model.choices, num_selected=way.count, num_candidates=candidates)
    return Variant(model, method, memory=way.memory, frames=way.frames)


def _looking(model: RewindModel, views: int | None) -> Variant:
    """At so many frames in detail that show what is asked; for None at those selected."""
    return _variant(model, WAYS[REWIND] if views is None else dataclasses.replace(WAYS[BEST], count=views))


def _answer(
    models: Mapping[str, RewindModel],
    setup: Setup,
    worlds,
    asked: Sequence[Asked],
    done: Callable[[str, int], None] = lambda way, count: None,
) -> dict[str, dict]:
    """By way what is said, and of needles (video, frames that show it, among candidates, selected, most relevant).

    models: by way, all of which make the same memory.
    """
    variants = {way: _variant(model, WAYS[way]) for way, model in models.items()}
    found = {way: {"told": [""] * len(asked), "recall": []} for way in models}
    for here, memory, seen in rewind_watch.memories(
        next(iter(models.values())), worlds, asked, setup.times, setup.size
    ):
        needles = [asked[i].question.family == "needle" for i in here]
        for way, variant in variants.items():
            variant.seen = seen
            for i, text in zip(here, rewind_watch.said(variant, memory), strict=False):
                found[way]["told"][i] = text
            if WAYS[way].frames == SELECTED and any(needles):
                pairs = zip(needles, _hits(variant, memory), strict=False)
                found[way]["recall"] += [[asked[here[0]].video, *hits] for needle, hits in pairs if needle]
            done(way, len(here))
    return found


def _hits(variant: Variant, memory: RewindMemory) -> list[list[int]]:
    """Of each row: frames that show what is asked, and whether any is a candidate, selected, or among as many best."""
    _, selection = variant._look_back(memory)
    relevant = Variant(variant, variant.choices, frames=RELEVANT)._look_back(memory)[1].selected
    rows = []
    for row, shows in enumerate(variant.seen):
        chosen = (selection.candidates, selection.selected, relevant)
        hits = [bool(shows[np.asarray(one.indices[row])[np.asarray(one.valid[row])]].any()) for one in chosen]
        rows.append([int(shows.sum()), *map(int, hits)])
    return rows


def _recall(found: Sequence[tuple]) -> dict:
    """Shares of needles, with intervals over videos, that are among the candidates, and the wide ones selected."""
    videos, spans = [one[0] for one in found], np.array([one[1] for one in found], int)
    hits = np.array([one[2:] for one in found], float).reshape(-1, 3)
    shown, wide = spans > 0, spans >= WIDE
    kept = {"needles": int(shown.sum()), "wide": int(wide.sum())}
    for name, values, here in (
        ("candidates", hits[:, 0], shown),
        ("selected", hits[:, 1], shown),
        ("relevant", hits[:, 2], shown),
        ("wide_selected", hits[:, 1], wide),
        ("wide_relevant", hits[:, 2], wide),
    ):
        if here.any():
            low, high = interval(values[here], [video for video, one in zip(videos, here, strict=True) if one])
            kept[name] = [float(values[here].mean()), low, high]
    return kept


def _spans(model: RewindModel, watching: str, plan: Plan, results: Results, progress) -> list[dict]:
    """How often a needle that so many sampled frames show is found in a long video, one frame a second.

    watching: by which the results are known again; the decoder has no part in them.
    """
    rows, variant = [], _variant(model, WAYS[REWIND])
    for span in plan.spans:
        key = {"benchmark": "claims rewind spans", "span": span, "needles": plan.needles, "watching": watching}
        if (have := results.get(key)) is None:
            hits = []
            for n in range(plan.needles):
                one = _needle(plan.setup, n, span)
                (asked,), times = questions([one]), np.arange(float(LONG))
                memory = rewind_watch.watched(variant, one, [asked.text], times, plan.setup.size)
                variant.seen = rewind_watch.shows(one, asked.question, times)[None]
                hits += _hits(variant, memory)
                progress(f"needles in {span} frames", 1)
            have = results.put(key, {"hits": hits})
        else:
            progress("needles", plan.needles)
        hits = np.array(have["hits"])[:, 1:]
        row = {"span": span, "needles": len(hits)}
        for name, values in zip(("candidates", "selected", "relevant"), hits.T.astype(float), strict=True):
            row[name] = [float(values.mean()), *interval(values, range(len(values)))]
        rows.append(row)
    return rows


def _needle(setup: Setup, n: int, span: int) -> World:
    """A world of LONG seconds in which one thing comes once, for so many whole seconds, anywhere."""
    start = int(np.random.default_rng([setup.seed, n, span]).integers(0, LONG - span))
    numbers = {"level": setup.level, "seconds": float(LONG), "split": setup.split}
    return World(setup.seed * APART + n, visits=((start, start + span),), changes=0, **numbers)


def check(model, name) -> None:
    """Raises OptionError for a model of which there is nothing to claim."""
    if not isinstance(model, RewindModel):
        raise OptionError(f"{name} is no ReWind, which --system rewind is about; give another --model.")
    if model.words is None or model.tokenizer is None:
        raise OptionError(f"{name} cannot read questions; give one with tokenizers for its BERT and its decoder.")


def method() -> ReWind:
    """How all of it watches: the paper's numbers."""
    return ReWind()


# --- what the paper says ----------------------------------------------------------------------------------------------

SAYS = {
    MEMORY: "memory is better than 64 frames without",
    REWIND: "frame selection is better than frames spread evenly",
    FEWER: f"frame selection among {FEW} candidates is better than frames spread evenly",
    BEST: "frames that show it are better than selected ones",
}

WHEN = {"when IoU": "in mean IoU", "when R1@0.5": "in R@1 at IoU 0.5"}


def _claims(rows: Sequence[dict], recall: Sequence[dict]) -> list[dict]:
    """One holds, or does not, where all of the 95 % interval says so; else it is open.

    Only models are compared that were trained in the same way: both with their own, or one that was never told less.
    """
    found, kinds = [], {row["way"]: row["weights"] for row in rows}

    def fair(way: str, other: str) -> bool:
        return kinds[way] == kinds[other] and (other != NONE or kinds[NONE] == OWN)

    for row in rows:
        place = {name: row[name] for name in ("length", "weights", "measure")}
        before = BESIDE.get(row["way"])
        if before and row["measure"] in ("all", TIMELESS) and fair(row["way"], before):
            ends = (row[f"to_before{end}"] for end in ("", "_low", "_high"))
            found.append({"claim": SAYS[row["way"]], **place, **verdict(*ends, 0.0)})
        if row["way"] in (MEMORY, REWIND) and row["measure"] in WHEN and fair(row["way"], NONE):
            ends = (row[f"to_none{end}"] for end in ("", "_low", "_high"))
            says = f"tells when better {WHEN[row['measure']]} than without memory, {WAYS[row['way']].says}"
            found.append({"claim": says, **place, **verdict(*ends, 0.0)})
    for one in recall:
        if one["frames"] < LONG:
            continue
        for name, least, says in (
            ("candidates", CANDIDATES, f"at least {CANDIDATES:.0%} of needles are among the candidates"),
            ("wide_selected", AMONG, f"at least {AMONG:.0%} of needles in {WIDE} frames or more are selected"),
        ):
            if name in one:
                place = {"length": one["length"], "weights": one["weights"], "measure": "needle"}
                found.append({"claim": says, **place, **verdict(*one[name], least)})
    return found
