"""`longvid bench train` on the config that takes seconds."""

import json

import pytest

from longvid_jax import cli

SMOKE = ["bench", "train", "--config", "qwen2vl_world:smoke"]


def test_as_a_user_runs_it(capsys):
    assert cli.main([*SMOKE, "--steps", "2", "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stage"] == 1 and result["steps"] == 2
    seconds = result["seconds_a_step"]
    assert result["ratio"] == pytest.approx(seconds["fed"] / seconds["at_hand"])
    assert result["examples_per_s"] == pytest.approx(4 / seconds["fed"])
    assert result["frames_per_s"] == pytest.approx(16 / seconds["fed"])
    assert 0 <= result["data_wait"] <= 1 and result["tokens_per_s"] > 0 and result["mfu"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stage", "7"], "--stage is 7, but qwen2vl_world:smoke has the stages 0 to 1."),
        (["--steps", "0"], "--steps is 0, but must be at least 1."),
        (["--config", "nosuch"], "nosuch is no config file"),
    ],
)
def test_what_cannot_be_run(words, said, capsys):
    assert cli.main([*SMOKE, *words]) == 2
    assert said in capsys.readouterr().err
