"""The claims of a paper: what is compared, from answers that are known, and the command on random weights."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.evaluate import claims, compare, heatmap, tiny, world
from longvid_jax.evaluate.results import Results, fingerprint
from longvid_jax.evaluate.world import Setup
from longvid_jax.video.synthetic import FAMILIES

SETUP = Setup(examples=80, seconds=12)
PLAN = claims.Plan(SETUP, seeds=3, lengths=(1,), ratios=(0.5, 0.05))
SMALL = ["--examples", 4, "--seconds", 4, "--size", 28, "--seeds", 2, "--lengths", 1, 2, "--ratios", 0.5]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", width=32, depth=1, vision_width=32, vision_depth=1
    )


@pytest.fixture
def few(monkeypatch):
    """Fewer ways and short answers: less to compile."""
    ways = {name: claims.WAYS[name] for name in ("plain", "retake", "uniform", "random")}
    monkeypatch.setattr(claims, "WAYS", ways)
    monkeypatch.setattr(world, "MAX_NEW_TOKENS", 4)


TIMES = np.arange(32) / 2


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 16), (0.25, 8), (0.1, 4), (0.05, 2)])
def test_fewer_frames(ratio, count):
    """As many as whole temporal patches allow, over all of the video; or neighbours."""
    even, two = claims.evenly(TIMES, ratio), claims.pairs(TIMES, ratio)
    assert len(even) == len(two) == count and set(even) | set(two) <= set(TIMES)
    assert even[0] == two[0] == 0 and even[-1] == 16 - 16 / count
    np.testing.assert_array_equal(two[1::2] - two[::2], 0.5)
    assert np.ptp(np.diff(even)) == 0


def test_ways_keep_equal_shares():
    assert list(claims.WAYS)[0] == claims.PLAIN_WAY and claims.WAYS[claims.PLAIN_WAY].method(1.0, 0) is None
    for name in ("retake", "not reforged", "pivotkv", "random"):
        method = claims.WAYS[name].method(0.1, 7)
        assert method.keep_ratio == 0.1 and method.reforge == (name != "not reforged")
        assert (method.dpselect is None) == (name in ("pivotkv", "random"))
    assert claims.WAYS["random"].method(0.1, 7).seed == 7
    alone = claims.WAYS["dpselect"].method(0.1, 0)
    assert alone.keep_ratio == 1 and alone.dpselect_ratio == 0.1


def known(plan, wrong) -> Results:
    """Results in which a setting is wrong where wrong(way, ratio, question, its number) says so."""
    results = Results(None, {})
    for length in plan.lengths:
        for seed in range(plan.seeds):
            _, asked = world.ask(plan.at(seed, length))
            for way, ratio in plan.settings():
                told = ["?" if wrong(way, ratio, one, n) else one.answer for n, one in enumerate(asked)]
                key = {"benchmark": "claims", "length": length, "seed": seed, "way": way, "ratio": ratio}
                results.put(key, {"told": told, "kept": 64 * ratio})
    return results


def test_differences_of_known_answers():
    """All are wrong at each tenth question; at 0.05 most ways are at each fourth too, and never know when."""

    def wrong(way, ratio, one, n):
        lost = ratio == 0.05 and (n % 4 == 1 or one.question.family == "when") and way != "random"
        return n % 10 == 0 or lost

    counted = []
    found = claims.run(None, PLAN, known(PLAN, wrong), lambda what, count: counted.append(count))
    assert sum(counted) == len(PLAN) == 3 * 80 * 15
    rows = {(row["way"], row["ratio"], row["measure"]): row for row in found["rows"]}
    plain = rows["plain", 1.0, "all"]
    assert plain["value"] == pytest.approx(0.9) and plain["questions"] == 240
    assert plain["to_plain"] == plain["to_plain_low"] == plain["to_plain_high"] == 0
    assert rows["retake", 0.5, "all"]["to_plain_low"] == 0 and rows["retake", 0.5, "all"]["kept"] == 0.5
    lost = rows["retake", 0.05, compare.TIMELESS]
    assert lost["to_plain"] == pytest.approx(-0.25, abs=0.03)
    assert -0.35 < lost["to_plain_low"] < lost["to_plain"] < lost["to_plain_high"] < -0.15
    assert rows["retake", 0.05, "when"]["value"] == rows["retake", 0.05, "when IoU"]["value"] == 0
    assert rows["random", 0.05, "all"]["to_uniform"] > 0.2
    others = {"when IoU", "when R1@0.5", "caption events"}
    assert {measure for *_, measure in rows} == {"all", compare.TIMELESS, *FAMILIES} | others

    verdicts = {(one["claim"], one["ratio"], one["measure"]): one["verdict"] for one in found["claims"]}
    assert verdicts["loses at most 3%", 0.05, "all"] == compare.FAILS
    assert verdicts["better than uniform", 0.5, "all"] == compare.OPEN  # the same answers


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.0, compare.HOLDS), (0.01, compare.HOLDS), (0.03, compare.OPEN), (0.2, compare.FAILS)]
)
def test_a_claim_holds_only_where_all_of_the_interval_says_so(share, verdict):
    rng = np.random.default_rng(0)

    def wrong(way, ratio, one, n):
        return way == "retake" and rng.random() < share

    found = claims.run(None, PLAN, known(PLAN, wrong), lambda what, count: None)
    here = [one for one in found["claims"] if one["claim"] == "loses at most 3%" and one["measure"] == "all"]
    assert [one["verdict"] for one in here] == [verdict]


def test_needles_lie_where_they_should():
    plan = heatmap.Plan(Setup(seconds=16), needles=3, lengths=(1, 4), depths=(0.0, 0.5, 1.0))
    setup, worlds = plan.at(4)
    starts = np.array([one.events[0].start for one in worlds]).reshape(3, 3)
    ends = np.array([one.events[0].end for one in worlds]).reshape(3, 3)
    assert setup.seconds == 64 and (starts[0] == 0).all() and (ends[2] == 64).all()
    np.testing.assert_allclose((starts + ends)[1] / 2, 32)
    asked = heatmap.questions(worlds)
    assert [one.video for one in asked] == list(range(9)) and {one.question.family for one in asked} == {"needle"}
    for one, whole in zip(asked, worlds, strict=True):  # a colour or a shape: never both, which other worlds never ask
        assert one.answer in whole.events[0].thing and one.text == one.question.text
    assert all(one.split == "test" and len(one.events) == 1 for one in worlds)


def test_needles_of_known_answers(checkpoint):
    plan = heatmap.Plan(dataclasses.replace(SETUP, size=(28, 28)), needles=2, lengths=(1, 2), depths=(0.0, 1.0))
    results, model = Results(None, {}), lv.load(checkpoint)
    for length in plan.lengths:
        setup, worlds = plan.at(length)
        asked = heatmap.questions(worlds)
        for way in heatmap.WAYS:
            told = [one.answer if one.video < (4 if way == "plain" else length) else "?" for one in asked]
            key = {"benchmark": "needles", "way": way, "length": length, "depths": [0.0, 1.0], "needles": 2}
            results.put(key, {"told": told})
    found = heatmap.run(model, plan, results, lambda what, count: None)
    assert found["accuracy"] == {"plain": [[1, 1], [1, 1]], "retake": [[0.5, 1], [0, 0]], "budget": [[0.5, 1], [0, 0]]}
    # The cache of the shortest video: its 12 temporal patches of one token, and the text.
    memory = model.begin(asked[0].text)
    assert abs(found["budget"] - 12 - int(memory.start[0]) - int((memory.prompt >= 0).sum())) < 30


def test_the_command(checkpoint, few, capsys, tmp_path, monkeypatch):
    words = ["bench", "claims", "--model", checkpoint, *SMALL, "--out", tmp_path / "out", "--heatmap", "--needles", 1]
    monkeypatch.setattr(heatmap, "LENGTHS", (1, 2))
    monkeypatch.setattr(heatmap.Plan, "lengths", (1, 2))
    words = list(map(str, words))
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["way"] for row in found["rows"]} == {"plain", "retake", "uniform", "random"}
    assert all(row["kept"] == pytest.approx(0.5) for row in found["rows"] if row["way"] != "plain")
    folder = tmp_path / "out"
    assert json.loads((folder / "claims.json").read_text()) == found
    with open(folder / "claims.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found["rows"]) and float(lines[0]["value"]) == found["rows"][0]["value"]
    assert json.loads((folder / "needles.json").read_text()) == found["needles"]
    for name in ("claims.png", "needles.png"):
        with Image.open(folder / name) as figure:
            assert figure.width > 700

    # What is there is not computed again, and what is more is only the rest.
    def never(*_, **__):
        raise AssertionError("computed twice")

    with monkeypatch.context() as patch:
        patch.setattr(world, "answers", never)
        assert cli.main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == found
        assert cli.main(words) == 0
        text = capsys.readouterr().out
    assert "tokens at random" in text and "better than uniform is open" in text and "Needles found" in text

    words[words.index("--examples") + 1] = "5"
    assert cli.main(words) == 2
    assert "another run, which differs in setup" in capsys.readouterr().err


def test_results_go_on_after_a_kill(tmp_path):
    results = Results(tmp_path / "out", {"weights": "a"})
    results.put({"n": 1}, {"told": ["x"]})
    results.put({"n": 2}, {"told": ["y"]})
    file = tmp_path / "out" / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-5])  # the last line is torn
    again = Results(tmp_path / "out", {"weights": "a"})
    assert again.get({"n": 1}) == {"told": ["x"]} and again.get({"n": 2}) is None
    again.put({"n": 3}, {"told": ["z"]})
    assert Results(tmp_path / "out", {"weights": "a"}).get({"n": 3}) == {"told": ["z"]}
    with pytest.raises(lv.OptionError, match="differs in weights"):
        Results(tmp_path / "out", {"weights": "b"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(lv.OptionError, match="holds other things"):
        Results(tmp_path / "mine", {})


def test_weights_are_known_again(checkpoint, tmp_path):
    one = fingerprint(lv.load(checkpoint).model)
    assert one == fingerprint(lv.load(checkpoint).model)
    other = tiny.write_checkpoint(tmp_path / "other", seed=1, width=32, depth=1, vision_width=32, vision_depth=1)
    assert one != fingerprint(lv.load(other).model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", 0], "--seeds is 0"),
        (["--ratios", 1.0], "--ratios has 1.0"),
        (["--lengths", 0], "--lengths has 0"),
        (["--examples", 0], "examples is 0"),
        (["--size", 30], "multiples of 28"),
    ],
)
def test_bad_input(checkpoint, capsys, words, said):
    assert cli.main(["bench", "claims", "--model", str(checkpoint), *map(str, words)]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["bench", "claims", "--model", "none", "--out", str(tmp_path / "out")]) == 2
    assert "longvid_jax[viz]" in capsys.readouterr().err and not (tmp_path / "out").exists()
