"""Conversions whose process is killed, interrupted or out of space: the next one goes on, and makes the same."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from longvid_jax import convert
from longvid_jax.convert.target import sibling
from longvid_jax.errors import CheckpointError
from tests.convert.resuming import PART_BYTES, PARTS, assert_same, listed, resume

# `longvid convert` in small parts, in a process of its own. It says when it starts and how far it is, and stops for
# ever where the parts are merged if its first argument says "merge"; "unchecked": as if others fill the disk after it
# was found to be free.
PROGRAM = f"""
import sys
from longvid_jax import checkpoint, cli
from longvid_jax.convert import journal, write

def say(word):
    print(word, flush=True)

def stop(*_):
    say("stopped")
    sys.stdin.read()

def add(self, arrays, add=journal.Journal.add):
    add(self, arrays)
    say("part")

write.PART_BYTES = {PART_BYTES}
journal.Journal.add = add
match sys.argv.pop(1):
    case "merge":
        checkpoint.ocp.partial.finalize = stop
    case "unchecked":
        write.check_space = lambda *_: None
say("ready")
sys.stdin.readline()
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(convert.__file__).parents[2])}


@contextmanager
def conversion(source: Path, target: Path, at: str = "-") -> Iterator[subprocess.Popen]:
    """The process, which is about to convert and does not outlive the block."""
    command, pipe = [sys.executable, "-c", PROGRAM, at, str(source), str(target)], subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("\n")
            child.stdin.flush()
            yield child
        finally:
            child.kill()


def wait_for(child: subprocess.Popen, word: str, times: int = 1) -> None:
    while times:
        line = child.stdout.readline().strip()
        assert line, child.stderr.read()
        times -= line == word


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 11))])
def test_killed_at_any_moment(resumable, tmp_path, seed):
    """From before the first of its parts to after the last; the next one goes on there and makes the same."""
    (source, whole), target = resumable, tmp_path / "target"
    rng = np.random.default_rng(seed)
    times, seconds = int(rng.integers(PARTS + 1)), rng.uniform(0, 0.15)
    with conversion(source, target) as child:
        wait_for(child, "part", times)
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
    if target.exists():
        assert_same(target, whole)
    else:
        assert len(listed(target)) >= times
    resume(source, target, listed(target), overwrite=target.exists())
    assert_same(target, whole)


def test_killed_while_the_parts_are_merged(resumable, tmp_path):
    """And meanwhile nobody else may convert to the same folder."""
    (source, whole), target = resumable, tmp_path / "target"
    with conversion(source, target, "merge") as child:
        wait_for(child, "stopped")
        with pytest.raises(CheckpointError, match="another process is writing"):
            convert.to_orbax(source, target)
    assert not target.exists() and (sibling(target, "converting") / "whole").exists()
    assert resume(source, target, listed(target)) == set()
    assert_same(target, whole)


def test_interrupted(resumable, tmp_path):
    (source, whole), target = resumable, tmp_path / "target"
    with conversion(source, target) as child:
        wait_for(child, "part", 3)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate()
    assert child.returncode == 130
    kept_line, end = told.splitlines()  # and no traceback
    assert kept_line.startswith("longvid: what is finished is kept") and end == "longvid: interrupted"
    assert not target.exists()
    kept = listed(target)
    assert len(kept) >= 3
    resume(source, target, kept)
    assert_same(target, whole)


# A real one: a file system of 5 MB in memory, which only these processes see; then it grows. Where the system does not
# let us have one, no file may be larger than 600 kB, which ends in an error of the storage library, too.
REAL = """
mount -t tmpfs -o size=5m tmpfs "$1" && mkdir "$1/deeper" || exit 99
"$2" -c "$3" unchecked "$4" "$1/deeper/target" </dev/null; echo "code $?"; ls -A "$1/deeper"
mount -o remount,size=64m "$1"
"$2" -c "$3" - "$4" "$1/deeper/target" </dev/null; echo "code $?"; ls -A "$1/deeper"
cp -r "$1/deeper/target" "$1.out"
"""
LIMITED = """
mkdir "$1/deeper"
(ulimit -f 600; "$2" -c "$3" unchecked "$4" "$1/deeper/target" </dev/null); echo "code $?"; ls -A "$1/deeper"
"$2" -c "$3" - "$4" "$1/deeper/target" </dev/null; echo "code $?"; ls -A "$1/deeper"
cp -r "$1/deeper/target" "$1.out"
"""


def test_a_disk_that_gets_full(resumable, tmp_path):
    """One line, exit code 2, nothing under the name; with more space it goes on, and comes to the same end."""
    (source, whole), disk = resumable, tmp_path / "disk"
    disk.mkdir()
    own = ["unshare", "-rm", "bash", "-c"]  # mounts of its own, for anybody
    probe = [*own, 'mount -t tmpfs tmpfs "$0"', disk]
    real = shutil.which("unshare") and not subprocess.run(probe, stderr=subprocess.DEVNULL).returncode
    command = [*own, REAL] if real else ["bash", "-c", LIMITED]
    command += ["-", disk, sys.executable, PROGRAM, source]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    words = done.stdout.split()
    end = words.index("code")
    before, after = words[:end].count("part"), words[end:].count("part")
    assert words[end : end + 4] == ["code", "2", ".target.converting", "ready"]
    assert words[-3:] == ["code", "0", "target"], done.stderr
    error, *others = done.stderr.splitlines()
    cause = "the disk is full" if real else "Orbax cannot write"
    assert error.startswith(f"longvid: error: {disk}/deeper/.target.converting: {cause}")
    assert error.endswith("; mend that and start again, what is finished is kept.")
    assert len(others) == 1 and others[0].startswith("converting")  # the progress of the second
    assert before + after == PARTS and (before > 2 or not real)
    assert_same(tmp_path / "disk.out", whole)
