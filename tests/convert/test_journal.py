"""What is finished of a conversion that was stopped: kept if it is right, whatever happened to it in between."""

import errno
import json
import os
import shutil
import signal
import threading
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from longvid_jax import checkpoint as trees
from longvid_jax import convert
from longvid_jax.convert import journal as module
from longvid_jax.convert.journal import Journal, stoppable
from longvid_jax.errors import CheckpointError
from tests.convert.resuming import (
    assert_same,
    data_file,
    interrupt,
    listed,
    parts_folder,
    resume,
    to_orbax,
    turn_a_bit,
)

JOB = {"source": "there", "files": {"a": [1, 2]}, "dtype": None}
RNG = np.random.default_rng(0)
PARTS_OF_TWO = [
    {f"layers/{n:02d}/kernel": RNG.normal(size=(8, 6)).astype(dtype), f"layers/{n:02d}/bias": np.zeros(6, dtype)}
    for n, dtype in enumerate((np.float32, ml_dtypes.bfloat16, np.float16))
]
FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']\nmore"),
    shutil.Error([("a", "b", f"[Errno 28] {os.strerror(errno.ENOSPC)}: 'b'")]),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A folder with a journal of three parts, which nobody changes."""
    folder = tmp_path_factory.mktemp("journal") / "three"
    journal = Journal(folder, JOB)
    for part in PARTS_OF_TWO:
        journal.add(part)
    return folder


@pytest.fixture
def folder(three, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(three, tmp_path / "three")


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()][1:]


def assert_holds(folder: Path, numbers: list[int], journal: Journal) -> None:
    """Only these parts are listed and there, and a checkpoint of them has their values."""
    arrays = {path: array for n in numbers for path, array in PARTS_OF_TWO[n].items()}
    assert journal.checksums == {path: zlib.crc32(array.tobytes()) for path, array in arrays.items()}
    assert {entry["part"] for entry in entries(folder)} == trees.parts(folder / "params")
    assert len(entries(folder)) == len(numbers)
    assert {file.name for file in folder.iterdir()} <= {"journal.jsonl", "params.partial_save"}
    if arrays:
        journal.merge(folder / "whole")
        found = trees.restore(folder / "whole", trees.contents(folder / "whole"))
        assert {path: array.tobytes() for path, array in found.items()} == {
            path: array.tobytes() for path, array in arrays.items()
        }
        shutil.rmtree(folder / "whole")


# --- the journal ------------------------------------------------------------------------------------------------------


def test_what_is_listed_is_kept(folder):
    assert_holds(folder, [0, 1, 2], Journal(folder, JOB))
    assert_holds(folder, [0, 1, 2], Journal(folder, JOB))
    Journal(folder, JOB).remove()
    assert not folder.exists()


def test_it_goes_on(resumable, tmp_path):
    for n, part in enumerate(PARTS_OF_TWO):
        journal = Journal(tmp_path / "new", JOB)
        journal.add(part)
        assert_holds(tmp_path / "new", list(range(n + 1)), journal)


@pytest.mark.parametrize("how", ["missing", "turned"])
def test_a_part_with_any_file_damaged_is_thrown_away(three, tmp_path, how):
    part = entries(three)[1]["part"]
    files = [file for file in (trees.parts_folder(three / "params") / part).rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        folder = shutil.copytree(three, tmp_path / "copy")
        copy, content = folder / file.relative_to(three), file.read_bytes()
        if how == "missing":
            copy.unlink()
        elif content:
            turn_a_bit(copy)
        else:
            copy.write_bytes(b"more")
        assert_holds(folder, [0, 2], Journal(folder, JOB))
        shutil.rmtree(folder)


def test_values_are_compared(three, tmp_path):
    """Of a part whose data are large, its files' beginnings do not say everything."""
    journal = Journal(tmp_path / "large", JOB)
    journal.add({"large": RNG.normal(size=(1024, 1024)).astype(np.float32)})
    journal.add(PARTS_OF_TWO[0])
    turn_a_bit(data_file(trees.parts_folder(tmp_path / "large" / "params") / entries(tmp_path / "large")[0]["part"]))
    assert_holds(tmp_path / "large", [0], Journal(tmp_path / "large", JOB))


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_line_that_is_cut_off(folder, cut):
    file = folder / "journal.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    journal = Journal(folder, JOB)
    assert_holds(folder, [0, 1, 2] if cut == 1 else [0, 1], journal)  # without its end of line it is whole all the same
    if cut > 1:
        journal.add(PARTS_OF_TWO[2])
        assert_holds(folder, [0, 1, 2], Journal(folder, JOB))


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_line_that_is_none(folder, line):
    file = folder / "journal.jsonl"
    lines = file.read_text().splitlines()
    lines[line] = "\x00" * 20
    file.write_text("\n".join(lines) + "\n")
    assert_holds(folder, list(range(max(0, line - 1))), Journal(folder, JOB))


@pytest.mark.parametrize("other", [{**JOB, "dtype": "float16"}, {**JOB, "files": {"a": [1, 3]}}, {}])
def test_another_job_takes_nothing(folder, other):
    assert_holds(folder, [], Journal(folder, other))
    assert_holds(folder, [], Journal(folder, JOB))


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_without_a_list_nothing_is_kept(folder, content):
    (folder / "journal.jsonl").unlink()
    if content is not None:
        (folder / "journal.jsonl").write_text(content)
    assert_holds(folder, [], Journal(folder, JOB))


def test_what_else_a_killed_process_leaves_is_removed(folder):
    for name in ("whole", "trial", "params.partial_save.orbax-checkpoint-tmp"):
        (folder / name / "deeper").mkdir(parents=True)
    trees.add_part(folder / "params", {"not/listed": np.ones(3, np.float32)})
    assert_holds(folder, [0, 1, 2], Journal(folder, JOB))


