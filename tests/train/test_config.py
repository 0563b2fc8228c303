"""Configs from files and the command line: what is known, what is refused, and what may differ."""

import pytest
from ml_collections import ConfigDict

from longvid_jax.errors import OptionError
from longvid_jax.train import config
from tests.train.runs import SMALLEST


@pytest.mark.parametrize(
    "name", ["qwen2vl_world:tiny", "qwen2vl_world:smoke", *(f"finetune:{v}" for v in ("full", "lora", "llama"))]
)
def test_the_configs_of_the_package(name):
    loaded = config.load(name)
    assert loaded.keys() == config.base().keys()
    assert config.as_json(config.resolve(loaded)) == config.as_json(loaded)


def test_overrides():
    words = ["--config.optim.lr=3e-4", "--config.stages[0].steps", "7", "--config.stages[0].sources[0].seconds=(4.0,)"]
    loaded = config.load(SMALLEST, [*words, "--config.model.hidden_size=48"])
    assert (loaded.optim.lr, loaded.stages[0].steps, loaded.model.hidden_size) == (3e-4, 7, 48)
    assert config.plain(loaded.stages)[0]["sources"][0]["seconds"] == (4.0,)
    loaded = config.load("adacm2:policy", ["--config.checkpoint=x", "--config.adacm2.alpha=(0.1, 0.2, 1)"])
    assert (loaded.adacm2.alpha, loaded.adacm2.beta) == ((0.1, 0.2, 1.0), 0.9)
    loaded = config.load("finetune:full", ["--config.data=a.json", "--config.videos=b"])
    source = config.plain(loaded.stages)[0]["sources"][0]
    assert (source["file"], source["folder"]) == ("a.json", "b")


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(variant='a'):\n"
        "    return ConfigDict({'seed': 3, 'stages': ({'steps': 1, 'batch_size': 2},)})\n"
    )
    loaded = config.load(str(file))
    assert loaded.seed == 3 and loaded.stages[0].task == "answers" and loaded.save.keep_last == 2


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--config.optim.lrr=1"], r"config.optim of .*smallest.py has no 'lrr', but 'lr'; known are "),
        (["--config.stages[0].step=1"], r"config.stages\[0\] of .*smallest.py has no 'step', but 'steps'"),
        (["--config.stages[2].steps=1"], r"config.stages of .*smallest.py has no number 2"),
        (["--config.seed.a=1"], r"config.seed of .*smallest.py has no 'a'"),
        (["--config.optim.lr=fast"], r"could not convert string to float: 'fast'; give a value of the kind"),
        (["--config.optim.lr=-1"], r"lr is -1.0, but must be a number above 0"),
        (["--config.adacm2.beta=(0.1, 'a')"], r"config.adacm2.beta is \(0.1, 'a'\), but must be a number, or a tuple"),
        (["--config.remat=all"], r"config.remat is 'all', but must be none or dots or full"),
        (["--config.compute_dtype=float8"], r"config.compute_dtype is 'float8'"),
        (["--config.profile_steps=9"], r"config.profile_steps is '9', but must be two step numbers"),
        (["--config.accumulate=3"], r"stages\[0\].batch_size is 4, but must be a multiple of config.accumulate"),
        (["--config.log_every=0"], r"config.log_every is 0, but must be at least 1"),
        (["--workers=3"], r"--workers is not known; give --config.KEY=VALUE"),
        (["workers"], r"'workers' is not known"),
    ],
)
def test_words_that_are_refused(words, fault):
    with pytest.raises(OptionError, match=fault) as caught:
        config.load(SMALLEST, words)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"sed": 1}, "config has no 'sed', but 'seed'"),
        ({"seed": "1"}, "config.seed is '1', but must be a whole number"),
        ({"seed": True}, "config.seed is True, but must be a whole number"),
        ({"stacked": 1}, "config.stacked is 1, but must be True or False"),
        ({"lora": 3}, "config.lora is 3, but must hold keys and values"),
        ({"stages": ()}, "config.stages is empty"),
        ({"stages": ({"stps": 1},)}, r"config.stages\[0\] has no 'stps', but 'steps'"),
        ({"stages": ({"batch_size": 1},)}, r"config.stages\[0\].steps is 0, but must be at least 1"),
    ],
)
def test_values_that_are_refused(values, fault):
    with pytest.raises(OptionError, match=fault):
        config.resolve(ConfigDict(values))


def test_files_that_are_none(tmp_path):
    with pytest.raises(OptionError, match="nothing is no config file; give a path, or one .* finetune, qwen2vl_world"):
        config.load("nothing:a")
    with pytest.raises(OptionError, match="gives no config .ValueError: there is no variant 'huge'"):
        config.load("qwen2vl_world:huge")
    for text, fault in (("1 +", "SyntaxError"), ("", "KeyError"), ("def get_config(): return {}", "gives a dict")):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(OptionError, match=fault):
            config.load(str(tmp_path / "mine.py"))


def test_what_may_differ():
    one = config.as_json(config.load(SMALLEST))
    free = ["--config.log_every=7", "--config.workers=1", "--config.save.every=9", "--config.eval.every=2"]
    assert config.differences(one, config.as_json(config.load(SMALLEST, free))) == []
    other = config.as_json(config.load(SMALLEST, ["--config.stages[0].text=(64,)", "--config.model.hidden_size=64"]))
    assert set(config.differences(one, other)) == {"stages[0].text", "model.hidden_size"}
