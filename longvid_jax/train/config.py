"""What `longvid train` is told: a ConfigDict with every key, read from `configs/NAME.py:VARIANT`, and checked."""

import difflib
import importlib.resources
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict, FieldReference

from longvid_jax.errors import OptionError
from longvid_jax.memory.adacm2 import SCORES
from longvid_jax.ops.layers import REMAT
from longvid_jax.train import profile
from longvid_jax.train.optimizer import OptimizerConfig
from longvid_jax.train.rewound import FRAMES

STAGE = {
    "steps": 0,  # or
    "epochs": 0,  # so often is each example of the sources seen
    "batch_size": 32,
    "task": "answers",  # of train.tasks
    "sources": (),  # each {"kind": of train.sources, "weight": 1.0, and that source's own arguments}
    "frames": (),  # buckets: numbers of frames, ascending
    "text": (),  # buckets: tokens beside the video's, ascending
    "group": "",  # neighbours of one group are taken in turns, and not one after the other
}
BASE = {
    "seed": 0,
    "checkpoint": "",  # folder or hub id of the model to fine-tune; "": `model` from random weights
    "model": {},  # the content of a config.json; what hangs on the tokenizer is filled in
    "parts": (),  # with `model`: what of it comes from checkpoints, see train.parts
    "towers": "",  # a checkpoint that parts refer to: config.get_ref("towers")
    "frame_positions": {"count": 0, "initial": "zeros"},  # AdaCM2's, where the model has none; or "waves"
    "adacm2": {"alpha": 0.1, "beta": 0.1, "carry_queries": False, "stop_gradient": False, "scores": "attention"},
    # how ReWind watches and looks back, see train.rewound; truncate: gradients flow through so many clips, 0: all;
    # unroll: clips that are compiled one behind the other;
    # relevance: weight of a loss of its own that frame selection learns from while telling does, 0: as in the paper;
    # memory, frames: whether the memory is told, and which frames are: to compare with, see train.rewound.FRAMES
    "rewind": {
        "clip_frames": 8,
        "num_candidates": 64,
        "num_selected": 8,
        "num_neighbors": 5,
        "truncate": 0,
        "unroll": 1,
        "relevance": 0.0,
        "memory": True,
        "frames": "selected",
    },
    "stacked": True,  # layers as one scanned stack, or else each apart
    "compute_dtype": "float32",
    "remat": "none",  # of ops.layers.REMAT
    "trainable": (),  # path patterns; none: all, or with LoRA its adapters
    "frozen": (),  # path patterns of what is not trained after all
    "lora": {"rank": 0, "alpha": 16.0, "patterns": ()},  # rank 0: none
    "optim": {name: field.default for name, field in OptimizerConfig.__dataclass_fields__.items()},
    "accumulate": 1,
    "mesh": {"data": -1, "fsdp": 1, "context": 1, "tensor": 1},
    "data": "",  # a file, and a folder, that sources refer to: file=config.get_ref("data")
    "videos": "",
    "stages": (),  # one after the other, each with the keys of STAGE; the learning rate goes over all
    # every 0: never
    "eval": {"every": 0, "task": "answers", "batches": 8, "batch_size": 32, "sources": (), "frames": (), "text": ()},
    "save": {"every": 500, "keep_last": 2, "keep_best": 1, "dtype": "float32"},
    "log_every": 20,
    "workers": 2,
    "ahead": 4,
    "max_undecodable": 0.01,
    "pixels": {"min_pixels": 0, "max_pixels": 0},  # of a frame, for who uses a model made from nothing; 0: Qwen2-VL's
    "assets": "",  # the model's name in the package, if it is shipped
    "benchmark": {},  # fields of evaluate.world.Setup for `longvid eval`
    "profile_steps": "",  # "10:15" writes a trace of steps 10 to 14
}
# What does not change the parameters that come out, and may differ when a run is taken up again.
FREE = ("mesh", "eval.every", "save", "log_every", "workers", "ahead", "max_undecodable", "profile_steps",
        "pixels", "assets", "benchmark")  # fmt: skip
LAYERWISE = ("config.adacm2.alpha", "config.adacm2.beta")  # a number, or one for each cross-attention layer
DTYPES = ("float32", "bfloat16")


def base() -> ConfigDict:
    """A config with every key at its default, for get_config to change."""
    config = ConfigDict(BASE)
    for name in ("alpha", "beta"):  # of a number or a tuple
        config.adacm2[name] = FieldReference(BASE["adacm2"][name], field_type=object)
    return config


