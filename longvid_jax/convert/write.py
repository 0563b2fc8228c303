"""From a Hugging Face checkpoint to the library's own folder: a few arrays at a time, resumable, strict."""

import hashlib
import math
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from rich.filesize import decimal

from longvid_jax import checkpoint
from longvid_jax.checkpoint import CHUNK_BYTES
from longvid_jax.convert import pickled
from longvid_jax.convert.folder import (
    CONFIG,
    FORMAT,
    PARAMS,
    PROVENANCE,
    SIZES,
    copy_beside,
    files_beside,
    is_checkpoint,
    is_converted,
    sizes,
    write_json,
)
from longvid_jax.convert.journal import Journal, stoppable
from longvid_jax.convert.load import (
    TYPES,
    check_tied,
    checked_dtype,
    give_back_memory,
    grouped,
    nbytes,
    plan,
    stored_dtype,
)
from longvid_jax.convert.modules import abstract, network_config
from longvid_jax.convert.ops import Op
from longvid_jax.convert.source import Source, has_weights, open_config, open_source
from longvid_jax.convert.tables import Table, architecture, table_for
from longvid_jax.convert.target import check_apart, check_space, check_target, locked, put_in_place, sibling
from longvid_jax.errors import CheckpointError
from longvid_jax.models.paths import leaves

PART_BYTES = 1 << 26  # arrays are written together up to this size, or up to the largest array's
BESIDE_BYTES = 50 << 20  # for stripes, headers, tables, and code of Orbax that is loaded late: measured
CHUNK_OVERHEAD = 7 << 10  # of each chunk that TensorStore writes: measured
STRIPE_BYTES = 1 << 22  # of an array that are read at a time
Specs = dict[str, jax.ShapeDtypeStruct]  # by canonical path


@dataclass(frozen=True)
class Needs:
    """What a conversion will take; sizes in bytes."""

    architecture: str
    dtype: str
    arrays: int
    parameters: int
    source_bytes: int | None  # None where only the config is there
    target_bytes: int  # and so much space, twice that where files cannot have two names
    largest_array: str
    largest_bytes: int
    peak_bytes: int  # of host memory, above the interpreter with its imports

    def __str__(self) -> str:
        source = "not there, only its config" if self.source_bytes is None else decimal(self.source_bytes)
        return (
            f"model           {self.architecture}, {self.parameters:,} parameters in {self.arrays:,} arrays\n"
            f"source          {source}\n"
            f"target          {decimal(self.target_bytes)} in {self.dtype}; as much space is needed on its disk\n"
            f"largest array   {decimal(self.largest_bytes)}, {self.largest_array}\n"
            f"peak memory     {decimal(self.peak_bytes)}, above the interpreter with its imports"
        )


def needs(source: str | Path | Source, *, dtype=None, revision: str | None = None) -> Needs:
    """What `to_orbax` with these arguments would take, from headers alone; from config.json alone without weights.

    Raises CheckpointError as to_orbax does: a checkpoint that passes here fits its config.
    """
    dtype = checked_dtype(dtype)
    if isinstance(source, Source) or _has_weights(source):
        source = open_to_convert(source, revision)
        config, specs = source.config, _Arrays(source, dtype).specs
        source_bytes = sum(info.nbytes for info in source.tensors.values())
    else:
        _, config = open_config(source, revision)
        specs, source_bytes = _specs_of_config(_Bare(str(source), config), dtype), None
        source = None
    largest = max(specs, key=lambda path: nbytes(specs[path]))
    return Needs(
        architecture=architecture(config),
        dtype=", ".join(sorted({np.dtype(spec.dtype).name for spec in specs.values()})),
        arrays=len(specs),
        parameters=sum(int(np.prod(spec.shape)) for spec in specs.values()),
        source_bytes=source_bytes,
        target_bytes=sum(map(nbytes, specs.values())),
        largest_array=largest,
        largest_bytes=nbytes(specs[largest]),
        peak_bytes=_peak(specs, source),
    )


