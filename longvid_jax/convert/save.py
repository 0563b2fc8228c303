"""From parameters back to a Hugging Face folder, one or many files, one parameter at a time."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from longvid_jax.convert.folder import CONFIG, copy_beside
from longvid_jax.convert.load import checked_dtype
from longvid_jax.convert.ops import Op
from longvid_jax.convert.pickled import SUFFIXES
from longvid_jax.convert.source import INDEX, TOKENIZER_FOLDER
from longvid_jax.convert.tables import Table, class_name
from longvid_jax.convert.target import written
from longvid_jax.errors import CheckpointError
from longvid_jax.models.paths import leaves

NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(jnp.bfloat16): "BF16"}


@dataclass(frozen=True)
class Part:
    """One parameter of one layer, as the models have it; `dtype` as it is stored now."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]


def write_huggingface(
    parts: Mapping[str, Part],
    config: dict,
    folder: str | Path,
    table: Table,
    *,
    dtype=None,
    max_shard_bytes: int = 5_000_000_000,
    beside: Iterable[Path] = (),
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes `config` and `parts`, by canonical path, as a folder that transformers loads; returns the folder.

    dtype: of all tensors; None keeps that of each part.
    max_shard_bytes: of the tensors in one file, unless a single tensor is larger; what fits makes one file, more make
        several with an index. Layers follow each other in the order of their numbers.
    beside: files that are copied into the folder, such as a tokenizer's; config.json and weights are not among them.
        One whose own folder is called qformer_tokenizer goes into a folder of that name.
    overwrite: a model (a folder with a config.json and weights, and none below it but a qformer_tokenizer) at `folder`
        is replaced once the new one is whole.
    progress: is called with the bytes of each tensor when they are written.

    The `values` of each part are asked for once, one part after the other: host memory holds one of them and one copy
    in the other layout or dtype. The folder must otherwise be absent or empty and gets its name once it is whole; what
    fails or is killed before leaves nothing under it, see `longvid_jax.convert.target`. Raises CheckpointError if the
    target does not do, another process writes to it, its disk is too small or a part cannot be written.
    """
    tensors = _tensors(parts, table, checked_dtype(dtype))
    copied = _copied(beside)
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    texts = {CONFIG: {**config, "architectures": [class_name(config)]}}
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    if len(dtypes) == 1:
        name = dtypes.pop()
        named = {"torch_dtype": name, "dtype": name}  # before and after transformers 4.56
        texts[CONFIG] = {key: _renamed(value, named) for key, value in texts[CONFIG].items()} | named
    if split.is_sharded:
        texts[INDEX] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    needed = split.metadata["total_size"] + sum(file.stat().st_size for file in copied)
    with written(folder, needed, overwrite, _is_huggingface) as unfinished:
        for file in copied:
            copy_beside(file, unfinished)
        for name, content in texts.items():
            (unfinished / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, keys in split.filename_to_tensors.items():
            _write(unfinished / name, {key: tensors[key] for key in keys}, progress or (lambda _: None))
    return Path(folder).expanduser().resolve()


def _renamed(value, named: dict[str, str]):
    """A part of a config with the new names where it has them, as text_config does."""
    return value | {key: named[key] for key in named if key in value} if isinstance(value, dict) else value


def _is_huggingface(folder: Path) -> bool:
    """Whether the folder is a model and nothing more, such as a training's checkpoints beside it, would be lost."""
    weights = any(file.suffix in (".safetensors", *SUFFIXES) for file in folder.iterdir())
    tokenizer = folder / TOKENIZER_FOLDER
    files = (file for file in [*folder.iterdir(), *tokenizer.glob("*")] if file != tokenizer)
    return weights and (folder / CONFIG).is_file() and all(file.is_file() for file in files)


def save_huggingface(module, config: dict, folder: str | Path, table: Table, dtype=None, **how) -> Path:
    """Writes the parameters of `module` as `write_huggingface` does, which takes what else is given."""
    parts = {}
    for leaf in leaves(module):
        for n, path in enumerate(leaf.part_paths):
            values = partial(_fetch, leaf.value, n if leaf.stacked else None)
            parts[path] = Part(leaf.part_shape, np.dtype(leaf.value.dtype), values)
    return write_huggingface(parts, config, folder, table, dtype=dtype, **how)


def _fetch(value, layer: int | None) -> np.ndarray:
    # Of a copy, since a jax.Array keeps in host memory what was once fetched of it.
    return np.asarray(jnp.copy(value) if layer is None else value[layer])


@dataclass(frozen=True)
class _Tensor:
    """A part as it will be in a file, and where it comes from."""

    path: str
    part: Part
    op: Op
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        values = self.part.values()
        if values.shape != self.part.shape:
            raise ValueError(f"{self.path} was to have the shape {self.part.shape} and has {values.shape}")
        with np.errstate(over="ignore"):
            written = np.ascontiguousarray(self.op.invert(values), self.dtype)
        if self.dtype == np.float16 != values.dtype and np.isinf(written).any():
            raise CheckpointError(f"{self.path} has values too large for float16; write bfloat16 or float32.")
        return written


def _tensors(parts: Mapping[str, Part], table: Table, dtype) -> dict[str, _Tensor]:
    """By source key, layers in the order of their numbers."""
    tensors = {}
    for path in sorted(parts, key=lambda path: [name.zfill(9) if name.isdigit() else name for name in path.split("/")]):
        part, found = parts[path], table.source(path)
        if found is None:
            raise CheckpointError(f"the parameter {path} has no name in the Hugging Face layout.")
        key, op = found
        kept = np.dtype(part.dtype if dtype is None else dtype)
        if kept not in NAMES:
            raise CheckpointError(f"{path} is {kept.name}; only float32, float16 and bfloat16 are written.")
        shape = op.source_shape(part.shape)
        if shape is None:
            raise CheckpointError(f"{path} has the shape {list(part.shape)}, of which {key} cannot be made.")
        tensors[key] = _Tensor(path, part, op, shape, kept)
    return tensors


def _copied(beside: Iterable[Path]) -> list[Path]:
    files = [file for file in map(Path, beside) if file.name not in (CONFIG, INDEX) and file.suffix != ".safetensors"]
    if absent := [str(file) for file in files if not file.is_file()]:
        raise CheckpointError(f"{', '.join(absent)} cannot be copied beside the weights: no such file.")
    return files


def _write(file: Path, tensors: dict[str, _Tensor], progress: Callable[[int], None]) -> None:
    """The safetensors format, tensor after tensor: the library's own writer wants them all in memory at once."""
    # Wide types first keeps every tensor aligned; among those of one type the order stays.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for tensor in ordered.values():
            stream.write(tensor.read().reshape(-1).view(np.uint8).data)  # unnamed, so that it is gone before the next
            progress(tensor.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
