"""ReTaKe's published claims (arXiv 2412.20504) put to the test: what is lost by keeping less, beside simpler ways.

Every way sees the same worlds and is asked the same questions, so that differences are paired; intervals are bootstraps
over videos.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from longvid_jax.evaluate import world
from longvid_jax.evaluate.compare import TIMELESS, compare, verdict
from longvid_jax.evaluate.results import Results
from longvid_jax.evaluate.world import Asked, Rendered, Setup
from longvid_jax.systems.retake import PLAIN, ReTaKe, RetakeModel

RATIOS = (0.5, 0.25, 0.1, 0.05)
LENGTHS = (1, 4, 8)  # times the plain model's
PLAIN_WAY, RETAKE, UNIFORM = "plain", "retake", "uniform"


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to keep a share of a video. method(ratio, seed); frames(times, ratio) are those that are watched."""

    says: str
    method: Callable[[float, int], ReTaKe | None]
    frames: Callable[[np.ndarray, float], np.ndarray] = lambda times, ratio: times


def evenly(times: np.ndarray, ratio: float) -> np.ndarray:
    """The share of the frames [T], in whole temporal patches, that lies evenly over the video."""
    count = 2 * _patches(times, ratio)
    return times[(np.arange(count) * len(times)) // count]


def pairs(times: np.ndarray, ratio: float) -> np.ndarray:
    """The same share as neighbours two by two, as the model was trained to see them in a temporal patch."""
    count, total = _patches(times, ratio), len(times) // 2
    first = 2 * ((np.arange(count) * total) // count)
    return times[np.stack([first, first + 1], axis=1).ravel()]


def _patches(times: np.ndarray, ratio: float) -> int:
    return max(1, round(ratio * (len(times) // 2)))


WAYS = {
    PLAIN_WAY: Way("everything", lambda ratio, seed: None),
    RETAKE: Way("DPSelect + PivotKV", lambda ratio, seed: ReTaKe(keep_ratio=ratio)),
    "not reforged": Way("both, nothing moved", lambda ratio, seed: ReTaKe(keep_ratio=ratio, reforge=False)),
    "pivotkv": Way("PivotKV alone", lambda ratio, seed: ReTaKe(keep_ratio=ratio, dpselect=None)),
    "dpselect": Way(
        "DPSelect alone", lambda ratio, seed: dataclasses.replace(PLAIN, dpselect="frame", dpselect_ratio=ratio)
    ),
    UNIFORM: Way("fewer frames, evenly", lambda ratio, seed: None, evenly),
    "uniform pairs": Way("fewer frames, in pairs", lambda ratio, seed: None, pairs),
    "random": Way(
        "tokens at random", lambda ratio, seed: ReTaKe(keep_ratio=ratio, dpselect=None, scores="random", seed=seed)
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: seeds 0 ... seeds - 1 of a setup, at each length, each way with each ratio."""

    setup: Setup  # of length 1
    seeds: int = 5
    lengths: Sequence[int] = LENGTHS
    ratios: Sequence[float] = RATIOS

    def at(self, seed: int, length: int) -> Setup:
        return dataclasses.replace(self.setup, seed=seed, seconds=self.setup.seconds * length)

    def settings(self) -> list[tuple[str, float]]:
        """(way, ratio) of all that is compared; the plain model first."""
        return [(PLAIN_WAY, 1.0), *((way, ratio) for way in WAYS if way != PLAIN_WAY for ratio in self.ratios)]

    def __len__(self) -> int:
        """Questions to answer."""
        return self.seeds * len(self.lengths) * len(self.settings()) * self.setup.examples


def run(model: RetakeModel, plan: Plan, results: Results, progress: Callable[[str, int], None]) -> dict:
    """Answers what `results` do not have yet and compares; returns plain values, ready for JSON."""
    rows = []
    for length in plan.lengths:
        asked, told, shares = _ask(model, plan, length, results, progress)
        rows += _compare(length, asked, told, shares, plan.settings())
    return {"rows": rows, "claims": _claims(rows)}


def _ask(model: RetakeModel, plan: Plan, length: int, results: Results, progress):
    """All questions of all seeds, (seed, asked); and by setting the answers to them and the share that was kept."""
    every: list[tuple[int, Asked]] = []
    told: dict[tuple[str, float], list[str]] = {setting: [] for setting in plan.settings()}
    shares: dict[tuple[str, float], list[float]] = {setting: [] for setting in plan.settings()}
    for seed in range(plan.seeds):
        setup = plan.at(seed, length)
        worlds, asked = world.ask(setup)
        worlds = [Rendered(one, setup) for one in worlds]
        every += [(seed, one) for one in asked]
        for way, ratio in plan.settings():
            what = f"{length}x {way} {ratio:g}"

            def count(number: int, what=what) -> None:
                progress(what, number)

            key = {"benchmark": "claims", "length": length, "seed": seed, "way": way, "ratio": ratio}
            have = results.get(key)
            if have is None:
                have = results.put(key, _answer(model, setup, worlds, asked, WAYS[way], ratio, count))
            else:
                count(len(asked))
            told[way, ratio] += have["told"]
            shares[way, ratio].append(have["kept"])
    return every, told, shares


def _answer(model: RetakeModel, setup: Setup, worlds, asked, way: Way, ratio: float, count) -> dict:
    kept = []

    def watched(memory, number: int) -> None:
        kept.append((number, float((memory.stored - memory.start)[:number].mean())))

    method = way.method(ratio, setup.seed)
    told = world.answers(
        world.with_method(model, method),
        worlds,
        asked,
        lambda one: way.frames(setup.times(one), ratio),
        setup.size,
        progress=count,
        watched=watched,
    )
    return {"told": told, "kept": sum(n * tokens for n, tokens in kept) / sum(n for n, _ in kept)}


def _compare(length: int, every, told, shares, settings) -> list[dict]:
    """A row for each setting and measure: its mean, and the paired differences to the plain model's and to uniform."""
    videos, asked = [f"{seed}/{one.video}" for seed, one in every], [one for _, one in every]
    whole = np.mean(shares[PLAIN_WAY, 1.0])
    rows = []
    for way, ratio in settings:
        place = {"length": length, "way": way, "ratio": ratio}
        place["kept"] = float(np.mean(shares[way, ratio]) / whole)
        others = {"plain": told[PLAIN_WAY, 1.0], UNIFORM: told.get((UNIFORM, ratio))}
        rows += [place | row for row in compare(asked, videos, told[way, ratio], others)]
    return rows


# --- what the paper says ----------------------------------------------------------------------------------------------

AT_MOST = {0.25: 0.01, 0.05: 0.03}  # ratio -> how much accuracy is lost, by the abstract: 4 times longer, and 5 % kept


def _claims(rows: list[dict]) -> list[dict]:
    """The paper's claims on accuracy, at each length and on all questions and those without absolute time.

    One holds, or does not, where all of the 95 % interval says so; else it is open.
    """
    claims = []
    for row in rows:
        if row["way"] != RETAKE or row["measure"] not in ("all", TIMELESS):
            continue
        place = {name: row[name] for name in ("length", "ratio", "measure")}
        if row["ratio"] in AT_MOST:
            least = -AT_MOST[row["ratio"]]
            claims.append({"claim": f"loses at most {-least:.0%}", **place, **_verdict(row, "plain", least)})
        claims.append({"claim": "better than uniform", **place, **_verdict(row, UNIFORM, 0.0)})
    return claims


def _verdict(row: dict, to: str, least: float) -> dict:
    return verdict(*(row[f"to_{to}{end}"] for end in ("", "_low", "_high")), least)
