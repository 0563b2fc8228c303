"""Trees of arrays on disk, by Orbax: the only file that knows it.

A tree is a flat dict from paths such as `text/layers/03/mlp/up/kernel` to arrays; on disk each `/` is a level of plain
nested dicts with string keys. Errors are Orbax's and the system's own: callers know the words for theirs.
"""

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

CHUNK_BYTES = 1 << 24  # stored pieces of an array: a device that needs a slice reads no more than its pieces
PART = ".partial_save"  # Orbax's name for a folder of parts that are not merged yet
UNFINISHED = ".orbax-checkpoint-tmp"  # in its name of a folder that is not a whole checkpoint yet
SMALL = 1 << 20
ORBAX = Path(ocp.__file__).parents[2]
MARK = "orbax.checkpoint"  # a file in every checkpoint; by Orbax's own test nearly any folder is one


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a whole checkpoint of Orbax."""
    return (folder / MARK).is_file()


def save(folder: Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Writes a whole tree; `folder` must be absent."""
    with _silent():
        ocp.save(folder, unflatten_dict(dict(arrays), sep="/"))


def add_part(folder: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes some arrays of the tree that will be `folder` once it is merged; returns the part's name.

    They must not change meanwhile. The data are on the disk, and not just in its cache, on return.
    """
    before = parts(folder)
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and it takes five times as long
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    with context, _silent():
        ocp.partial.save(folder, unflatten_dict({path: x.view(_Still) for path, x in arrays.items()}, sep="/"))
    (name,) = parts(folder) - before
    return name


class _Still(np.ndarray):
    """An array that nobody changes, of which Orbax need not make a copy before it writes."""

    def __deepcopy__(self, memo):
        return self


def parts(folder: Path) -> set[str]:
    """Names of the parts that were written of `folder`, whole or not."""
    return {entry.name for entry in parts_folder(folder).glob("*")}


def remove_part(folder: Path, name: str) -> None:
    shutil.rmtree(parts_folder(folder) / name)


def merge(folder: Path, names: Iterable[str], target: Path) -> None:
    """Makes the checkpoint `target` of the named parts of `folder`, which stay as they are; `target` must be absent.

    Large files are linked, not copied, where the file system can.
    """
    for name in names:
        shutil.copytree(parts_folder(folder) / name, parts_folder(target) / name, copy_function=_link)
    with _silent():
        ocp.partial.finalize(target)


def contents(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a checkpoint, by path."""
    with _silent():
        tree = ocp.metadata(folder).metadata
    if tree is None:  # whatever it was that Orbax could not read
        raise ValueError("its metadata are damaged")
    tree = flatten_dict(tree, sep="/")
    return {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in tree.items()}


def restore(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array | np.ndarray]:
    """The wanted arrays of a checkpoint, in the wanted dtypes and shardings; NumPy arrays where none is given.

    LookupError for a path that it does not have, ValueError for another shape.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    abstract = {
        path: np.broadcast_to(np.zeros((), spec.dtype), spec.shape) if spec.sharding is None else spec
        for path, spec in wanted.items()
    }
    with context, _silent():
        arrays = flatten_dict(ocp.load(folder, unflatten_dict(abstract, sep="/")), sep="/")
    for path, spec in wanted.items():
        # Orbax gives back what it was given for a path that it does not have, and any shape for a NumPy array.
        if arrays[path] is abstract[path]:
            raise LookupError(f"{path} is not in it")
        if arrays[path].shape != spec.shape:
            raise ValueError(f"{path} has the shape {list(arrays[path].shape)}, not {list(spec.shape)}")
    return arrays


class Series:
    """The checkpoints of a training run: `folder/STEP`, written while the run goes on, named so once they are whole.

    Kept are the last `keep_last` and of those that have a score the best `keep_best`. What a killed process left
    unfinished is removed; `.unfinished` are its steps.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int):
        self.unfinished = sorted({int(path.name.split(".")[0]) for path in folder.glob(f"[0-9]*{UNFINISHED}*")})
        self._saving = None
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep_last)]
        if keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda about: about["score"], n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        with _silent():
            self._checkpointer = ocp.training.Checkpointer(
                folder.absolute(),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )

    def scores(self) -> dict[int, float | None]:
        """Of each checkpoint, by step, ascending."""
        checkpoints = self._checkpointer.checkpoints
        return {c.step: c.metrics["score"] if c.metrics else None for c in checkpoints}

    def save(self, step: int, arrays: Mapping[str, jax.Array], about: dict, score: float | None = None) -> None:
        """Starts to save, once the last checkpoint is written; the arrays may change on return. about: JSON."""
        with _silent():
            self._saving = self._checkpointer.save_async(
                step,
                unflatten_dict(dict(arrays), sep="/"),
                force=True,
                metrics=None if score is None else {"score": score},
                custom_metadata=about,
            )

    def restore(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, jax.Array]:
        """The arrays of a checkpoint in the wanted shardings, of which there must be one for each; None: as saved."""
        abstract = None if wanted is None else unflatten_dict(dict(wanted), sep="/")
        with _silent():
            return flatten_dict(self._checkpointer.load(step, abstract), sep="/")

    def delete(self, step: int) -> None:
        with _silent():
            self._checkpointer.delete(step)

    def wait(self) -> None:
        """Until what was last saved is written."""
        if self._saving is not None:
            with _silent():
                self._saving.result()

    def close(self) -> None:
        """Waits, and makes an end."""
        with _silent():
            self._checkpointer.close()


def parts_folder(folder: Path) -> Path:
    """Where the parts of `folder` lie until they are merged."""
    return folder.with_name(folder.name + PART)


@contextmanager
def _silent() -> Iterator[None]:
    """What goes wrong is raised; Orbax logs it besides, once for each of its threads, with their tracebacks."""
    _silence_stragglers()
    loggers = logging.getLogger(), logging.getLogger("absl")
    for logger in loggers:
        logger.addFilter(_is_not_of_orbax)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return ORBAX not in Path(record.pathname).parents


@cache
def _silence_stragglers() -> None:
    """From now on: what was still being read or written when Orbax gave up has nobody left to tell its end."""
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        frames = traceback.walk_tb(unraisable.exc_traceback)
        of_orbax = any(ORBAX in Path(frame.f_code.co_filename).parents for frame, _ in frames)
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    signs = "tensorstore_spec", str(ORBAX)
    logging.getLogger("asyncio").addFilter(lambda record: not any(sign in record.getMessage() for sign in signs))


def can_link(folder: Path) -> bool:
    """Whether files in the folder can have a second name; else merging copies them."""
    first, second = folder / ".link", folder / ".linked"
    first.touch()
    try:
        os.link(first, second)
        second.unlink()
    except OSError:
        return False
    finally:
        first.unlink()
    return True


def _link(source: str, target: str) -> None:
    # Small files are metadata, which merging rewrites in place.
    if os.path.getsize(source) < SMALL:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
