"""A Hugging Face checkpoint as it lies on disk: headers first, then tensors slice by slice."""

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401 - gives NumPy the name "bfloat16", by which safetensors asks for it
import numpy as np
from safetensors import SafetensorError, safe_open

from longvid_jax.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # weights, configs, tokenizer, chat template
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Index = tuple[slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; `dtype` in the format's own words (F32, BF16, ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Source:
    """An open checkpoint: `.name` as it was asked for, its folder `.path`, `.config`, and `.tensors` by key."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self.config = _json(path / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[Path, safe_open] = {}
        for file in _weight_files(path):
            self._open(file)

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        """The tensor `key`, or only the part of it that `index`, slices of its leading axes, picks."""
        info = self.tensors[key]
        try:
            part = self._files[info.file].get_slice(key)
            return part[index] if index else part[...]
        except (SafetensorError, AttributeError, OSError) as error:
            raise CheckpointError(f"{info.file}: the tensor {key} ({info.dtype}) cannot be read ({error}).") from error

    def _open(self, file: Path) -> None:
        try:
            # pread rather than mmap: pages of a mapped file count as this process's memory.
            opened = safe_open(file, framework="numpy", backend="pread")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {_diagnose(file) or error}; fetch this file again.") from error
        sizes = {name: end - start for name, (start, end) in _offsets(file).items()}
        for key in opened.keys():
            if key in self.tensors:
                raise CheckpointError(f"{file}: the tensor {key} is also in {self.tensors[key].file.name}; keep one.")
            part = opened.get_slice(key)
            self.tensors[key] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype(), sizes[key])
        self._files[file] = opened


def open_source(path_or_id: str | Path, revision: str | None = None) -> Source:
    """Opens a Hugging Face folder, or fetches what is needed of a hub id (at `revision`) and opens that.

    Raises CheckpointError if it is neither, is incomplete, or a file of it is damaged.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path} is a local folder, which has no revision {revision!r}; only a hub id has.")
        return Source(str(path_or_id), path)
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and *.safetensors.")
    if not HUB_ID.fullmatch(str(path_or_id)):
        raise CheckpointError(f"{path_or_id} is neither a folder that exists nor a Hugging Face hub id (owner/name).")
    return Source(str(path_or_id), _fetch(str(path_or_id), revision))


def _fetch(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        cause = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id} is neither a folder nor could it be fetched from the Hugging Face hub ({cause}); "
            "give a local folder or check the name, your access and the network."
        ) from error
    return Path(folder)


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} holds no {file.name}; give a Hugging Face checkpoint folder.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, not an object; fetch it again.")
    return content


def _weight_files(folder: Path) -> Iterable[Path]:
    """The files that transformers would read, in its order of preference: one file, the index's, else all."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        return _indexed_files(folder / INDEX)
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]):
        raise CheckpointError(
            f"{folder} holds {pickled[0].name} but no *.safetensors; save the model again with safe_serialization=True."
        )
    raise CheckpointError(f"{folder} holds config.json but no *.safetensors; the weights are missing.")


def _indexed_files(index: Path) -> list[Path]:
    where = _json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no usable weight_map (tensor name to file name); fetch it again.")
    names = sorted(set(where.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file name in its own folder.")
    if absent := [name for name in names if not (index.parent / name).exists()]:
        raise CheckpointError(f"{index} names files that are absent: {', '.join(absent)}; fetch them.")
    for name in names:
        present = _offsets(index.parent / name)  # {} where the header is damaged; opening it will say so
        if lost := sorted(key for key, file in where.items() if file == name and key not in present and present):
            raise CheckpointError(
                f"{name} does not hold {', '.join(lost)}, which {index} places there; fetch both again."
            )
    return [index.parent / name for name in names]


def _offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes begin and end, counted from the end of the header; {} if that cannot be read."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:  # the format's own limit
                return {}
            header = json.loads(stream.read(length))
        return {key: tuple(entry["data_offsets"]) for key, entry in header.items() if key != "__metadata__"}
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, OSError):
        return {}


def _diagnose(file: Path) -> str | None:
    """Says which tensor is cut off where the header of a truncated file can still be read."""
    if not (offsets := _offsets(file)):
        return None
    with open(file, "rb") as stream:
        start = 8 + struct.unpack("<Q", stream.read(8))[0]
    size, promised = file.stat().st_size, start + max(end for _, end in offsets.values())
    if size >= promised:
        return None
    first = min((key for key in offsets if start + offsets[key][1] > size), key=offsets.get)
    return f"truncated at byte {size:,} of {promised:,}, within the tensor {first}"
