"""A folder that gets its name only once it is whole: written under another name beside it, renamed at the end.

Beside the target NAME may lie, all of them hidden:
  .NAME.lock       while a process writes to the target; the system unlocks it when that process ends, however it ends
  .NAME.exporting  what `written` makes; of a process that was killed, the next `written` removes it
  .NAME.replaced   the model that had the name before, from the first of the two renames that replace it to the second
  .NAME.discarded  the same model after the second rename, while it is being removed
Whoever locks the target next puts right what a killed process left of the last two: see `put_in_place`.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from longvid_jax.errors import CheckpointError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def sibling(target: Path, suffix: str) -> Path:
    """The hidden path beside the target that has this suffix."""
    return target.with_name(f".{target.name}.{suffix}")


@contextmanager
def locked(folder: str | Path) -> Iterator[Path]:
    """Only this process writes to `folder` within; gives its absolute path without links, which the others here take.

    Makes the folders above it, and mends what a killed process left (see `put_in_place`). Raises CheckpointError if
    another process holds the lock, if nothing can be written there, or if the disk gets full within.
    """
    target = Path(folder).expanduser().resolve()
    lock = FileLock(sibling(target, "lock"), blocking=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"another process is writing {target}; wait for it or give another target.") from None
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error}); give another target.") from error
    try:
        _mend(target)
        try:
            yield target
        finally:
            _mend(target)  # if put_in_place was interrupted
    except OSError as error:
        if error.errno in DISK_FULL:
            raise CheckpointError(f"the disk of {target} is full; free space on it or give another target.") from error
        raise
    finally:
        _unlock(lock)


@contextmanager
def written(folder: str | Path, needed_bytes: int, overwrite: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty folder to write in, which becomes `folder` when the block ends and is removed if it fails.

    Raises CheckpointError as `locked`, `check_target` and `check_space` do, before anything is written.
    """
    with locked(folder) as target:
        check_target(target, overwrite, is_ours)
        unfinished = sibling(target, "exporting")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: it had the lock that we have
        check_space(target.parent, needed_bytes)
        try:
            unfinished.mkdir()
            yield unfinished
            put_in_place(unfinished, target, overwrite)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def check_target(target: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raises CheckpointError unless `target` is absent, empty, or to be overwritten and `is_ours`."""
    if target == Path.cwd():
        raise CheckpointError(f"{target} is the current folder, which cannot be renamed to; give a folder inside it.")
    if target.is_mount():
        raise CheckpointError(f"{target} is a mount point, which cannot be renamed to; give a folder inside it.")
    if _is_free(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder that does not exist yet.")
    if not overwrite:
        raise CheckpointError(
            f"{target} already exists and is not empty; give --overwrite to replace it, or another target."
        )
    if not is_ours(target):
        raise CheckpointError(
            f"{target} holds something else than what would replace it; remove it or give another target."
        )


def check_apart(source: str | Path, target: str | Path) -> None:
    """Raises CheckpointError if the source lies within the target, which would be replaced with it in it."""
    source, target = Path(source).expanduser().resolve(), Path(target).expanduser().resolve()
    if source.is_relative_to(target):
        raise CheckpointError(f"{source} lies within {target}, which would be replaced; give another target.")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises CheckpointError unless that many bytes are free where `folder` is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed_bytes > free:
        raise CheckpointError(
            f"{needed_bytes:,} bytes are needed and the disk of {folder} has {free:,} free; "
            "free space on it or give another target."
        )


def put_in_place(unfinished: Path, target: Path, overwrite: bool) -> None:
    """Renames a whole folder to `target`, after all its files are on the disk; only within `locked(target)`.

    An absent or empty target takes one rename. A model that is overwritten is renamed aside first and removed after
    the second rename; a process that is killed between the two leaves nothing under the name, the old model whole as
    `.NAME.replaced` and the new one whole where it was, and the next `locked(target)` gives the old one its name back.
    If it is killed later, the new model has the name and the next `locked(target)` removes what is left of the old.
    Raises CheckpointError, and leaves both folders as they are, if something is there that is not to be overwritten.
    """
    _sync(unfinished)
    try:
        if overwrite and not _is_free(target):
            os.rename(target, sibling(target, "replaced"))
        os.rename(unfinished, target)
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise CheckpointError(f"{target} came to be while it was written; give another target.") from error
        raise
    finally:
        _mend(target)


def _unlock(lock: FileLock) -> None:
    try:
        if isinstance(lock, FileLock):  # filelock makes it of another class where the file system has no locks
            with suppress(OSError):
                os.unlink(lock.lock_file)  # while locked: who opened it meanwhile sees that it is gone, and tries anew
    finally:
        lock.release()


def _mend(target: Path) -> None:
    """Ends a replacement: the old model goes back if its name is free, else it is removed."""
    replaced, discarded = sibling(target, "replaced"), sibling(target, "discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    if not replaced.exists():
        return
    if _is_free(target):
        os.rename(replaced, target)
    else:
        os.rename(replaced, discarded)  # first, lest half of it should ever go back
        shutil.rmtree(discarded, ignore_errors=True)


def _is_free(target: Path) -> bool:
    """Whether a folder can be renamed to `target`: there is nothing, or an empty folder."""
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _sync(folder: Path) -> None:
    """Waits until all of the folder is on the disk, and not just in its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
