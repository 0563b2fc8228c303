"""Work that may be interrupted: the parts of a checkpoint that are on the disk, and the proof that they are right."""

import json
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from longvid_jax import checkpoint
from longvid_jax.convert.folder import PARAMS, checksum, first_line
from longvid_jax.errors import CheckpointError

NAME = "journal.jsonl"
BEGINNING = 1 << 20
DISK_FULL = ("No space left on device", "Disk quota exceeded")


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Within it Ctrl-C takes effect where the function that this gives is called; a second one at once.

    In the midst of Orbax's work KeyboardInterrupt may end one of its threads and leave the others writing, or get lost.
    """
    before, pressed = signal.getsignal(signal.SIGINT), []

    def stop() -> None:
        if pressed:
            raise KeyboardInterrupt

    def press(*_) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield stop  # it is ignored, or another thread's to handle
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class Journal:
    """A folder with parts of a checkpoint and a file that lists them, each with the checksums of its arrays.

    `.checksums`, by canonical path, are of what is there. A part is listed after Orbax has it on the disk; one that is
    not listed, or whose arrays are not what the list says, was being written when the work was interrupted and is
    thrown away at the next start. Parts that were made for another `job` are thrown away, too.
    """

    def __init__(self, folder: Path, job: dict, between: Callable[[], None] = lambda: None):
        """between: called before each part is verified."""
        self.folder, self.checksums, self._parts = folder, {}, []
        lines = _lines(folder / NAME)
        known = lines[1:] if lines and lines[0] == job else []
        if not known:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in known if not between() and self._is_whole(entry)]
        self._drop_all_but({entry["part"] for entry in kept})
        with open(folder / f"{NAME}.new", "w", encoding="utf-8") as stream:
            _write([job, *kept], stream)
        os.replace(stream.name, folder / NAME)  # the old list stays whole until the new one is
        for entry in kept:
            self._list(entry)

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a part and lists it; CheckpointError if it cannot be written, which leaves what is listed as it is."""
        checksums = {path: checksum(array) for path, array in arrays.items()}
        dtypes = {path: array.dtype.name for path, array in arrays.items()}
        try:
            part = checkpoint.add_part(self.folder / PARAMS, arrays)
        except Exception as error:  # Orbax passes on what its storage library and the system raise
            raise self._failure(f"Orbax cannot write {next(iter(arrays))}", error) from error
        shapes = {path: list(array.shape) for path, array in arrays.items()}
        files = _files(checkpoint.parts_folder(self.folder / PARAMS) / part)
        entry = {"part": part, "checksums": checksums, "dtypes": dtypes, "shapes": shapes, "files": files}
        with open(self.folder / NAME, "a", encoding="utf-8") as stream:
            _write([entry], stream)
        self._list(entry)

    def merge(self, target: Path) -> None:
        """Makes the checkpoint `target` of all parts; CheckpointError if it cannot be written."""
        try:
            checkpoint.merge(self.folder / PARAMS, self._parts, target)
        except Exception as error:
            raise self._failure("Orbax cannot merge the parts", error) from error

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _is_whole(self, entry: dict) -> bool:
        """Whether a part's files are all there, and its arrays have the checksums of the list."""
        if _files(checkpoint.parts_folder(self.folder / PARAMS) / entry["part"]) != entry.get("files"):
            return False
        trial = self.folder / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir()
        try:
            checkpoint.merge(self.folder / PARAMS, [entry["part"]], trial / PARAMS)
            for path, expected in entry["checksums"].items():
                spec = jax.ShapeDtypeStruct(tuple(entry["shapes"][path]), np.dtype(entry["dtypes"][path]))
                if checksum(checkpoint.restore(trial / PARAMS, {path: spec})[path]) != expected:
                    return False
        except Exception as error:  # whatever keeps it from being read, it is written again
            if _is_of_a_full_disk(error):
                raise self._failure("", error) from error
            return False
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        return True

    def _drop_all_but(self, parts: set[str]) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir() and entry != checkpoint.parts_folder(self.folder / PARAMS):
                shutil.rmtree(entry)
        for part in checkpoint.parts(self.folder / PARAMS) - parts:
            checkpoint.remove_part(self.folder / PARAMS, part)

    def _list(self, entry: dict) -> None:
        self._parts.append(entry["part"])
        self.checksums.update(entry["checksums"])

    def _failure(self, what: str, error: Exception) -> CheckpointError:
        cause = "the disk is full" if _is_of_a_full_disk(error) else f"{what}: {first_line(error)}"
        return CheckpointError(f"{self.folder}: {cause}; mend that and start again, what is finished is kept.")


def _is_of_a_full_disk(error: Exception) -> bool:
    return any(sign in str(error) for sign in DISK_FULL)


def _files(folder: Path) -> dict[str, list[int]]:
    """Of each file below the folder the size, and the checksum of its beginning: metadata are no longer than that.

    Orbax reads a part with some of them damaged, which it cannot merge with others.
    """
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as stream:
            found[file.relative_to(folder).as_posix()] = [file.stat().st_size, zlib.crc32(stream.read(BEGINNING))]
    return found


def _write(entries: list[dict], stream: TextIO) -> None:
    stream.writelines(json.dumps(entry) + "\n" for entry in entries)
    stream.flush()
    os.fsync(stream.fileno())


def _lines(file: Path) -> list[dict]:
    """The entries of a journal up to the first that is cut off; none where there is no journal."""
    entries = []
    try:
        with open(file, encoding="utf-8") as stream:
            for line in stream:
                entries.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return entries
