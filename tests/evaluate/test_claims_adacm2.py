"""AdaCM2's claims: what is watched for them is what the system watches; known answers; and the command."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.evaluate import adacm2_watch, assets, claims_adacm2, claims_adacm2_memory, compare, world
from longvid_jax.evaluate.claims_adacm2 import PLAIN, WAYS, Plan, Setting
from longvid_jax.evaluate.results import Results
from longvid_jax.evaluate.world import Setup
from longvid_jax.systems.adacm2 import AdaCM2Model
from longvid_jax.train import config as configs
from longvid_jax.train import models
from longvid_jax.train.export import export
from longvid_jax.video import Frames

QUESTIONS = ["Which colour is it?", "How often does a blue star show up?"]
SIZE, LENGTH, VIDEOS = (28, 28), 37, 2  # more frames than a window has, and not a multiple
SMALL = ["--size", 28, "--seconds", 4, "--seeds", 1, "--examples", 4, "--lengths", 1, "--frames", 16, 64, 128]
SMALL += ["--limit-mb", 0.2, "--alpha", 0.5, "--beta", 0.5, "--sweep", 0.5]
SETUP = Setup(examples=24, seconds=12, families=claims_adacm2.FAMILIES)
PLAN = Plan(
    SETUP, seeds=2, lengths=(1,), alpha=0.1, beta=0.5, parts=("accuracy", "paper", "shared"), own=("attention",)
)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with two layers that cross-attend, on random weights."""
    config = configs.load("adacm2:smoke")
    with config.unlocked():
        config.model.qformer_config.update({"num_hidden_layers": 2, "cross_attention_frequency": 1})
    model, module = models.build(config)
    return export(module, model, config, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder) -> AdaCM2Model:
    return lv.load(folder)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (VIDEOS, LENGTH, *SIZE, 3), np.uint8)


def by_system(model, pixels, instructions, **method) -> np.ndarray:
    """The queries' outputs after begin and watch, a video a row."""
    system = AdaCM2Model(
        model.model, model.settings, method=lv.AdaCM2(**method), tokenizer=model.tokenizer, words=model.words
    )
    memory, times = system.begin(instructions), np.zeros(pixels.shape[:2], np.float32)
    return system.finish(system.watch(memory, Frames(pixels, times, np.ones(times.shape, bool)))).outputs


@pytest.mark.parametrize(
    "how",
    [
        {"alpha": 1.0, "beta": 1.0, "carry_queries": False},  # by one look at all
        {"alpha": 0.2, "beta": 0.7, "carry_queries": False},
        {"alpha": 0.2, "beta": 0.7, "carry_queries": True},
        {"alpha": 0.2, "beta": 0.7, "carry_queries": False, "scores": "random", "seed": 3},
    ],
    ids=["all", "attention", "carried", "random"],
)
def test_outputs_are_the_systems(model, pixels, how):
    """Several questions a video, where rows are not told apart by their number, as for random scores they are."""
    each = 1 if how.get("scores") == "random" else 2
    features = np.stack([adacm2_watch.encode(model, video) for video in pixels])
    prompts = model.begin(QUESTIONS[:each] * VIDEOS)
    layers = model.model.config.qformer.cross_layers
    policy = lv.AdaCM2(**how).policy(layers)
    found = adacm2_watch.outputs(
        model.model,
        features,
        prompts.instruction,
        policy=policy,
        carry_queries=how["carry_queries"],
        random=jax.random.key(3),
    )
    expected = by_system(model, pixels.repeat(each, axis=0), QUESTIONS[:each] * VIDEOS, **how)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if each > 1 and how["alpha"] < 1:
        assert np.abs(found[0] - found[1]).max() > 1e-3  # the questions count


def test_answers_are_the_systems(model, pixels):
    """Its words, from what its queries saw."""
    pixels = pixels[:, :1]
    prompts = model.begin(QUESTIONS)
    memory = model.finish(model.watch(prompts, Frames(pixels, np.zeros((2, 1), np.float32), np.ones((2, 1), bool))))
    words = adacm2_watch.answers(model, memory.outputs, prompts.ids, prompts.places, 6)
    assert words == model.answer(memory, max_new_tokens=6).text


