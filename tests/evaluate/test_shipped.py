"""The models that come with the package: they are small, say what they are, load elsewhere too, and answer."""

import pytest

import longvid_jax as lv
from longvid_jax.evaluate import assets, world, world_scores
from longvid_jax.evaluate.world import Setup
from longvid_jax.video.synthetic import FAMILIES

NAMES = ("qwen2vl_world",)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_says_what_it_is(name):
    files = {path.name: path for path in assets.path(name).iterdir()}
    assert sum(path.stat().st_size for path in files.values()) <= 8e6
    card = files["README.md"].read_text(encoding="utf-8")
    for told in (f"configs/{name}.py", "longvid train", "hours", "Apache-2.0", *FAMILIES):
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


@pytest.mark.parity
def test_transformers_reads_it_too():
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    folder = assets.path("qwen2vl_world")
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.num_parameters() == 1_703_808
    tokenizer, text = AutoTokenizer.from_pretrained(folder), "What colour is the ring?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