def test_a_full_disk_costs_nothing_that_is_finished(folder, monkeypatch):
    """Neither when a part is added nor when they are verified, merged or listed anew."""

    def raises(error):
        def fails(*_):
            raise error

        return fails

    def refused(what, *arguments):
        with pytest.raises(CheckpointError, match=rf"{folder}: the disk is full; mend that and .* finished is kept\.$"):
            what(*arguments)

    journal = Journal(folder, JOB)
    for error in FULL:
        with monkeypatch.context() as patch:
            patch.setattr(trees, "add_part", raises(error))
            patch.setattr(trees, "merge", raises(error))
            refused(journal.add, {"more": np.ones(3, np.float32)})
            refused(journal.merge, folder / "whole")
            refused(Journal, folder, JOB)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(module.os, "fsync", raises(FULL[0]))
        Journal(folder, JOB)
    (folder / "journal.jsonl.new").unlink()
    assert_holds(folder, [0, 1, 2], Journal(folder, JOB))


def test_other_failures_are_named(folder, monkeypatch):
    def fails(*_):
        raise ValueError("no such luck.\nmore")

    journal = Journal(folder, JOB)
    with monkeypatch.context() as patch:
        patch.setattr(trees, "add_part", fails)
        patch.setattr(trees, "merge", fails)
        with pytest.raises(CheckpointError, match=f"{folder}: Orbax cannot write more: no such luck; mend that and"):
            journal.add({"more": np.ones(3, np.float32)})
        with pytest.raises(CheckpointError, match=f"{folder}: Orbax cannot merge the parts: no such luck; mend that"):
            journal.merge(folder / "whole")
    assert_holds(folder, [0, 1, 2], Journal(folder, JOB))


def test_stopped_while_it_verifies(folder):
    left = iter(range(2))

    def stop():
        if next(left):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Journal(folder, JOB, stop)
    assert_holds(folder, [0, 1, 2], Journal(folder, JOB))


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_its_moment():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:
        stop()
        signal.raise_signal(signal.SIGINT)
        reached = True
        stop()
        reached = False
    assert reached and signal.getsignal(signal.SIGINT) is before
    with stoppable() as stop:  # too late: all is done
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:  # a second one at once
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached = False
    assert reached and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(OSError), stoppable() as stop:  # an error goes first
        signal.raise_signal(signal.SIGINT)
        raise OSError
    assert signal.getsignal(signal.SIGINT) is before


def test_where_ctrl_c_is_not_ours():
    """In another thread than the main one, and where it is ignored."""
    before, reached = signal.getsignal(signal.SIGINT), []

    def work():
        with stoppable() as stop:
            stop()
            reached.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [before]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work()
        assert reached == [before, signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGINT, before)


# --- a conversion that goes on ----------------------------------------------------------------------------------------


def test_only_the_rest_is_written_and_needs_space(resumable, tmp_path, monkeypatch):
    (source, whole), target = resumable, tmp_path / "target"
    kept = interrupt(source, target, 4)
    usage, size = shutil.disk_usage(tmp_path), convert.needs(source).target_bytes
    rest = size - sum(int(np.prod(shape)) * 4 for entry in kept for shape in entry["shapes"].values())
    assert 0 < rest < size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=rest - 1))
    with pytest.raises(CheckpointError, match=f"{rest:,} bytes are needed and the disk of .* has {rest - 1:,} free"):
        to_orbax(source, target)
    assert listed(target) == kept
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=rest))
    finished = []
    resume(source, target, kept, progress=finished.append)
    assert finished[0] == size - rest and sum(finished) == size and len(finished) > 4
    assert_same(target, whole)


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_when_it_has_its_name(converted, tmp_path, monkeypatch, overwrite):
    """It is whole. The parts that are still there serve whoever overwrites it with the same, or are removed."""

    def stop(journal):
        raise KeyboardInterrupt

    (source, whole), target = converted("llama"), tmp_path / "target"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "remove", stop)
        to_orbax(source, target)
    kept = listed(target)
    assert len(kept) == 1
    if overwrite:
        assert resume(source, target, kept, overwrite=True) == set()
    else:
        with pytest.raises(CheckpointError, match="already exists"):
            to_orbax(source, target)
    assert_same(target, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_part_that_was_damaged_is_written_again(resumable, tmp_path):
    """A bit has turned in the data of one of four; another one has lost a file."""
    (source, whole), target = resumable, tmp_path / "target"
    first, second, third, fourth = interrupt(source, target, 4)
    turn_a_bit(data_file(parts_folder(target) / second["part"]))
    data_file(parts_folder(target) / fourth["part"]).unlink()
    assert resume(source, target, [first, third]) >= second["checksums"].keys() | fourth["checksums"].keys()
    assert_same(target, whole)


def test_parts_of_another_type(converted, tmp_path):
    """What was made for another dtype is of no use."""
    source, _ = converted("llama")
    interrupt(source, tmp_path / "target", 1)
    resume(source, tmp_path / "target", [], dtype="bfloat16")
    arrays = convert.Checkpoint(tmp_path / "target").arrays.values()
    assert {array.dtype for array in arrays} == {np.dtype(ml_dtypes.bfloat16)}


def test_parts_of_a_source_that_has_changed(checkpoints, tmp_path):
    source, target = checkpoints.make(), tmp_path / "target"
    interrupt(source, target, 1)
    content = (source / "model.safetensors").read_bytes()[:-4] + np.float32(5).tobytes()
    (source / "model.safetensors").write_bytes(content)
    resume(source, target, [])
    jax.tree.map(np.testing.assert_array_equal, *map(convert.from_huggingface, (target, source)))
