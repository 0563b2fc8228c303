"""A Hugging Face checkpoint as it lies on disk: headers first, then tensors slice by slice."""

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from longvid_jax.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # weights, configs, tokenizer, chat template
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MAX_HEADER = 100_000_000  # bytes, the format's own limit
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Index = tuple[slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; `dtype` in the format's own words (F32, BF16, ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int  # of the first byte in the file


class Source:
    """A checkpoint whose headers have been read.

    `.name` as it was asked for, its folder `.path`, its `.config`, and `.tensors` by key.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self.config = _json(path / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(path):
            _check(file)
            for key, info in _header(file).items():
                if key in self.tensors:
                    raise CheckpointError(
                        f"{file}: the tensor {key} is also in {self.tensors[key].file.name}; keep one."
                    )
                self.tensors[key] = info

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        """The tensor `key` (of a type in DTYPES), or only what `index`, slices of its leading axes, picks of it."""
        info = self.tensors[key]
        # Mapped for this one read: the pages of a file that stays mapped would count as memory of the process.
        return np.array(np.memmap(info.file, DTYPES[info.dtype], "r", info.offset, info.shape)[index])


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
        present = _header(index.parent / name)  # {} where the header is damaged; opening it will say so
        if lost := sorted(key for key, file in where.items() if file == name and key not in present and present):
            raise CheckpointError(
                f"{name} does not hold {', '.join(lost)}, which {index} places there; fetch both again."
            )
    return [index.parent / name for name in names]


def _check(file: Path) -> None:
    """Raises CheckpointError unless the safetensors library finds the file whole."""
    try:
        safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        size, cut = file.stat().st_size, _header(file)
        cut = {key: info for key, info in cut.items() if info.offset + info.nbytes > size}
        cause = str(error)
        if cut:
            promised = max(info.offset + info.nbytes for info in cut.values())
            first = min(cut, key=lambda key: cut[key].offset)
            cause = f"truncated at byte {size:,} of {promised:,}, within the tensor {first}"
        raise CheckpointError(f"{file}: {cause}; fetch this file again.") from error


def _header(file: Path) -> dict[str, TensorInfo]:
    """What the header of a file says, even of a truncated one; {} if it cannot be read."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(min(length, MAX_HEADER)))
        entries.pop("__metadata__", None)
        return {
            key: TensorInfo(file, tuple(entry["shape"]), entry["dtype"], end - start, 8 + length + start)
            for key, entry in entries.items()
            for start, end in [entry["data_offsets"]]
        }
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, OSError):
        return {}
