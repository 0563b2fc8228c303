"""A Hugging Face checkpoint as it lies on disk: headers first, then tensors slice by slice."""

import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from longvid_jax.convert import lavis, pickled
from longvid_jax.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PREFERRED = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")  # as transformers does
# Configs, indexes, tokenizer, chat template, licence: what a model needs besides weights. No code, whatever it says.
BESIDE = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
# A folder beside the weights that belongs to the model, too: InstructBLIP's second tokenizer, the Q-Former's.
TOKENIZER_FOLDER = "qformer_tokenizer"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_HEADER = 100_000_000  # bytes, the format's own limit
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Index = tuple[slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor before it is read; `dtype` in safetensors' own words (F32, BF16, ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int | None = None  # of the first byte in a safetensors file


class Source:
    """A checkpoint whose headers have been read.

    `.name` as it was asked for, its folder `.path`, the `.revision` that a hub's snapshot is (a commit hash; None for
    other folders), its `.config`, its `.files` with weights, and `.tensors` by key. Those of a LAVIS checkpoint have
    the keys that Hugging Face would give them (see convert.lavis); `.stored` says of each what it is in the files.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self.revision = path.name if path.parent.name == "snapshots" and COMMIT.fullmatch(path.name) else None
        self.config = read_json(path / CONFIG)
        self._headers: dict[str, TensorInfo] = {}
        self.files, placed = _weight_files(path)
        self._pickles = pickled.Reader()
        for file in self.files:
            for key, info in _tensors(file).items():
                if key in self._headers:
                    raise CheckpointError(
                        f"{file}: the tensor {key} is also in {self._headers[key].file.name}; keep one."
                    )
                self._headers[key] = info
        for name in sorted(set(placed.values())):
            wanted = (key for key in placed if placed[key] == name)
            if lost := sorted(k for k in wanted if k not in self._headers or self._headers[k].file.name != name):
                raise CheckpointError(
                    f"{path / name} does not hold {', '.join(lost)}, which the index places there; fetch both again."
                )
        self.stored: dict[str, tuple[str, ...]] = lavis.names(self.config, self._headers)
        self.tensors = {key: lavis.joined([self._headers[k] for k in names]) for key, names in self.stored.items()}

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        """The tensor `key` (of a type in DTYPES), or only what `index`, slices of its leading axes, picks of it."""
        first, *more = self.stored[key]
        if not more:
            return self._read(first, index)
        return lavis.qkv_bias(self._read(first, ()), *(self._read(name, ()) for name in more))[index]

    def _read(self, key: str, index: Index) -> np.ndarray:
        info = self._headers[key]
        if info.offset is None:
            return self._pickles.read(info.file, key, index)
        # Mapped for this one read: the pages of a file that stays mapped would count as memory of the process.
        return np.array(np.memmap(info.file, DTYPES[info.dtype], "r", info.offset, info.shape)[index])


def open_source(path_or_id: str | Path, revision: str | None = None) -> Source:
    """Opens a Hugging Face folder, or fetches what is needed of a hub id (at `revision`) and opens that.

    Raises CheckpointError if it is neither, is incomplete, or a file of it is damaged.
    """
    return Source(str(path_or_id), _folder(path_or_id, revision, _fetch_all))


def open_config(path_or_id: str | Path, revision: str | None = None) -> tuple[Path, dict]:
    """The folder and the config of a checkpoint, whose weights need not be there; of a hub id only that is fetched.

    Raises CheckpointError as open_source does.
    """
    folder = _folder(path_or_id, revision, partial(_fetch, names=[CONFIG]))
    return folder, read_json(folder / CONFIG)


def has_weights(folder: Path) -> bool:
    """Whether open_source would find weights in a folder, whole or not."""
    return bool(_chosen(_names(folder)))


def read_json(file: Path) -> dict:
    """The JSON object in a file; CheckpointError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} holds no {file.name}; give a Hugging Face checkpoint folder, or put one of the right "
            "model_type (instructblip or blip-2 for a checkpoint of LAVIS) beside the weights."
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, not an object; fetch it again.")
    return content


