"""ReWind's configs: runs of the small ones, the numbers of the paper's, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

import longvid_jax as lv
from longvid_jax.errors import OptionError
from longvid_jax.train import config, models
from longvid_jax.train.rewound import Looking
from longvid_jax.train.sources import SOURCES
from tests.train.runs import losses, run


@pytest.mark.parametrize("variant", ["smoke_pretrain", "smoke_instruct", "smoke_grounding"])
def test_a_run(variant, tmp_path, kept_programs):
    result, _ = run(config.load(f"rewind:{variant}"), tmp_path / "run")
    assert result["step"] == 4 and all(np.isfinite(loss) for loss in losses(tmp_path / "run").values())
    made = lv.load(result["model"])
    assert type(made).__name__ == "RewindModel" and (made.model.contrast is not None)


def test_recipes(tmp_path):
    """The paper's numbers, and sources that there are once they are told of files."""
    files = {
        "pretrain": {"v": {"video": "v", "caption": "a star", "frame_length": 30}},
        "instruct": [{"video": "v", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}],
        "grounding": {"v": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["x"]}},
    }
    # Steps, learning rate, warm-up.
    numbers = {"pretrain": (10_000, 1e-4, 500), "instruct": (100_000, 5e-5, 2000), "grounding": (15_000, 5e-5, 500)}
    for name, held in files.items():
        (tmp_path / "a.json").write_text(json.dumps(held))
        told = ["--config.checkpoint=x", f"--config.data={tmp_path / 'a.json'}", "--config.videos=folder"]
        loaded = config.load(f"rewind:{name}", told)
        (stage,) = loaded.stages
        assert (stage.steps, loaded.optim.lr, loaded.optim.warmup) == numbers[name]
        assert (stage.batch_size, stage.task) == (64, "contrast" if name == "pretrain" else "rewound")
        assert (loaded.lora.rank, loaded.lora.alpha) == ((0, 16.0) if name == "pretrain" else (64, 32.0))
        assert loaded.optim.weight_decay == (0.05 if name == "pretrain" else 0.0)
        (source,) = config.plain(stage.sources)
        (example,) = SOURCES[source.pop("kind")](**source)
        assert example.size == (224, 224) and example.num_frames <= max(stage.frames)


def test_what_is_compared_is_trained_alike():
    """The ways to look differ in nothing else, but that gaps would tell what is compared to look where it cannot."""
    stages = {}
    for name in ("answers", "none", "memory", "oracle"):
        loaded = config.load(f"rewind:tiny_{name}", ["--config.checkpoint=x"])
        stages[name] = config.plain(loaded.stages)
        looking = Looking(**loaded.rewind)
        assert (looking.memory, looking.frames, looking.num_selected) == {
            "answers": (True, "selected", 8),
            "none": (False, "uniform", 64),
            "memory": (True, "uniform", 8),
            "oracle": (True, "oracle", 8),
        }[name]
        assert loaded.trainable == ("memory_projection/.*", "detail_projection/.*", "separator", ".*/lora_[ab]")
    rooms = [one.pop("text") for one in stages["none"]]  # without memory none is needed for it
    assert stages["memory"] == stages["oracle"]
    assert tuple(stages["none"]) == tuple({k: v for k, v in one.items() if k != "text"} for one in stages["memory"])
    assert all(room < other["text"] for room, other in zip(rooms, stages["memory"], strict=True))
    assert {one["task"] for one in stages["answers"]} == {"rewound", "gaps"}
    for name, teaches in (("gaps", "gaps_detailed"), ("glimpses", "glimpses"), ("looking", "gaps_glimpses")):
        loaded = config.load(f"rewind:tiny_{name}", ["--config.checkpoint=x"])
        assert teaches in {one["task"] for one in config.plain(loaded.stages)}
        assert loaded.trainable == ("memory_projection/.*", "detail_projection/.*", "separator", ".*/lora_[ab]")
    assert tuple(one | {"task": "rewound"} for one in stages["answers"]) == tuple(stages["memory"])
    for name in ("write_1", "write_2", "write_4", "queries_16", "queries_64", "fps_0.5", "fps_2"):
        assert config.load(f"rewind:tiny_{name}", ["--config.towers=x"]).stages[0].task == "telling"


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"rewind": {"clip_frames": 0}}, "config.rewind.clip_frames is 0, but must be at least 1"),
        ({"rewind": {"truncate": -1}}, "config.rewind.truncate is -1, but must be at least 0"),
        ({"rewind": {"frames": "all"}}, "config.rewind.frames is 'all', but must be"),
        ({"rewind": {"num_selected": 65}}, "config.rewind.num_selected is 65, but must be at most num_candidates"),
    ],
)
def test_values_that_are_refused(values, fault):
    with pytest.raises(OptionError, match=fault):
        config.resolve({"stages": ({"steps": 1},), **values})


def test_sources_that_do_not_fit(tmp_path, monkeypatch):
    """What is noted down must be what a clip can know, in the slots that there are; an oracle must know something."""
    monkeypatch.setattr(models, "build", with_facts(models.build))
    wanted = config.load("rewind:smoke_instruct")
    (source,) = config.plain(wanted.stages[0].sources)
    for values, fault in (
        ({"clip_frames": 8, "slots": 2}, "has clip_frames=8, but this ReWind needs 4"),
        ({"clip_frames": 4, "slots": 1}, "has slots=1, but this ReWind needs 2"),
    ):
        with wanted.unlocked():
            wanted.stages[0].sources = (ConfigDict({**source, "kind": "telling", **values}),)
            wanted.stages[0].task = "telling"
        with pytest.raises(OptionError, match=fault):
            run(wanted, tmp_path / str(values["slots"]))
    monkeypatch.undo()
    with pytest.raises(OptionError, match="does not know what answers its questions; give one of kind 'telling'"):
        run(config.load("rewind:smoke_instruct", ["--config.rewind.frames=oracle"]), tmp_path / "oracle")


def with_facts(build):
    """models.build, with a map from facts in its model."""

    def built(*given):
        model, module = build(*given)
        return dataclasses.replace(model, facts=object()), module

    return built
