"""Converting a large checkpoint: time beside copying its files and reading them, peak memory beside the forecast."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console

from longvid_jax import convert
from longvid_jax.convert.modules import abstract
from longvid_jax.convert.target import check_space
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models.llama import DecoderConfig
from longvid_jax.models.paths import leaves

HEADS = 8
DTYPES = ("float32", "bfloat16", "float16")
READ_BYTES = 1 << 24

# Run by itself, so that its memory is its own: the peak above what the imports take.
PROGRAM = """
import json, sys, time
from longvid_jax import convert

def kilobytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

source, target, dtype = sys.argv[1:]
before, start = kilobytes("VmRSS"), time.perf_counter()
convert.to_orbax(source, target, dtype=dtype or None)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": 1024 * (kilobytes("VmHWM") - before)}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `longvid bench convert`."""
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the checkpoint that is made (default: 2)")
    parser.add_argument("--layers", type=int, default=24, help="of its decoder (default: 24)")
    parser.add_argument("--embedding", type=float, metavar="MB", help="its largest tensor (default: a 20th of all)")
    parser.add_argument("--dtype", choices=DTYPES, help="to convert to (default: bfloat16, as it is made)")
    parser.add_argument("--repeats", type=int, default=2, help="turns, of which the fastest counts (default: 2)")
    parser.add_argument("--folder", metavar="DIR", help="where to work, on a disk with three times the size free")


def run(arguments: argparse.Namespace) -> dict:
    """Copies and converts in turns; returns plain values, ready for JSON. Raises OptionError for what cannot be run."""
    if not sys.platform.startswith("linux"):
        raise OptionError("longvid bench convert reads peak memory from /proc, which only Linux has; run it there.")
    for name in ("gigabytes", "layers", "repeats"):
        if getattr(arguments, name) <= 0:
            raise OptionError(f"--{name} is {getattr(arguments, name)}, but must be positive.")
    size, parent = int(arguments.gigabytes * 1e9), Path(arguments.folder or tempfile.gettempdir())
    embedding = size // 20 if arguments.embedding is None else int(arguments.embedding * 1e6)
    if not 0 < embedding < size / 2:
        raise OptionError(f"--embedding is {arguments.embedding}, but must be positive and less than half of all.")
    if not parent.is_dir():
        raise OptionError(f"--folder is {parent}, but must be a folder that exists.")
    check_space(parent, 3 * size)
    with tempfile.TemporaryDirectory(prefix="longvid-", dir=parent) as folder, _status() as status:
        status.update("making the checkpoint")
        source = write_checkpoint(Path(folder) / "source", size, arguments.layers, embedding)
        forecast = convert.needs(source, dtype=arguments.dtype)
        copies, conversions = [], []
        for turn in range(1, arguments.repeats + 1):
            status.update(f"copying, turn {turn} of {arguments.repeats}")
            copies.append(_copy_and_read(source, Path(folder) / "copy"))
            status.update(f"converting, turn {turn} of {arguments.repeats}")
            conversions.append(_convert(source, Path(folder) / "converted", arguments.dtype))
    fastest, peak = min(turn["seconds"] for turn in conversions), max(turn["peak_bytes"] for turn in conversions)
    return {
        "parameters": forecast.parameters,
        "layers": arguments.layers,
        "dtype": forecast.dtype,
        "source_bytes": forecast.source_bytes,
        "target_bytes": forecast.target_bytes,
        "largest_bytes": forecast.largest_bytes,
        "repeats": arguments.repeats,
        "copy_seconds": min(copies),
        "convert_seconds": fastest,
        "ratio": fastest / min(copies),
        "peak_bytes": peak,
        "forecast_bytes": forecast.peak_bytes,
        "forecast_error": forecast.peak_bytes / peak - 1,
    }


def report(result: dict) -> str:
    """The result of `run` as text."""
    return (
        f"random Llama, {result['parameters']:,} parameters in {result['layers']} layers: "
        f"{result['source_bytes'] / 1e9:.2f} GB become {result['target_bytes'] / 1e9:.2f} GB in {result['dtype']}, "
        f"the largest array {result['largest_bytes'] / 1e6:.0f} MB; fastest of {result['repeats']}\n"
        f"copying and reading once {result['copy_seconds']:7.1f} s\n"
        f"converting to Orbax      {result['convert_seconds']:7.1f} s   {result['ratio']:.2f} times as long\n"
        f"peak memory              {result['peak_bytes'] / 1e6:7.0f} MB  above the interpreter with its imports\n"
        f"forecast by --dry-run    {result['forecast_bytes'] / 1e6:7.0f} MB  {result['forecast_error']:+.0%}"
    )


def write_checkpoint(folder: Path, size: int, layers: int, embedding: int, dtype=ml_dtypes.bfloat16) -> Path:
    """A Llama of about `size` bytes of random numbers, `embedding` of them in that, in several files; the folder."""
    itemsize = np.dtype(dtype).itemsize
    per_layer = (size - 2 * embedding) / itemsize / layers
    width = _even(math.sqrt(per_layer / 12))  # 4 w^2 in attention, about 8 w^2 in the MLP
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": _even((per_layer - 4 * width**2) / (3 * width)),
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": _even(embedding / itemsize / width),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    rng = np.random.default_rng(0)
    module = abstract(config, DecoderConfig.from_huggingface(config))
    parts = {
        leaf.path: convert.Part(leaf.value.shape, np.dtype(dtype), partial(_random, rng, leaf.value.shape, dtype))
        for leaf in leaves(module)
    }
    return convert.write_huggingface(parts, config, folder, convert.table_for(config), max_shard_bytes=size // 4)


def _even(size: float) -> int:
    """About this size, and divisible as those of published models are."""
    return max(1, int(size / 64)) * 64


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    return rng.random(shape, np.float32).astype(dtype)


def _status():
    """What is being done, on standard error if that is a terminal."""
    return Console(stderr=True).status("", refresh_per_second=4)


def _copy_and_read(source: Path, copy: Path) -> float:
    """Seconds of what no conversion can do without: every byte is read, written to the disk and read again."""
    start = time.perf_counter()
    shutil.copytree(source, copy)
    for file in copy.iterdir():
        with open(file, "rb+", buffering=0) as stream:
            os.fsync(stream.fileno())
            while stream.read(READ_BYTES):
                pass
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def _convert(source: Path, target: Path, dtype: str | None) -> dict:
    """Seconds and peak memory of a conversion, by a process that does nothing else and does not outlive this call."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(target), dtype or ""]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            out, faults = process.communicate()
        finally:
            process.kill()
            process.wait()  # or it would still write where all is being removed
    if process.returncode:
        cause = (faults.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise CheckpointError(f"the conversion failed: {cause.rstrip('.')}.")
    shutil.rmtree(target)
    return json.loads(out.splitlines()[-1])
