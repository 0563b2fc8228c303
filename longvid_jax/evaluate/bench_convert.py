"""Converting a large checkpoint: time beside copying its files and reading them once, peak memory beside the forecast."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from longvid_jax import convert
from longvid_jax.errors import OptionError

WIDTH, LARGEST = 2048, 100e6  # of the model that is made: its width and the bytes of its largest tensor
COPY_BYTES = 1 << 24

# Run by itself, so that its memory is its own: the peak above what the imports take.
PROGRAM = """
import json, sys, time
from longvid_jax import checkpoint, convert

def kilobytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

source, target = sys.argv[1:]
before, start = kilobytes("VmRSS"), time.perf_counter()
convert.to_orbax(source, target)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": 1024 * (kilobytes("VmHWM") - before)}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the checkpoint that is made (default: 2)")
    parser.add_argument("--layers", type=int, default=24, help="of its decoder (default: 24)")
    parser.add_argument("--repeats", type=int, default=2, help="turns, of which the fastest counts (default: 2)")
    parser.add_argument(
        "--folder", metavar="DIR", help="where to work, with three times the space (default: the system's)"
    )


def run(arguments: argparse.Namespace) -> dict:
    """Copies and converts in turns; returns seconds, ratio, peak and forecast."""
    if not sys.platform.startswith("linux"):
        raise OptionError("longvid bench convert reads peak memory from /proc, which only Linux has; run it there.")
    for name in ("gigabytes", "layers", "repeats"):
        if getattr(arguments, name) <= 0:
            raise OptionError(f"--{name} is {getattr(arguments, name)}, but must be positive.")
    with tempfile.TemporaryDirectory(prefix="longvid-", dir=arguments.folder) as folder:
        source = write_checkpoint(Path(folder) / "source", int(arguments.gigabytes * 1e9), arguments.layers)
        forecast = convert.needs(source)
        copies, conversions = [], []
        for _ in range(arguments.repeats):
            copies.append(_copy_and_read(source, Path(folder) / "copy"))
            conversions.append(_convert(source, Path(folder) / "converted"))
    fastest = min(conversions, key=lambda turn: turn["seconds"])
    return {
        "bytes": forecast.source_bytes,
        "layers": arguments.layers,
        "largest_bytes": forecast.largest_bytes,
        "copy_seconds": min(copies),
        "convert_seconds": fastest["seconds"],
        "ratio": fastest["seconds"] / min(copies),
        "peak_bytes": max(turn["peak_bytes"] for turn in conversions),
        "forecast_bytes": forecast.peak_bytes,
    }


def report(result: dict) -> str:
    return (
        f"{result['bytes'] / 1e9:.2f} GB in {result['layers']} layers, largest tensor {result['largest_bytes'] / 1e6:.0f} MB\n"
        f"copying and reading once  {result['copy_seconds']:6.1f} s\n"
        f"converting to Orbax       {result['convert_seconds']:6.1f} s   {result['ratio']:.2f} times as long\n"
        f"peak memory               {result['peak_bytes'] / 1e6:6.0f} MB  above the interpreter with its imports\n"
        f"forecast by --dry-run     {result['forecast_bytes'] / 1e6:6.0f} MB  "
        f"{result['forecast_bytes'] / result['peak_bytes'] - 1:+.0%}"
    )


def write_checkpoint(folder: Path, size: int, layers: int) -> Path:
    """A Llama of about `size` bytes of random bfloat16, in several files of at most a quarter each."""
    vocabulary = int(LARGEST / 2 / WIDTH)
    per_layer = (size / 2 - 2 * vocabulary * WIDTH) / layers
    hidden = max(64, int((per_layer - 4 * WIDTH**2) / (3 * WIDTH)))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return convert.write_random(folder, config, max_shard_bytes=size // 4)


def _copy_and_read(source: Path, copy: Path) -> float:
    """What no conversion can do without: every byte read, written to the disk and read again."""
    start = time.perf_counter()
    shutil.copytree(source, copy)
    for file in copy.iterdir():
        with open(file, "rb+", buffering=0) as stream:
            os.fsync(stream.fileno())
            while stream.read(COPY_BYTES):
                pass
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def _convert(source: Path, target: Path) -> dict:
    command = [sys.executable, "-c", PROGRAM, str(source), str(target)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise OptionError(f"the conversion failed: {done.stderr.strip().splitlines()[-1]}")
    shutil.rmtree(target)
    return json.loads(done.stdout.splitlines()[-1])
