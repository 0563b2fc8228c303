"""The models that come with the package: they are small, say what they are, load elsewhere too, and answer."""

import pytest

import longvid_jax as lv
from longvid_jax.evaluate import assets, world, world_scores
from longvid_jax.evaluate.world import Setup
from longvid_jax.video.synthetic import FAMILIES

CONFIGS = {"qwen2vl_world": "qwen2vl_world", "adacm2_world": "adacm2", "rewind_world": "rewind"}
METHODS = {"adacm2_world": lv.AdaCM2(alpha=0.1, beta=0.9), "rewind_world": lv.ReWind()}
GOALS = {  # near what their cards say
    "adacm2_world": {"needle": 0.92, "presence": 0.93, "order": 0.71, "count": 0.51, "when": 0.46, "state": 0.55},
    "rewind_world": {"needle": 0.85, "presence": 0.93, "order": 0.83, "count": 0.40, "when": 0.30, "state": 0.66},
}
MIOU = {"adacm2_world": 0.55, "rewind_world": 0.42}
EXAMPLES = {"adacm2_world": 240, "rewind_world": 600}  # the less it is right, the more to tell it from guessing
TAUGHT = tuple(family for family in FAMILIES if family != "caption")  # of what these answer


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_small_and_says_what_it_is(name):
    files = [path for path in assets.path(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    card = (assets.path(name) / "README.md").read_text(encoding="utf-8")
    for told in (f"configs/{CONFIGS[name]}.py", "longvid train", "hour", "Apache-2.0", *TAUGHT, "aption"):
        assert told in card, told


def test_it_answers():
    """On worlds that no choice was made by; the bounds are the goals less three standard errors of so few questions."""
    worlds, asked = world.ask(Setup(seed=1001, examples=280))
    model = lv.load(assets.path("qwen2vl_world"))
    told = world.answers(model, worlds, asked, Setup().times, Setup().size)
    families = world_scores.by_family(asked, told)
    for family, goal in {"needle": 0.9, "presence": 0.9, "state": 0.9, "order": 0.9, "count": 0.75}.items():
        one = families[family]
        error = (goal * (1 - goal) / one["questions"]) ** 0.5
        assert one["accuracy"] > goal - 3 * error > one["chance"], (family, one)
    assert world_scores.details(asked, told)["when"]["miou"] > 0.4


@pytest.mark.parametrize("name", METHODS)
def test_what_its_card_says(name):
    """The same, of models with a memory that does not hold everything."""
    setup = Setup(seed=1001, examples=EXAMPLES[name], families=TAUGHT)
    worlds, asked = world.ask(setup)
    told = world.answers(lv.load(assets.path(name), method=METHODS[name]), worlds, asked, setup.times, setup.size)
    families = world_scores.by_family(asked, told)
    for family, goal in GOALS[name].items():
        one = families[family]
        error = (goal * (1 - goal) / one["questions"]) ** 0.5
        assert one["accuracy"] > goal - 3 * error > one["chance"], (family, one)
    assert world_scores.details(asked, told)["when"]["miou"] > MIOU[name]


@pytest.mark.parity
def test_transformers_reads_it_too():
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    folder = assets.path("qwen2vl_world")
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.num_parameters() == 1_703_808
    tokenizer, text = AutoTokenizer.from_pretrained(folder), "What colour is the ring?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parity
def test_transformers_reads_adacm2s_too():
    from transformers import AutoTokenizer, InstructBlipForConditionalGeneration

    folder = assets.path("adacm2_world")
    model, report = InstructBlipForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert report.pop("unexpected_keys") == {"frame_positions.weight"}  # AdaCM2's own
    assert not any(report.values()), report
    assert 3_155_072 - model.num_parameters() == 2048 * 128
    words = AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")
    assert (
        words.decode(words("What colour is the ring?").input_ids, skip_special_tokens=True)
        == "what colour is the ring?"
    )
