"""Folders that get their names once they are whole."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longvid_jax.convert import target as target_module
from longvid_jax.convert.target import check_space, check_target, locked, put_in_place, sibling, written
from longvid_jax.errors import CheckpointError


def ours(folder: Path) -> bool:
    return (folder / "ours").exists()


def make(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "ours").write_text(content)
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_one_process_at_a_time_and_no_lock_is_left(tmp_path):
    target = tmp_path / "new" / "model"
    with locked(target):
        with pytest.raises(CheckpointError, match=f"another process is writing {re.escape(str(target))}"):
            with locked(target):
                pass
        with locked(tmp_path / "new" / "other"):
            pass
        assert [path.name for path in target.parent.iterdir()] == [".model.lock"]
    with locked(target):
        pass
    assert list(target.parent.iterdir()) == []


def test_a_link_is_the_folder_that_it_leads_to(tmp_path):
    make(tmp_path / "disk" / "model", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    with locked(tmp_path / "disk" / "model"), pytest.raises(CheckpointError, match="another process"):
        with locked(tmp_path / "link"):
            pass
    with written(tmp_path / "link", 0, True, ours) as unfinished:
        (unfinished / "ours").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "disk") == {"model/ours": "new"}


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written .*give another target"):
        with locked(tmp_path / "file" / "model"):
            pass


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"the disk of {re.escape(str(tmp_path / 'model'))} is full"):
        with locked(tmp_path / "model"):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError):
        with locked(tmp_path / "model"):
            raise PermissionError(errno.EACCES, "Permission denied")
    assert list(tmp_path.iterdir()) == []


def test_what_may_become_the_target(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (make(tmp_path / "foreign", "") / "ours").rename(tmp_path / "foreign" / "theirs")
    model = make(tmp_path / "model", "")
    for overwrite in (False, True):
        check_target(tmp_path / "absent", overwrite, ours)
        check_target(tmp_path / "empty", overwrite, ours)
        with pytest.raises(CheckpointError, match="is a file"):
            check_target(tmp_path / "file", overwrite, ours)
        with pytest.raises(CheckpointError, match="mount point"):
            check_target(Path("/"), overwrite, ours)
    check_target(model, True, ours)
    with pytest.raises(CheckpointError, match="already exists and is not empty; give --overwrite .* another target"):
        check_target(model, False, ours)
    with pytest.raises(CheckpointError, match="holds something else than what would replace it"):
        check_target(tmp_path / "foreign", True, ours)


def test_space(tmp_path):
    check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(CheckpointError, match=r"1,000,000,000,000,000,000 bytes are needed .* has [\d,]+ free"):
        check_space(tmp_path / "not" / "there", 10**18)


@pytest.mark.parametrize("before", ["absent", "empty", "model"])
def test_a_whole_folder_gets_its_name(tmp_path, before):
    target = tmp_path / "model"
    if before != "absent":
        target.mkdir()
    if before == "model":
        (target / "ours").write_text("old")
        (target / "more").write_text("old")
    with locked(target):
        put_in_place(make(sibling(target, "work") / "whole", "new"), target, before == "model")
    assert tree(tmp_path) == {"model/ours": "new"}


def test_what_came_in_between_is_left_alone(tmp_path):
    target, unfinished = make(tmp_path / "model", "theirs"), make(tmp_path / ".model.work", "new")
    with locked(target), pytest.raises(CheckpointError, match="came to be while it was written"):
        put_in_place(unfinished, target, False)
    assert tree(tmp_path) == {"model/ours": "theirs", ".model.work/ours": "new"}


def test_the_old_model_is_back_if_the_new_one_cannot_be_renamed(tmp_path):
    target = make(tmp_path / "model", "old")
    with locked(target), pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "absent", target, True)
    assert tree(tmp_path) == {"model/ours": "old"}


@pytest.mark.parametrize("between", ["absent", "empty"])
def test_the_next_one_ends_a_replacement_that_was_killed(tmp_path, between):
    target = tmp_path / "model"
    make(sibling(target, "replaced"), "old")
    make(sibling(target, "converting"), "new")
    if between == "empty":
        target.mkdir()
    with locked(target):
        assert tree(target) == {"ours": "old"}
    assert tree(tmp_path) == {"model/ours": "old", ".model.converting/ours": "new"}
    make(sibling(target, "replaced"), "older")  # killed after the second rename
    make(sibling(target, "discarded"), "oldest")  # killed while it was removed
    with locked(target):
        pass
    assert tree(tmp_path) == {"model/ours": "old", ".model.converting/ours": "new"}


@pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt(), CheckpointError("wrong")])
def test_nothing_is_left_of_what_fails(tmp_path, error):
    make(tmp_path / "model", "old")
    make(tmp_path / ".model.exporting", "of a process that was killed")
    make(tmp_path / ".model.more.exporting", "of one that writes to model.more")
    with pytest.raises(type(error)):
        with written(tmp_path / "model", 0, True, ours) as unfinished:
            assert list(unfinished.iterdir()) == []
            make(unfinished / "deeper", "half")
            raise error
    assert tree(tmp_path) == {
        "model/ours": "old",
        ".model.more.exporting/ours": "of one that writes to model.more",
    }


# Replaces a folder again and again, each time stopped at the next thing that it does to the file system: by Ctrl-C; or
# killed, and then the next one writes there, or mends it, or does so after somebody removed what had the name.
STOPPED = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from longvid_jax.convert.target import locked, written

top, case = Path(sys.argv[1]), sys.argv[2]
target, files = top / "model", ["a", "b", "deeper/c"]

def write(content):
    with written(target, 0, True, lambda there: (there / "a").exists()) as unfinished:
        (unfinished / "deeper").mkdir()
        for name in files:
            (unfinished / name).write_text(content)

def version():
    if not target.exists():
        return "nothing"
    contents = [(target / name).read_text() if (target / name).exists() else "absent" for name in files]
    return contents[0] if len(set(contents)) == 1 else "damaged"

def write_stopped_at(number):
    left = itertools.count(number, -1)
    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(left) == 0:
            if case == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    write("new")

for number in itertools.count():
    shutil.rmtree(top, ignore_errors=True)
    write("old")
    child = os.fork()
    if not child:
        try:
            write_stopped_at(number)
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or (status == 256 if case == "interrupt" else status == signal.SIGKILL), status
    found, left = version(), set(os.listdir(top))
    if case == "interrupt":
        assert left <= {"model", ".model.lock"}, left
    elif case == "write":
        write("newest")
        assert os.listdir(top) == ["model"], os.listdir(top)
    else:
        if case == "remove":
            shutil.rmtree(target, ignore_errors=True)
        with locked(target):
            pass
        assert set(os.listdir(top)) <= {"model", ".model.exporting"}, os.listdir(top)
    print(found, version())
    if status == 0:
        break
"""


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("interrupt", ["old old", "new new"]),
        ("write", ["old newest", "nothing newest", "new newest"]),
        ("mend", ["old old", "nothing old", "new new"]),
        ("remove", ["old nothing", "nothing old", "new old", "new nothing"]),
    ],
)
def test_a_stop_at_any_moment_leaves_something_whole_or_nothing(tmp_path, case, expected):
    environment = {**os.environ, "PYTHONPATH": str(Path(target_module.__file__).parents[2])}
    command = [sys.executable, "-c", STOPPED, tmp_path / "top", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(dict.fromkeys(done.stdout.splitlines())) == expected
