"""The made-up world as a TensorFlow Datasets builder: clips as encoded bytes in ArrayRecord, read without TensorFlow.

builder = WorldDataset(data_dir="data", config=WorldConfig(name="clear16", clips=1000), file_format="array_record")
builder.download_and_prepare()
builder.as_data_source("train")[0]                # id, video (an .mp4's bytes), and JSON about it
RecordedWorld(builder.as_data_source("train"))    # the same as examples to train on
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from longvid_jax.data.batches import Example
from longvid_jax.data.conversations import frames_of
from longvid_jax.video.synthetic import LEVELS, SPLITS, World, write_video


@dataclasses.dataclass
class WorldConfig(tfds.core.BuilderConfig):
    """Which worlds are recorded: `clips` of the train split, a tenth as many of the others (at least one)."""

    level: str = "clear"
    seconds: float = 16.0
    clips: int = 1000
    size: tuple[int, int] = (112, 112)
    fps: float = 4.0
    crf: int = 20
    questions: int = 14


class WorldDataset(tfds.core.GeneratorBasedBuilder):
    """Clips of the made-up world with questions and every event."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The world of longvid_jax.video.synthetic."}
    BUILDER_CONFIGS = [
        WorldConfig(name=level, description=f"Worlds of level {level}.", level=level) for level in LEVELS
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "video": tfds.features.Scalar(np.object_),
            "about": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Shapes come and go, change and are counted; the JSON has options, events and questions.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, _) -> dict[str, Iterator]:
        clips = self.builder_config.clips
        return {split: self._clips(split, clips if split == "train" else max(1, clips // 10)) for split in SPLITS}

    def _generate_examples(self):
        raise AssertionError("each split has its own generator")

    def _clips(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for seed in range(count):
            world = World(seed, level=config.level, seconds=config.seconds, split=split)
            with tempfile.TemporaryDirectory() as folder:
                path = write_video(
                    world,
                    Path(folder) / "clip.mp4",
                    size=config.size,
                    fps=config.fps,
                    crf=config.crf,
                    questions=config.questions,
                )
                about = path.with_suffix(".json").read_text(encoding="utf-8")
                yield seed, {"id": f"{config.level}/{split}/{seed}", "video": path.read_bytes(), "about": about}


@dataclasses.dataclass(frozen=True)
class RecordedWorld:
    """A split of a WorldDataset, as its as_data_source gives it, as examples."""

    records: Sequence
    size: tuple[int, int] = (56, 56)
    fps: float = 2.0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        record = self.records[i]
        about = json.loads(record["about"])
        count = max(1, int(about["seconds"] * self.fps))
        return Example(
            id=record["id"].decode(),
            conversations=tuple(((q["text"], q["answer"]),) for q in about["questions"]),
            num_frames=count,
            size=self.size,
            frames=partial(frames_of, record["video"], self.fps, count, self.size),
            tags=tuple(q["family"] for q in about["questions"]),
        )
