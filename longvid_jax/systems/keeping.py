"""A memory on disk: a video that was watched today is asked about tomorrow.

A folder holds memory.json, the structure (which of the library's dataclasses, where None, each array's kind, shape and
dtype), and arrays/, which Orbax writes.
"""

import dataclasses
import importlib
import json
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from longvid_jax import checkpoint
from longvid_jax.convert.folder import first_line
from longvid_jax.convert.target import written
from longvid_jax.errors import CheckpointError

STRUCTURE, ARRAYS, FORMAT = "memory.json", "arrays", 2  # 2: ReWind's keys and values are stored by head
HOMES = ("longvid_jax.memory.", "longvid_jax.ops.")  # classes of no other modules are made of what a file says


def save(memory, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a memory, as begin and watch give it, to a folder that `restore` reads; returns the folder.

    overwrite: replace a saved memory, and nothing else, at `folder`. The memory is not consumed. The folder gets its
    name once it is whole. Raises CheckpointError where it exists or cannot be written.
    """
    arrays: dict[str, jax.Array | np.ndarray] = {}
    structure = {
        "format": FORMAT,
        "longvid_jax": version("longvid_jax"),
        "memory": _describe(memory, "memory", arrays),
    }
    size = sum(array.nbytes for array in arrays.values())
    with written(folder, size, overwrite, lambda there: (there / STRUCTURE).is_file()) as unfinished:
        checkpoint.save(unfinished / ARRAYS, arrays)
        (unfinished / STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")
    return Path(folder)


def restore(folder: str | Path, *, mesh: Mesh | None = None):
    """The memory that `save` wrote, for the model (the same weights, method and layout) that made it.

    mesh: arrays that were spread over a mesh are spread over this one in the same way; None: all on the first local
    device. Raises CheckpointError if the folder is no saved memory, is damaged, or is of a version with another format.
    """
    folder = Path(folder).expanduser().absolute()
    structure = _structure(folder)
    try:
        wanted: dict[str, jax.ShapeDtypeStruct] = {}
        _rebuild(structure["memory"], "memory", wanted, mesh, None)
        stored = checkpoint.contents(folder / ARRAYS)
        if stored.keys() != wanted.keys():
            raise ValueError(f"{STRUCTURE} and {ARRAYS} name different arrays")
        return _rebuild(structure["memory"], "memory", {}, mesh, checkpoint.restore(folder / ARRAYS, wanted))
    except Exception as error:  # of Orbax, or a structure of another form
        raise _damaged(folder, error) from error


def _structure(folder: Path) -> dict:
    try:
        structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
        kind, by = structure["format"], structure["longvid_jax"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {STRUCTURE}; give a folder that lv.save has made.") from None
    except Exception as error:
        raise _damaged(folder, error) from error
    if kind != FORMAT:
        raise CheckpointError(
            f"{folder} was saved by longvid_jax {by} in format {kind}, but this version reads format {FORMAT}; watch "
            "the video again."
        )
    return structure


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder} is a damaged memory ({first_line(error)}); watch the video again.")


def _describe(node, path: str, arrays: dict):
    """The structure of a memory as JSON; its arrays go into `arrays` by path."""
    if node is None:
        return None
    if isinstance(node, tuple):
        return [_describe(part, f"{path}/{n}", arrays) for n, part in enumerate(node)]
    if dataclasses.is_dataclass(node):
        fields = {
            f.name: _describe(getattr(node, f.name), f"{path}/{f.name}", arrays) for f in dataclasses.fields(node)
        }
        return {"class": f"{type(node).__module__}.{type(node).__name__}", "fields": fields}
    if node.size:  # Orbax has no arrays without elements
        arrays[path] = node
    array = {"shape": list(node.shape), "dtype": node.dtype.name, "spec": None}
    if isinstance(node, jax.Array):
        named = isinstance(node.sharding, NamedSharding)
        array["spec"] = (
            [list(axes) if isinstance(axes, tuple) else axes for axes in node.sharding.spec] if named else []
        )
    return array


def _rebuild(node, path: str, wanted: dict, mesh: Mesh | None, arrays: dict | None):
    """The memory of a structure and its arrays; without arrays only `wanted` is filled."""
    if node is None:
        return None
    if isinstance(node, list):
        return tuple(_rebuild(part, f"{path}/{n}", wanted, mesh, arrays) for n, part in enumerate(node))
    if "class" in node:
        made = _class(node["class"])
        return made(
            **{name: _rebuild(part, f"{path}/{name}", wanted, mesh, arrays) for name, part in node["fields"].items()}
        )
    shape, dtype = tuple(node["shape"]), np.dtype(node["dtype"])
    sharding = None if node["spec"] is None else _sharding(mesh, node["spec"])
    if 0 in shape:
        empty = np.zeros(shape, dtype)
        return empty if sharding is None else jax.device_put(empty, sharding)
    wanted[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return None if arrays is None else arrays[path]


def _sharding(mesh: Mesh | None, spec: list):
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, PartitionSpec(*(tuple(axes) if isinstance(axes, list) else axes for axes in spec)))


def _class(name: str):
    module, _, attribute = name.rpartition(".")
    if not module.startswith(HOMES):
        raise ValueError(f"{name} is no class of a memory")
    found = getattr(importlib.import_module(module), attribute)
    if not dataclasses.is_dataclass(found):
        raise ValueError(f"{name} is no class of a memory")
    return found