def stage(**values) -> ConfigDict:
    """A stage with every key, for a config's `stages`."""
    values = _merged(values, STAGE, "stage")
    return ConfigDict({**values, "sources": tuple(map(ConfigDict, values["sources"]))})


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The resolved config of `PATH.py:VARIANT`, or of `NAME:VARIANT` as the package brings it, with overrides.

    overrides: words of the command line, `--config.optim.lr=3e-4`, `--config.stages[0].steps=5`.
    """
    from absl import flags
    from ml_collections import config_flags

    name, _, variant = spec.partition(":")
    config, argv, values = _read(name, variant), ["longvid", *overrides], flags.FlagValues()
    for word in overrides:
        _check_key(config, word.partition("=")[0], name)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        left = values(argv)[1:]
        config = values.config
    except flags.UnrecognizedFlagError as error:
        raise OptionError(f"--{error.flagname} is not known; give --config.KEY=VALUE to change the config.") from error
    except flags.Error as error:
        raise OptionError(f"{_line(error)}; give a value of the kind that {name} has there.") from error
    if left:
        raise OptionError(f"{left[0]!r} is not known; give --config.KEY=VALUE to change the config.")
    return resolve(config)


def resolve(config: Mapping) -> ConfigDict:
    """The config with defaults for what it does not say; OptionError for a key or a kind of value that is not known."""
    config = _merged(plain(config), BASE, "config")
    config["stages"] = tuple(_merged(one, STAGE, f"config.stages[{n}]") for n, one in enumerate(config["stages"]))
    if not config["stages"]:
        raise OptionError("config.stages is empty; give at least one stage.")
    OptimizerConfig.of(config["optim"])
    profile.span(config["profile_steps"])
    _check(config, "remat", REMAT)
    _check(config, "compute_dtype", DTYPES)
    _check(config["frame_positions"], "initial", ("zeros", "waves"), "frame_positions.")
    _check(config["adacm2"], "scores", SCORES, "adacm2.")
    _check(config["rewind"], "frames", FRAMES, "rewind.")
    if config["rewind"]["truncate"] < 0:
        raise OptionError(f"config.rewind.truncate is {config['rewind']['truncate']}, but must be at least 0.")
    if config["rewind"]["num_selected"] > config["rewind"]["num_candidates"]:
        raise OptionError(
            f"config.rewind.num_selected is {config['rewind']['num_selected']}, but must be at most num_candidates, "
            f"which is {config['rewind']['num_candidates']}."
        )
    if config["frame_positions"]["count"] < 0:
        raise OptionError(
            f"config.frame_positions.count is {config['frame_positions']['count']}, but must be at least 0."
        )
    for name in ("alpha", "beta"):
        for value in np.atleast_1d(config["adacm2"][name]):
            if not 0 < value <= 1:
                raise OptionError(f"config.adacm2.{name} is {value}, but must be above 0 and at most 1.")
    _check(config["save"], "dtype", DTYPES, "save.")
    for n, one in enumerate(config["stages"]):
        counts = {name: one[name] for name in ("steps", "epochs")}
        if 0 not in counts.values():
            raise OptionError(f"config.stages[{n}] has both steps and epochs; give one of them.")
        name, count = max(counts.items(), key=lambda item: bool(item[1]))
        if count < 1:
            raise OptionError(f"config.stages[{n}].{name} is {count}, but must be at least 1.")
    for where, values, names in (
        ("", config, ("accumulate", "log_every", "workers", "ahead")),
        ("save.", config["save"], ("every", "keep_last")),
        ("rewind.", config["rewind"], ("clip_frames", "num_candidates", "num_selected", "num_neighbors", "unroll")),
        ("eval.", config["eval"], ("batches", "batch_size")),
        *((f"stages[{n}].", stage, ("batch_size",)) for n, stage in enumerate(config["stages"])),
    ):
        for name in names:
            if values[name] < 1:
                raise OptionError(f"config.{where}{name} is {values[name]}, but must be at least 1.")
    for n, one in enumerate(config["stages"]):
        if one["batch_size"] % config["accumulate"]:
            raise OptionError(
                f"config.stages[{n}].batch_size is {one['batch_size']}, but must be a multiple of config.accumulate, "
                f"which is {config['accumulate']}."
            )
    config["stages"] = tuple(ConfigDict(one) for one in config["stages"])
    return ConfigDict(config)


def plain(config):
    """A config in dicts, lists and tuples, references resolved."""
    if isinstance(config, Mapping | ConfigDict):
        return {name: plain(config[name]) for name in config}
    if isinstance(config, list | tuple):
        return tuple(plain(value) for value in config)
    return plain(config.get()) if isinstance(config, FieldReference) else config


def as_json(config) -> dict:
    """As a config is written to config.json and read from it."""
    return json.loads(json.dumps(plain(config)))


def differences(one: Mapping, other: Mapping) -> list[str]:
    """The keys in which two configs, as_json, differ, without those that do not change what comes out."""
    one, other = _flat(one), _flat(other)
    keys = [key for key in {**one, **other} if one.get(key, ...) != other.get(key, ...)]
    return [key for key in keys if not any(key == free or key.startswith(f"{free}.") for free in FREE)]


def unknown(name: str, known: Sequence[str], where: str) -> OptionError:
    """The error for a name that is not among the known ones."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    said = f", but {near[0]!r}" if near else ""
    return OptionError(f"{where} has no {name!r}{said}; known are {', '.join(known) or 'none'}.")


