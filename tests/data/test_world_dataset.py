"""The world recorded with TensorFlow Datasets, where TensorFlow is not installed."""

import importlib.util
import json

import numpy as np
import pytest

from longvid_jax.data.world import WorldSource
from longvid_jax.data.world_dataset import RecordedWorld, WorldConfig, WorldDataset
from longvid_jax.video.synthetic import World


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    config = WorldConfig(name="few", description="Few.", clips=3, seconds=6.0, size=(56, 56), questions=5)
    builder = WorldDataset(data_dir=tmp_path_factory.mktemp("data"), config=config, file_format="array_record")
    builder.download_and_prepare()
    return builder


def test_splits_and_records(builder):
    assert importlib.util.find_spec("tensorflow") is None
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 3,
        "validation": 1,
        "test": 1,
    }
    records = [dict(record) for record in builder.as_data_source("train")]
    assert sorted(record["id"].decode() for record in records) == [f"clear/train/{n}" for n in range(3)]
    for record in records:
        about = json.loads(record["about"])
        world = World(about["seed"], seconds=6.0)
        assert about["events"] == world.describe()["events"]
        assert [q["text"] for q in about["questions"]] == [q.text for q in world.questions(5)]


def test_as_examples_they_are_the_rendered_ones(builder):
    recorded, rendered = RecordedWorld(builder.as_data_source("train")), WorldSource(3, seconds=(6.0,), questions=5)
    for example in (recorded[n] for n in range(3)):
        same = rendered[int(example.id.rsplit("/", 1)[1])]
        assert (example.id, example.conversations, example.tags) == (same.id, same.conversations, same.tags)
        assert example.num_frames == same.num_frames == 12
        frames = example.frames()
        assert frames.shape == (12, 56, 56, 3)
        assert np.abs(frames.astype(int) - same.frames()).mean() < 8