def to_orbax(
    source: str | Path | Source,
    target: str | Path,
    *,
    dtype=None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Converts a Hugging Face folder or hub id to a folder that `load` restores; returns the folder.

    dtype: float32, bfloat16 or float16 of all parameters; None keeps what is stored. revision: of a hub id.
    overwrite: replace a converted checkpoint (nothing else) at `target`, once the new one is whole.
    progress: called with the bytes of parameters that have just been finished.

    Every tensor is used and every parameter filled, as in `load`; values must be finite. Host memory: about three
    times the largest array, see `needs`. What is finished when the work is interrupted waits beside the target
    (`.NAME.converting`) and is verified and kept when the same conversion starts again; `target` gets its name by one
    rename when all is there. Ctrl-C ends it after the part that is being written, a second one at once.
    Raises CheckpointError where source, target or space do not do; OptionError for a dtype.
    """
    dtype = checked_dtype(dtype)
    source = open_to_convert(source, revision)
    check_apart(source.path, target)
    arrays = _Arrays(source, dtype)
    check_tied(source, arrays.table, arrays.assignments)
    job = {
        "format": FORMAT,
        "source": source.name if source.revision else str(source.path.resolve()),
        "revision": source.revision,
        "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files},
        "config": hashlib.sha256((source.path / CONFIG).read_bytes()).hexdigest()[:16],
        "table": table_hash(arrays.table),
        "dtype": None if dtype is None else dtype.name,
    }
    with locked(target) as target, stoppable() as stop_if_asked:
        if not overwrite and is_converted(target):
            shutil.rmtree(sibling(target, "converting"), ignore_errors=True)  # of one that was killed at the very end
        check_target(target, overwrite, is_converted)
        journal = Journal(sibling(target, "converting"), job, stop_if_asked)
        try:
            _write_parts(journal, arrays, progress or (lambda _: None), stop_if_asked)
        except _Spoiled:
            journal.remove()  # another start would come to the same end
            raise
        whole = _whole(journal, source, arrays, job)
        stop_if_asked()
        put_in_place(whole, target, overwrite)
        journal.remove()
    return target


def _write_parts(journal: Journal, arrays: "_Arrays", progress: Callable[[int], None], stop_if_asked) -> None:
    """Writes all that the journal does not have yet."""
    todo = {path: spec for path, spec in arrays.specs.items() if path not in journal.checksums}
    progress(sum(nbytes(arrays.specs[path]) for path in journal.checksums))
    copied = 0 if checkpoint.can_link(journal.folder) else sum(map(nbytes, arrays.specs.values()))
    try:
        check_space(journal.folder, copied + sum(map(nbytes, todo.values())))
    except CheckpointError:
        if not journal.checksums:
            journal.remove()
        raise
    for group in _ahead(arrays.values, grouped(todo, _part_bytes(arrays.specs))):
        give_back_memory()
        journal.add(group)
        progress(sum(array.nbytes for array in group.values()))
        del group  # before the one after the next is made
        stop_if_asked()


def _has_weights(source: str | Path) -> bool:
    """Whether there is more to look at than a config; a hub id's weights are not fetched to find out."""
    folder = Path(source).expanduser()
    return is_checkpoint(folder) or (folder.is_dir() and has_weights(folder))


def open_to_convert(source: str | Path | Source, revision: str | None = None) -> Source:
    """As open_source; CheckpointError for a folder that is converted already."""
    if isinstance(source, Source):
        return source
    if is_checkpoint(Path(source).expanduser()):
        raise CheckpointError(f"{source} is converted already; load it as it is, or give the Hugging Face folder.")
    return open_source(source, revision)


def _whole(journal: Journal, source: Source, arrays: "_Arrays", job: dict) -> Path:
    """The finished checkpoint, still under another name."""
    folder = journal.folder / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    journal.merge(folder / PARAMS)
    for file in [source.path / CONFIG, *files_beside(source.path)]:
        copy_beside(file, folder)
    provenance = {
        "longvid_jax": version("longvid_jax"),
        "architecture": architecture(source.config),
        **job,
        "files": {file.name: file.stat().st_size for file in source.files},
        "parameters_crc32": {path: journal.checksums[path] for path in arrays.specs},
        SIZES: sizes(folder / PARAMS),
    }
    write_json(folder / PROVENANCE, provenance)
    return folder


class _Spoiled(CheckpointError):
    """A tensor that cannot be converted, now or later."""


class _Arrays:
    """What is to be written: the spec of each array, and its value when it is asked for."""

    def __init__(self, source: Source, dtype):
        self.source, self.table = source, table_for(source.config)
        module = abstract(source.config, network_config(source))
        self.assignments = plan(source, module, self.table)
        self._tensors: dict[str, tuple[str, Op]] = {}
        self.specs: Specs = {}
        for item in self.assignments:
            (key,), path = item.keys, item.leaf.path  # layers are apart in this module
            self._tensors[path] = key, item.op
            self.specs[path] = jax.ShapeDtypeStruct(item.leaf.value.shape, dtype or stored_dtype(source, item.keys))

    def values(self, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays of some canonical paths; CheckpointError if there is NaN or infinity in one."""
        return {path: self._value(path) for path in paths}

    def _value(self, path: str) -> np.ndarray:
        (key, op), spec = self._tensors[path], self.specs[path]
        array = np.empty(spec.shape, spec.dtype)
        for stripe in _stripes(spec, op.axis):
            values = op.read(partial(self.source.read, key), stripe)
            with np.errstate(over="ignore", invalid="ignore"):
                array[stripe] = values
            if not _finite(array[stripe]):
                file = self.source.tensors[key].file.name
                if _finite(values):
                    raise _Spoiled(
                        f"{file}: {key} has values too large for {array.dtype.name}; convert to bfloat16 or float32."
                    )
                raise _Spoiled(f"{file}: {key} has NaN or infinity in it; the file is damaged, fetch it again.")
        return array


@dataclass(frozen=True)
class _Bare:
    """A config without weights."""

    name: str
    config: dict


def _specs_of_config(source: _Bare, dtype) -> Specs:
    settings = network_config(source)
    if dtype is None:
        of_text = source.config.get("text_config") or {}
        names = (found for c in (source.config, of_text) if (found := c.get("dtype") or c.get("torch_dtype")))
        if (name := next(names, "float32")) not in TYPES:
            raise CheckpointError(
                f"{source.name}: dtype in config.json is {name!r}, but must be one of {', '.join(TYPES)}; "
                "correct it there or give a dtype."
            )
        dtype = np.dtype(name)
    module = abstract(source.config, settings)
    return {leaf.path: jax.ShapeDtypeStruct(leaf.value.shape, dtype) for leaf in leaves(module)}


def _stripes(spec: jax.ShapeDtypeStruct, axis: int) -> Iterator[tuple[slice, ...]]:
    """The array in pieces along `axis`, each some megabytes that lie together in the file."""
    if not spec.shape:
        yield ()
        return
    size = spec.shape[axis]
    step = max(1, size * STRIPE_BYTES // max(1, nbytes(spec)))
    for start in range(0, size, step):
        yield (*[slice(None)] * axis, slice(start, start + step))


def _finite(x: np.ndarray) -> bool:
    wide = x if x.itemsize > 2 else x.astype(np.float32)  # NumPy is faster at both than at isfinite of a bfloat16
    return bool(np.isfinite(wide).all())


def _ahead(make: Callable, inputs: Iterable) -> Iterator:
    """make(x) for each x, the next one being made while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for x in inputs:
            made, waiting = waiting, pool.submit(make, x)
            if made is not None:
                yield made.result()
                del made
        if waiting is not None:
            yield waiting.result()


def _part_bytes(specs: Specs) -> int:
    return max(PART_BYTES, *map(nbytes, specs.values()))


def _peak(specs: Specs, source: Source | None) -> int:
    """While a part is written, the next one is being made."""
    parts = list(grouped(specs, _part_bytes(specs)))
    made = [sum(map(nbytes, part.values())) for part in parts]
    written = [size + sum(map(_chunk_bytes, part.values())) for size, part in zip(made, parts, strict=True)]
    largest = max(this + following for this, following in zip(written, [*made[1:], 0], strict=True))
    return BESIDE_BYTES + largest + (_held(source) if source else 0)


def _chunk_bytes(spec: jax.ShapeDtypeStruct) -> int:
    """What TensorStore takes to write an array in chunks: a copy of them, unless each is a run of whole rows."""
    # Orbax takes the longest axis' next smaller divisor until a chunk is small enough.
    divisors = [[d for d in range(1, size + 1) if size % d == 0] for size in spec.shape]
    itemsize = np.dtype(spec.dtype).itemsize
    while math.prod(axis[-1] for axis in divisors) * itemsize > CHUNK_BYTES:
        max(divisors, key=lambda axis: axis[-1]).pop()
    chunk = [axis[-1] for axis in divisors]
    copied = 0 if chunk[1:] == list(spec.shape[1:]) else nbytes(spec)
    return copied + CHUNK_OVERHEAD * math.prod(spec.shape) // math.prod(chunk)


def _held(source: Source) -> int:
    """Of the PyTorch file that is being read: its mapped pages, or all of it if it is too old to be mapped."""
    files = [file for file in source.files if file.suffix in pickled.SUFFIXES]
    sizes = [(file.stat().st_size, zipfile.is_zipfile(file)) for file in files]
    return max((min(size, pickled.HELD_BYTES) if mapped else size for size, mapped in sizes), default=0)


def table_hash(table: Table) -> str:
    """Tells two tables apart."""
    return hashlib.sha256(repr(table).encode()).hexdigest()[:16]
