"""The benchmark gives both sides the same bytes and reports what it did; how fast they are is not tested."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from longvid_jax import cli, convert
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.evaluate import bench_convert

SMALL = ["--gigabytes", "0.02", "--layers", "8", "--repeats", "1"]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """No compiled program of a test goes to the user's cache folder."""
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_convert.add_arguments(parser)
    return parser.parse_args([*SMALL, *given])


@pytest.mark.parametrize(("dtype", "itemsize"), [([], 2), (["--dtype", "float32"], 4)])
def test_both_sides_move_the_same_bytes(tmp_path, monkeypatch, capsys, dtype, itemsize):
    moved = []

    def seen(function):
        def call(source, target, *arguments):
            result = function(source, target, *arguments)
            files = sorted(source.glob("*.safetensors"))
            moved.append((function.__name__, sum(array.nbytes for file in files for array in load_file(file).values())))
            assert len(files) > 2 and not target.exists()
            return result

        return call

    for name in ("_copy_and_read", "_convert"):
        monkeypatch.setattr(bench_convert, name, seen(getattr(bench_convert, name)))
    assert cli.main(["bench", "convert", *SMALL, *dtype, "--folder", str(tmp_path), "--json"]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out)
    assert moved == [(name, result["source_bytes"]) for name in ("_copy_and_read", "_convert")]
    assert result["source_bytes"] == 2 * result["parameters"] == pytest.approx(20e6, rel=0.1)
    assert result["target_bytes"] == itemsize * result["parameters"]
    assert result["largest_bytes"] == pytest.approx(itemsize * 0.5e6, rel=0.05)
    assert result["peak_bytes"] > 20e6
    assert result["ratio"] == result["convert_seconds"] / result["copy_seconds"]
    assert not list(tmp_path.iterdir())
    report = bench_convert.report(result)
    assert f"{result['parameters']:,} parameters in 8 layers: 0.02 GB become" in report
    assert f"{result['peak_bytes'] / 1e6:.0f} MB  above the interpreter" in report


def test_the_checkpoint(tmp_path):
    """Random numbers that do not compress, of the size and the largest tensor that were asked for; a real model."""
    folder = bench_convert.write_checkpoint(tmp_path / "made", 40_000_000, 3, 4_000_000, np.float32)
    needs = convert.needs(folder)
    assert needs.dtype == "float32"
    assert needs.source_bytes == pytest.approx(40e6, rel=0.05)
    assert needs.largest_array == "embed/embedding" and needs.largest_bytes == pytest.approx(4e6, rel=0.05)
    assert needs.arrays == 3 + 9 * 3
    packed = shutil.make_archive(str(tmp_path / "packed"), "gztar", folder)
    assert os.path.getsize(packed) > 0.7 * needs.source_bytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gigabytes", "0"], "--gigabytes is 0.0, but must be positive."),
        (["--layers", "-1"], "--layers is -1, but must be positive."),
        (["--repeats", "0"], "--repeats is 0, but must be positive."),
        (["--embedding", "-1"], "--embedding is -1.0, but must be positive and less than half of all."),
        (["--embedding", "100"], "--embedding is 100.0, but must be positive and less than half of all."),
        (["--folder", "nowhere"], "--folder is nowhere, but must be a folder that exists."),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises(OptionError) as error:
        bench_convert.run(options(*given))
    assert str(error.value) == message


def test_too_little_space(tmp_path):
    with pytest.raises(CheckpointError, match="3,000,000,000,000,000 bytes are needed"):
        bench_convert.run(options("--gigabytes", "1e6", "--folder", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails(tmp_path, monkeypatch):
    """What the other process says last is said; nothing is left."""
    monkeypatch.setattr(bench_convert, "_random", lambda rng, shape, dtype: np.full(shape, np.nan, dtype))
    with pytest.raises(CheckpointError, match=r"^the conversion failed: .*NaN or infinity.*fetch it again\.$"):
        bench_convert.run(options("--folder", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_ctrl_c(tmp_path):
    """While the other process converts: both end, and nothing is left."""
    command = [sys.executable, "-m", "longvid_jax.cli", "bench", "convert", "--gigabytes", "0.1", "--layers", "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([*command, "--folder", tmp_path], env=environment, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob("*/.converted.converting")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert said.decode().splitlines() == ["longvid: interrupted"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ["--gigabytes", "0.3"],
        ["--gigabytes", "0.3", "--dtype", "float32"],
        ["--gigabytes", "0.3", "--layers", "2", "--embedding", "60"],
    ],
    ids=["many layers", "wider type", "large arrays"],
)
def test_the_forecast_is_near_the_peak(tmp_path, given):
    result = bench_convert.run(options("--layers", "24", *given, "--folder", str(tmp_path)))
    assert abs(result["forecast_error"]) < 0.25, bench_convert.report(result)
