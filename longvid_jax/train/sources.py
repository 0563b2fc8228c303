"""The kinds of sources of examples that a stage names in its config."""

import inspect
from collections.abc import Callable, Mapping

from longvid_jax.data.batches import mixed
from longvid_jax.data.conversations import ConversationSource
from longvid_jax.data.facts import FactSource
from longvid_jax.data.grounding import GroundingSource
from longvid_jax.data.malmm import BreakfastSource, CaptionSource, CoinSource, LvuSource, QuestionSource
from longvid_jax.data.telling import TellingSource
from longvid_jax.data.text import TextSource
from longvid_jax.data.world import WorldSource
from longvid_jax.errors import DataError, OptionError
from longvid_jax.train.config import plain, unknown


def _recorded(folder: str, split: str = "train", size: tuple[int, int] = (56, 56), fps: float = 2.0):
    """A data set that data.world_dataset has built in `folder`."""
    import tensorflow_datasets as tfds

    from longvid_jax.data.world_dataset import RecordedWorld

    try:
        records = tfds.builder_from_directory(folder).as_data_source(split)
    except Exception as error:  # of many kinds, by what is missing
        raise DataError(f"{folder} has no split {split!r} that TensorFlow Datasets reads; give a built one.") from error
    return RecordedWorld(records, size=size, fps=fps)


SOURCES = {
    "world": WorldSource,
    "facts": FactSource,
    "telling": TellingSource,
    "recorded": _recorded,
    "conversations": ConversationSource,
    "text": TextSource,
    "lvu": LvuSource,
    "breakfast": BreakfastSource,
    "coin": CoinSource,
    "captions": CaptionSource,
    "grounding": GroundingSource,
    "questions": QuestionSource,
}


def examples(stage, seed: int):
    """What a stage's sources give, mixed by their weights."""
    entries = [dict(entry) for entry in plain(stage.sources)]
    if not entries:
        raise OptionError("a stage or the evaluation has no sources; give at least one.")
    weights = [entry.pop("weight", 1.0) for entry in entries]
    return mixed([source(entry) for entry in entries], weights, seed)


def source(values: Mapping):
    """The source of a config's entry: {"kind": "world", "count": 1000, ...}."""
    arguments = checked(values, SOURCES, "the table of kinds of sources")
    return SOURCES[values["kind"]](**arguments)


def checked(values: Mapping, kinds: Mapping[str, Callable], where: str) -> dict:
    """The arguments in a config's entry for the source of its kind."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in kinds:
        raise unknown(kind, list(kinds), where)
    parameters = inspect.signature(kinds[kind]).parameters
    for name in values:
        if name not in parameters:
            raise unknown(name, list(parameters), f"a source of kind {kind!r}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and values.get(name, "") == "":
            raise OptionError(f"a source of kind {kind!r} needs {name}; give it in its stage.")
    return values
