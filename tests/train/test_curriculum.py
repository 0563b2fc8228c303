"""The batches of several stages as one sequence."""

import numpy as np
import pytest

from longvid_jax.errors import DataError, OptionError
from longvid_jax.train import config, models, tasks
from longvid_jax.train.config import stage
from tests.train.runs import SMALLEST


def settings(*stages):
    made = config.load(SMALLEST)
    source = config.plain(made.stages)[0]["sources"][0]
    plain = {"batch_size": 2, "sources": (source,), "frames": (4,), "text": (256,)}
    made.stages = tuple(stage(**{**plain, **values}) for values in stages)
    return config.resolve(made)


@pytest.fixture(scope="module")
def model():
    return models.build(config.load(SMALLEST))[0]


def ids(batch):
    return [example.id for example in batch.examples]


def test_a_step_belongs_to_the_stage_it_falls_in(model):
    curriculum = tasks.Curriculum(settings({"steps": 2}, {"steps": 3, "batch_size": 4}), model)
    assert len(curriculum) == 5
    assert [len(curriculum[b].examples) for b in range(5)] == [2, 2, 4, 4, 4]
    assert [curriculum.stage(b).batch_size for b in range(5)] == [2, 2, 4, 4, 4]
    assert [curriculum[b].index for b in range(5)] == [0, 1, 2, 3, 4]
    assert [curriculum.examples(b) for b in range(6)] == [0, 2, 4, 8, 12, 16]
    # A stage does not begin with what another began with, and a batch is the same whenever it is made.
    assert ids(curriculum[2])[:2] != ids(curriculum[0])
    other = tasks.Curriculum(settings({"steps": 2}, {"steps": 3, "batch_size": 4}), model)[3]
    for name, array in curriculum[3].arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


def test_stages_of_a_group_are_taken_in_turns(model):
    sizes = {"steps": 2}, {"steps": 4, "batch_size": 4, "group": "both"}, {"steps": 2, "group": "both"}, {"steps": 1}
    curriculum = tasks.Curriculum(settings(*sizes), model)
    assert [curriculum.stage(b).batch_size for b in range(9)] == [2, 2, 4, 2, 4, 4, 2, 4, 2]
    assert [curriculum.examples(b) for b in range(10)] == [0, 2, 4, 8, 10, 14, 18, 20, 24, 26]
    seen = [ids(curriculum[b]) for b in range(9)]
    for n, steps in enumerate(((0, 1), (2, 4, 5, 7), (3, 6), (8,))):
        assert [seen[b] for b in steps] == [ids(curriculum.of_stages[n][i]) for i in range(len(steps))]


def test_another_seed_gives_other_examples(model):
    one, other = settings({"steps": 1, "batch_size": 8}), settings({"steps": 1, "batch_size": 8})
    other.seed = 1
    assert ids(tasks.Curriculum(one, model)[0]) != ids(tasks.Curriculum(other, model)[0])


@pytest.mark.parametrize(
    ("values", "error", "fault"),
    [
        ({"task": "answer"}, OptionError, "the table of tasks has no 'answer', but 'answers'"),
        ({"sources": ()}, OptionError, "no sources"),
        ({"sources": ({"kind": "worlds", "count": 1},)}, OptionError, "has no 'worlds', but 'world'"),
        ({"sources": ({"kind": "world", "cout": 1},)}, OptionError, "kind 'world'.* has no 'cout', but 'count'"),
        ({"sources": ({"kind": "world"},)}, OptionError, "needs count"),
        ({"sources": ({"kind": "world", "count": 0},)}, DataError, "the data set is empty"),
        ({"sources": ({"kind": "world", "count": 1, "weight": 0.0},)}, OptionError, "weights are"),
        ({"sources": ({"kind": "recorded", "folder": "nowhere"},)}, DataError, "nowhere has no split 'train'"),
        ({"frames": (4, 2)}, OptionError, "frames of a stage is"),
        ({"frames": (3,)}, OptionError, "a bucket has 3 frames, but must have a multiple of 2"),
        ({"text": ()}, OptionError, "text of a stage is"),
    ],
)
def test_stages_that_are_refused(values, error, fault, model):
    with pytest.raises(error, match=fault):
        tasks.Curriculum(settings({"steps": 1, **values}), model)


def test_a_recorded_world(model, tmp_path):
    from longvid_jax.data.world_dataset import WorldConfig, WorldDataset

    recorded = WorldConfig(name="some", clips=4, seconds=2.0, size=(28, 28), fps=2.0, questions=2)
    builder = WorldDataset(data_dir=tmp_path, config=recorded, file_format="array_record")
    builder.download_and_prepare()
    source = {"kind": "recorded", "folder": str(builder.data_path), "size": (28, 28)}
    batch = tasks.Curriculum(settings({"steps": 1, "sources": (source,)}), model)[0]
    assert batch.arrays["frames"].shape == (2, 4, 28, 28, 3) and batch.arrays["weights"].sum() > 0