def _folder(path_or_id: str | Path, revision: str | None, fetch: Callable[[str, str | None], Path]) -> Path:
    """The local folder: as given, or what `fetch` makes of a hub id and revision."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path} is a local folder, which has no revision {revision!r}; only a hub id has.")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds {CONFIG} and the weights.")
    if not HUB_ID.fullmatch(str(path_or_id)):
        raise CheckpointError(f"{path_or_id} is neither a folder that exists nor a Hugging Face hub id (owner/name).")
    return fetch(str(path_or_id), revision)


def _fetch_all(hub_id: str, revision: str | None) -> Path:
    """The snapshot with all but the weights, and of those only what will be read: a repository may hold them twice."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = _fetch(hub_id, revision, BESIDE, ignored=["*/*"])
    try:
        there = [file.path for file in get_cached_repo_tree(hub_id, revision=folder.name)]
    except CachedRepoTreeNotFoundError:  # not fetched now, nor by a client that would have kept the list
        there = _names(folder)
    chosen = _chosen(there)
    if chosen and chosen[0].endswith(".index.json"):
        chosen = sorted(set(_weight_map(folder / chosen[0]).values()))
    tokenizer = [n for n in there if any(fnmatch(n, f"{TOKENIZER_FOLDER}/{p}") for p in BESIDE) and n.count("/") == 1]
    return _fetch(hub_id, folder.name, chosen + tokenizer) if chosen + tokenizer else folder


def _fetch(hub_id: str, revision: str | None, names: list[str], ignored: list[str] | None = None) -> Path:
    """The snapshot with the files of these names or patterns, from the hub or, without network, from the cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=names, ignore_patterns=ignored))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise CheckpointError(_hub_fault(hub_id, revision, error)) from error


def _hub_fault(hub_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{hub_id}"
        return f"{hub_id} is gated: accept its terms at {page} and log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub_id} is neither a folder nor a repository of the Hugging Face hub, unless a private one; "
            "check the name, or log in with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id} has no revision {revision or 'main'!r}; give a branch, a tag or a commit of it."
    cause = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return (
        f"{hub_id} is neither a folder nor could it be fetched from the Hugging Face hub ({cause}); "
        "give a local folder or check the name, your access and the network."
    )


def _chosen(names: Iterable[str]) -> list[str]:
    """Of files of these names those that hold the weights, or the index of them; in transformers' order, then any."""
    names = {name for name in names if "/" not in name}
    if preferred := [name for name in PREFERRED if name in names]:
        return preferred[:1]
    any_safe = sorted(name for name in names if name.endswith(".safetensors"))
    return any_safe or sorted(name for name in names if name.endswith(pickled.SUFFIXES))


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.is_file()]  # a link into a hub's cache may lead nowhere


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with weights, and the file name of each tensor where an index says it."""
    chosen = _chosen(_names(folder))
    if not chosen:
        raise CheckpointError(
            f"{folder} holds {CONFIG} but no *.safetensors, nor {', '.join(f'*{s}' for s in pickled.SUFFIXES)}; "
            "the weights are missing."
        )
    if not chosen[0].endswith(".index.json"):
        return [folder / name for name in chosen], {}
    placed = _weight_map(folder / chosen[0])
    names = sorted(set(placed.values()))
    if absent := [name for name in names if not (folder / name).exists()]:
        raise CheckpointError(f"{folder / chosen[0]} names files that are absent: {', '.join(absent)}; fetch them.")
    return [folder / name for name in names], placed


def _weight_map(index: Path) -> dict[str, str]:
    """The file name of each tensor."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no usable weight_map (tensor name to file name); fetch it again.")
    if outside := [name for name in sorted(where.values()) if Path(name).name != name]:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file name in its own folder.")
    return where


def _tensors(file: Path) -> dict[str, TensorInfo]:
    """What is in a file; CheckpointError if it is not whole."""
    if file.suffix in pickled.SUFFIXES:
        return {key: TensorInfo(file, *found) for key, found in pickled.headers(file).items()}
    _check(file)
    return _header(file)


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
    """What the header of a file says, even of a truncated one; {} if it cannot be read.

    CheckpointError if it has a key twice, of which json and safetensors would take the last.
    """
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(min(length, MAX_HEADER)), object_pairs_hook=partial(_unique, file))
        entries.pop("__metadata__", None)
        return {
            key: TensorInfo(file, tuple(entry["shape"]), entry["dtype"], end - start, 8 + length + start)
            for key, entry in entries.items()
            for start, end in [entry["data_offsets"]]
        }
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, OSError):
        return {}


def _unique(file: Path, pairs: list[tuple]) -> dict:
    found = {}
    for key, value in pairs:
        if key in found:
            raise CheckpointError(f"{file}: its header has the key {key} twice; save the model anew.")
        found[key] = value
    return found