def test_another_memory_prompt(model, pixels):
    """Frames but the last watched with one prompt a video: as a memory whose instruction is another in the end."""
    features = adacm2_watch.encode(model, pixels[0])[None]
    generic, asked = (model.begin(text).instruction for text in (["Tell."], QUESTIONS))
    policy = lv.AdaCM2(alpha=0.2, beta=0.7).policy(model.model.config.qformer.cross_layers)
    found = adacm2_watch.outputs(model.model, features, asked, generic, policy=policy)
    system = AdaCM2Model(
        model.model,
        model.settings,
        method=lv.AdaCM2(alpha=0.2, beta=0.7, carry_queries=False),
        tokenizer=model.tokenizer,
        words=model.words,
    )

    def watched(memory, part):
        frames = Frames(part, np.zeros(part.shape[:2], np.float32), np.ones(part.shape[:2], bool))
        return system.finish(system.watch(memory, frames))

    memory = watched(system.begin(["Tell."] * 2), pixels[:1, :-1].repeat(2, axis=0))
    memory = watched(dataclasses.replace(memory, instruction=asked), pixels[:1, -1:].repeat(2, axis=0))
    np.testing.assert_allclose(found, memory.outputs, atol=1e-5)


def known(models, plan: Plan, wrong) -> Results:
    """Results in which a setting is wrong where wrong(setting, number of the question) says so."""
    results, keys = Results(None, {}), claims_adacm2.Keys(models)
    for length in plan.lengths:
        for seed in range(plan.seeds):
            _, asked = world.ask(plan.at(seed, length))
            for setting in plan.needed(length, seed):
                told = ["?" if wrong(setting, n) else one.answer for n, one in enumerate(asked)]
                results.put(keys(length, seed, setting), {"told": told})
    return results


def test_differences_of_known_answers(model):
    """Random eviction loses half, recency every eighth, AdaCM2 nothing; on own weights it loses everything."""

    def wrong(setting, n):
        lost = {"random": n % 2 == 0, "recent": n % 8 == 0}.get(setting.way, False)
        return lost or setting.weights == claims_adacm2.OWN

    counted = []
    models = {"": model, "attention": model}
    results = known(models, PLAN, wrong)
    assert claims_adacm2.left(models, PLAN, results) == 0 < claims_adacm2.left(models, PLAN, Results(None, {}))
    rows = claims_adacm2.run(models, PLAN, results, lambda what, count: counted.append(count))
    assert sum(counted) == len(PLAN)
    found = {(row["part"], row["way"]): row for row in rows if row["measure"] == "all"}
    assert found["accuracy", "none"]["value"] == 1 and found["accuracy", "random"]["value"] == 0.5
    assert found["accuracy", "none"]["questions"] == 48 and "to_attention" not in found["accuracy", "none"]
    assert found["accuracy", "random"]["to_attention"] == -0.5 and found["own", "attention"]["to_none"] == -1
    assert found["paper", "random"]["alpha"] == 0.1 and found["paper", "random"]["cache"] < 17
    assert found["accuracy", "recent"]["cache"] == found["accuracy", "attention"]["cache"] > 17
    verdicts = {
        (one["part"], one["claim"]): one["verdict"] for one in claims_adacm2.verdicts(rows) if one["measure"] == "all"
    }
    assert verdicts["accuracy", "better than random eviction"] == compare.HOLDS
    assert verdicts["accuracy", "within 3 points of no eviction"] == compare.HOLDS
    assert verdicts["own", "within 3 points of no eviction"] == compare.FAILS
    assert verdicts["shared", "an index set a layer is better than a shared one"] == compare.OPEN  # the same answers


def test_what_does_not_fit_is_left_out(model):
    plan = dataclasses.replace(PLAN, parts=("accuracy",), own=(), limit=1000, seeds=1)
    results = known({"": model}, plan, lambda *_: False)
    rows = claims_adacm2.run({"": model}, plan, results, lambda *_: None)
    assert {row["way"] for row in rows} == {"attention", "random", "recent"}
    assert not any("to_none" in row for row in rows)


def test_batches_hold_every_question_once_and_nothing_else():
    clips = claims_adacm2.Clips(dataclasses.replace(SETUP, examples=85))
    assert {batch.shape for batch in clips.batches} == {(6, 8)}
    assert set(np.concatenate(clips.batches).ravel()) == set(range(85))
    for batch in clips.batches:
        for row in batch:
            assert len({clips.asked[n].video for n in row}) == 1


def test_needed_settings():
    """The main comparison once, references too; the sweep on the first seed and short videos alone."""
    plan = Plan(SETUP, seeds=2, lengths=(1, 16), parts=("sweep", "carried"), sweep=(0.1, 0.9))
    main = [PLAIN, Setting("carried", 0.1, 0.9), Setting("attention", 0.1, 0.9)]
    assert plan.needed(1, 1) == plan.needed(16, 0) == main
    assert set(plan.needed(1, 0)) == {*main, *(Setting("attention", a, b) for a in (0.1, 0.9) for b in (0.1, 0.9))}
    assert Plan(SETUP, parts=("memory",)).asks is False and len(Plan(SETUP, parts=("memory",))) == 0
    assert list(WAYS)[0] == PLAIN.way