def _read(name: str, variant: str) -> ConfigDict:
    """What the get_config of a config file gives."""
    path = _file(name)
    try:
        config = runpy.run_path(str(path))["get_config"](*[variant] * bool(variant))
    except Exception as error:  # whatever a config file, which is a program, raises
        raise OptionError(f"{path} gives no config ({type(error).__name__}: {_line(error)}); mend it.") from error
    if not isinstance(config, ConfigDict):
        raise OptionError(f"get_config of {path} gives a {type(config).__name__}, but must give a ConfigDict.")
    return config


def _check_key(config, word: str, name: str) -> None:
    """That the config has the key of an override, `--config.stages[0].steps`."""
    where = "config"
    for key, number in re.findall(r"\.(\w+)|\[(\d+)\]", word.removeprefix("--config") if "--config." in word else ""):
        if key and not (isinstance(config, ConfigDict) and key in config):
            raise unknown(key, list(config) if isinstance(config, ConfigDict) else [], f"{where} of {name}")
        if number and not (isinstance(config, tuple) and int(number) < len(config)):
            raise OptionError(f"{where} of {name} has no number {number}; numbers start at 0.")
        config = config[int(number) if number else key]
        where += f"[{number}]" if number else f".{key}"


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    package = importlib.resources.files("longvid_jax")
    folders = Path(str(package)) / "configs", Path(str(package)).parent / "configs"  # of a wheel, of a checkout
    for folder in folders:
        if "/" not in name and (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    packaged = sorted(file.stem for folder in folders for file in folder.glob("*.py"))
    raise OptionError(f"{name} is no config file; give a path, or one of the package's: {', '.join(packaged)}.")


def _merged(given: Mapping, known: Mapping, where: str) -> dict:
    """The given values over the known ones, whose kinds they must have."""
    for name in given:
        if name not in known:
            raise unknown(name, list(known), where)
    return {name: _kind(given.get(name, default), default, f"{where}.{name}") for name, default in known.items()}


def _kind(value, default, where: str):
    if isinstance(default, Mapping):
        if not isinstance(value, Mapping | ConfigDict):
            raise OptionError(f"{where} is {value!r}, but must hold keys and values.")
        value = plain(value)
        return _merged(value, default, where) if default else value
    if where.startswith("config.optim."):
        return value  # OptimizerConfig checks them
    if isinstance(default, bool | str | tuple | int) and type(value) is type(default):
        return value
    if where in LAYERWISE and isinstance(value, tuple) and all(isinstance(one, int | float) for one in value):
        return tuple(map(float, value))
    if isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if where in LAYERWISE:
        raise OptionError(f"{where} is {value!r}, but must be a number, or a tuple with one for each layer.")
    names = {bool: "True or False", str: "a text", tuple: "a tuple", int: "a whole number", float: "a number"}
    raise OptionError(f"{where} is {value!r}, but must be {names[type(default)]}.")


def _check(config: Mapping, name: str, allowed: Sequence[str], where: str = "") -> None:
    if config[name] not in allowed:
        raise OptionError(f"config.{where}{name} is {config[name]!r}, but must be {' or '.join(allowed)}.")


def _flat(config, where: str = "") -> dict:
    """Values by key, `stages[0].steps`."""
    if isinstance(config, Mapping) and config:
        items = [(f"{where}.{name}" if where else name, value) for name, value in config.items()]
    elif isinstance(config, list) and any(isinstance(value, Mapping) for value in config):
        items = [(f"{where}[{n}]", value) for n, value in enumerate(config)]
    else:
        return {where: config}
    return {key: value for name, one in items for key, value in _flat(one, name).items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
