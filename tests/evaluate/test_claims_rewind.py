"""ReWind's claims: known answers, what recall counts, and the command."""

import copy
import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.evaluate import claims_rewind, claims_rewind_report, compare, rewind_watch, world
from longvid_jax.evaluate.claims_rewind import BEST, FEWER, MEMORY, NONE, REWIND, TRAINABLE, WAYS, Plan
from longvid_jax.evaluate.results import Results, fingerprint
from longvid_jax.evaluate.rewind_watch import Variant
from longvid_jax.evaluate.world import Setup
from tests.systems.small_rewind import make

SETUP = Setup(examples=24, seconds=12, families=claims_rewind.FAMILIES)
PLAN = Plan(SETUP, seeds=2, lengths=(1,), parts=("accuracy",))
SMALL = ["--size", 28, "--seconds", 4, "--seeds", 1, "--examples", 6, "--lengths", 1, "--spans", 2, "--needles", 2]
SMALL += ["--views", 2]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("rewind"))


@pytest.fixture(scope="module")
def model(folder):
    return lv.load(folder)


@pytest.mark.parametrize("own", [False, True])
def test_differences_of_known_answers(model, own):
    """No memory loses all, memory every second, selection nothing, and the oracle as much as it."""
    models = {"": model, **(dict.fromkeys(TRAINABLE, model) if own else {})}
    weights = {}
    if own:  # trained anew, to weights of its own
        models[NONE] = copy.copy(model)
        models[NONE].model = jax.tree.map(lambda x: 2 * x, model.model)
        weights[NONE] = {"weights": fingerprint(models[NONE].model)}
    results = Results(None, {})
    lost = {NONE: lambda n: True, MEMORY: lambda n: n % 2 == 0}
    for seed in range(2):
        _, asked = world.ask(PLAN.at(seed, 1))
        for way in WAYS:
            wrong = lost.get(way, lambda n: False)
            told = ["?" if wrong(n) else one.answer for n, one in enumerate(asked)]
            recall = [[one.video, 8 if n % 2 else 2, 1, n % 2, 0] for n, one in enumerate(asked)]
            key = {"benchmark": "claims rewind", "length": 1, "seed": seed, "way": way} | weights.get(way, {})
            results.put(key, {"told": told, "recall": recall if way == REWIND else []})
    counted = []
    found = claims_rewind.run(models, PLAN, results, lambda what, count: counted.append(count))
    assert sum(counted) == len(PLAN) == 2 * 5 * 24
    rows = {(row["way"], row["measure"]): row for row in found["rows"]}
    assert rows[NONE, "all"]["value"] == 0 and rows[MEMORY, "all"]["to_before"] == pytest.approx(0.5)
    assert rows[REWIND, "when R1@0.5"]["value"] == 1 and rows[NONE, "when R1@0.5"]["value"] == 0
    assert rows[REWIND, "all"]["to_none"] == 1 and rows[BEST, "all"]["to_before"] == 0
    verdicts = {one["claim"]: one["verdict"] for one in found["claims"] if one["measure"] != compare.TIMELESS}
    assert [verdicts[claims_rewind.SAYS[way]] for way in (REWIND, FEWER, BEST)] == ["holds", "holds", "is open"]
    when = (
        f"tells when better {how} than without memory, memory and frame selection"
        for how in ("in mean IoU", "in R@1 at IoU 0.5")
    )
    without = (claims_rewind.SAYS[MEMORY], *when)
    # Weights that always had a memory say nothing of what one without could do.
    assert [verdicts.get(claim) for claim in without] == (["holds"] * 3 if own else [None] * 3)
    (recall,) = found["recall"]
    assert (recall["needles"], recall["wide"], recall["frames"]) == (48, 24, 24)
    assert recall["candidates"] == [1, 1, 1] and recall["wide_selected"] == [1, 1, 1] and recall["relevant"][0] == 0
    assert recall["selected"][0] == 0.5
    assert not any("needles" in claim for claim in verdicts)  # of which only long videos say anything
    long = claims_rewind._claims([], [recall | {"frames": 512}])
    assert [one["verdict"] for one in long] == ["holds", "holds"]


def test_what_counts_as_found(model, monkeypatch):
    """Against the trace of an answer, by the frames that show the needle."""
    setup = dataclasses.replace(SETUP, families=("needle",), size=(28, 28), examples=4)
    worlds, asked = world.ask(setup)
    few = Variant(model, lv.ReWind(num_candidates=5, num_selected=2))
    monkeypatch.setitem(WAYS, REWIND, dataclasses.replace(WAYS[REWIND], count=2))
    found = claims_rewind._answer(dict.fromkeys([MEMORY, REWIND], few), setup, worlds, asked)[REWIND]
    variant, times = claims_rewind._variant(few, WAYS[REWIND]), setup.times(worlds[0])
    assert len(found["recall"]) == 4 and len(found["told"]) == 4
    for one, (video, span, *hits) in zip(asked, found["recall"], strict=True):
        memory = rewind_watch.watched(variant, worlds[one.video], [one.text], times, setup.size)
        variant.seen = rewind_watch.shows(worlds[one.video], one.question, times)[None]
        trace, shows = variant.answer(memory, max_new_tokens=2).trace, variant.seen[0]
        best = np.argsort(-trace.relevance[0], kind="stable")[:2]
        assert video == one.video and span == shows.sum()
        assert hits == [int(shows[x].any()) for x in (trace.candidates[0], trace.selected[0], best)]