@pytest.fixture
def few(monkeypatch):
    """Fewer ways: less to compile."""
    names = ("none", "attention", "recent", "generic")
    monkeypatch.setattr(claims_adacm2, "WAYS", {name: WAYS[name] for name in names})
    monkeypatch.setattr(claims_adacm2, "TRAINABLE", ("attention", "recent"))


def test_the_command(folder, model, few, capsys, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = [
        "bench",
        "claims",
        "--system",
        "adacm2",
        "--model",
        folder,
        *SMALL,
        "--own",
        f"recent={folder}",
        "--out",
        out,
    ]
    words = [*map(str, words), "--parts", "memory", "accuracy", "prompt", "sweep"]
    assert cli.main([*words, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "minutes of questions to go" in said.err
    ways = {(row["part"], row["way"]) for row in found["rows"]}
    assert ways == {
        *(("accuracy", way) for way in ("none", "attention", "recent")),
        ("prompt", "generic"),
        ("sweep", "attention"),
        ("own", "recent"),
    }
    same = {row["part"]: row["value"] for row in found["rows"] if row["measure"] == "all" and row["way"] == "recent"}
    assert same["own"] == same["accuracy"]  # the same weights
    assert json.loads((out / "claims.json").read_text()) == found
    for name, rows in (("claims.csv", found["rows"]), ("memory.csv", found["memory"]["rows"])):
        with open(out / name, newline="") as file:
            assert len(list(csv.DictReader(file))) == len(rows)
    for name in ("claims.png", "memory.png", "sweep.png"):
        with Image.open(out / name) as figure:
            assert figure.width > 300
    memory_is_right(model, found["memory"])

    # What is there is not computed again.
    def never(*_, **__):
        raise AssertionError("computed twice")

    monkeypatch.setattr(claims_adacm2.Clips, "answers", never)
    monkeypatch.setattr(claims_adacm2_memory, "_bounded", never)
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "better than recency only is open" in said.out and "flat within 2 % from 64 frames on: holds" in said.out
    assert "recency only, own weights" in said.out and "alpha (rows) and beta (columns)" in said.out
    assert "minutes" not in said.err


def memory_is_right(model, found: dict) -> None:
    """Flat with eviction; and without it the cache that so many tokens make, up to the limit."""
    rows = {(row["evicting"], row["frames"]): row for row in found["rows"]}
    config, tokens = model.model.config.qformer, 5
    assert set(rows) == {(True, 16), (True, 64), (True, 128), (False, 16), (False, 64)}
    for frames in (16, 64, 128):
        assert rows[True, frames]["cache"] == rows[True, 16]["cache"] < rows[True, frames]["live"]
        assert rows[True, frames]["program"] == rows[True, 16]["program"] > rows[True, frames]["cache"]
    for frames in (16, 64):
        expected = 2 * config.cross_layers * config.width * 4 * frames * tokens
        assert rows[False, frames]["cache"] == expected == claims_adacm2.cache_bytes(model, frames, SIZE)
        assert rows[False, frames]["program"] > rows[True, frames]["program"]
    assert expected < found["limit"] < 2 * expected
    assert found["flat"] == compare.HOLDS and set(found["growth"].values()) == {0.0}
    assert found["saved_at"] == 64 and 0 < found["saved"]["program"] < found["saved"]["cache"] < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", 0], "--seeds is 0"),
        (["--lengths", 0], "--lengths has 0"),
        (["--alpha", 1.0], "--alpha has 1.0"),
        (["--sweep", 0.5, 0], "--sweep has 0"),
        (["--frames", 20], "multiple of 16"),
        (["--own", "shared=x"], "must be WAY=PATH"),
        (["--heatmap"], "has no --heatmap"),
        (["--size", 30], "multiples of 14"),
    ],
)
def test_bad_input(folder, capsys, words, said):
    base = ["bench", "claims", "--system", "adacm2", "--model", str(folder)]
    assert cli.main([*base, *map(str, words)]) == 2
    assert said in capsys.readouterr().err


def test_options_of_the_other_system(capsys):
    assert cli.main(["bench", "claims", "--parts", "memory"]) == 2
    assert "--system retake has no --parts" in capsys.readouterr().err


def test_another_kind_of_model(capsys):
    other = str(assets.path("qwen2vl_world"))
    assert cli.main(["bench", "claims", "--system", "adacm2", "--model", other]) == 2
    assert "is no InstructBLIP" in capsys.readouterr().err