def test_fewer_candidates(model):
    """Those that are selected are the trace's of a model that takes so many; its weights are those of selection."""
    few = claims_rewind._variant(model, dataclasses.replace(WAYS[FEWER], candidates=9))
    assert (few.choices.num_candidates, few.choices.num_selected) == (9, 8)
    assert claims_rewind._variant(model, WAYS[FEWER]).choices == lv.ReWind(num_candidates=16)
    assert FEWER not in TRAINABLE and WAYS[FEWER].weights == REWIND


def test_views_are_counted(model):
    """Where more are asked for than there are, each of them is one."""
    setup = dataclasses.replace(SETUP, size=(28, 28), examples=6, questions=3)
    plan = Plan(setup, seeds=1, lengths=(1,), views=(1, 30), parts=("views",))
    counted = []
    found = claims_rewind.run({"": model}, plan, Results(None, {}), lambda what, count: counted.append(count))["views"]
    rows = {row["views"]: row for row in found}
    assert sum(counted) == len(plan) == 3 * 6
    worlds, asked = world.ask(setup)
    times = setup.times(worlds[0])
    kept = [one for one in asked if one.question.family != "when"]
    shown = [rewind_watch.shows(worlds[one.video], one.question, times) for one in kept]
    shown = [one for one in shown if one.any()]
    assert {row["questions"] for row in rows.values()} == {len(shown)}
    assert rows["1"]["shows"] == 1 == rows["1"]["covered"] == rows["30"]["covered"]
    assert rows["30"]["shows"] == pytest.approx(np.mean([one.sum() for one in shown]))
    assert 0 < rows["selected"]["shows"] < 8


def test_the_command(folder, tmp_path, capsys):
    words = ["bench", "claims", "--system", "rewind", "--model", folder, *SMALL, "--out", tmp_path / "out"]
    words = [str(word) for word in [*words, "--own", f"none={folder}"]]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["weights"] for row in found["rows"] if row["way"] == NONE} == {claims_rewind.OWN}
    assert {row["way"] for row in found["rows"]} == set(WAYS) and found["spans"][0]["needles"] == 2
    for name in ("claims.csv", "recall.csv", "spans.csv", "views.csv"):
        assert list(csv.DictReader((tmp_path / "out" / name).open()))
    assert Image.open(tmp_path / "out" / "claims.png").width > 500
    answers = (tmp_path / "out" / "answers.jsonl").read_text()
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "memory and frame selection" in text and "sampled frames that show the needle" in text
    assert (tmp_path / "out" / "answers.jsonl").read_text() == answers  # nothing is computed twice
    assert text.strip() == claims_rewind_report.report(found)


def test_what_comes_with_the_package(tmp_path, capsys):
    """Without --model the shipped one stands beside those trained to compare with it, each with its own weights."""
    words = ["--seeds", 1, "--examples", 2, "--lengths", 1, "--parts", "accuracy", "--json", "--out", tmp_path / "out"]
    assert cli.main(["bench", "claims", "--system", "rewind", *map(str, words), "--no-figure"]) == 0
    found = json.loads(capsys.readouterr().out)
    ways = set(TRAINABLE)
    assert ways == set(found["own"])
    trained = {row["way"] for row in found["rows"] if row["weights"] == claims_rewind.OWN}
    assert trained == ways | {FEWER}
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    keys = {key["way"]: key.get("weights") for key in (json.loads(line)["key"] for line in lines)}
    assert keys[REWIND] is keys[FEWER] is None and len({keys[way] for way in ways}) == len(ways)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "memory"], "--parts has 'memory', but each must be one of accuracy, spans, views"),
        (["--own", "none=x", "--own", "none=y"], "--own gives none twice"),
        (["--own", "some=x"], "--own is 'some=x', but must be WAY=PATH with a way of none, memory, rewind, oracle"),
        (["--spans", "512"], "--spans has 512, but videos have 512 frames"),
        (["--views", "0"], "--views has 0, but each must be at least 1"),
        (["--needles", "0"], "--needles is 0, but must be at least 1"),
        (["--alpha", "0.1"], "--system rewind has no --alpha; leave it out"),
        (["--lengths", "0"], "--lengths has 0"),
    ],
)
def test_bad_input(words, said, capsys):
    assert cli.main(["bench", "claims", "--system", "rewind", *words]) == 2
    assert said in capsys.readouterr().err
