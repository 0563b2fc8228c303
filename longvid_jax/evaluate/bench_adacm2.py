"""Frames a second of AdaCM2's memory cycle, and from pixels to an answer, beside the same written naively in PyTorch.

The latter only where there is torch. Everything runs on the same random weights and frames, in turns within one
process; the median of the turns counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longvid_jax import convert
from longvid_jax.convert.settings import Settings
from longvid_jax.errors import OptionError
from longvid_jax.evaluate.turns import turns
from longvid_jax.memory import adacm2
from longvid_jax.models.instructblip import InstructBlip
from longvid_jax.systems import adacm2_steps as steps
from longvid_jax.systems.adacm2 import WINDOW, AdaCM2, AdaCM2Model
from longvid_jax.systems.loading import default_dtype
from longvid_jax.train.initial import scaled

QUERIES, IMAGE = 32, 300  # query tokens, and the token whose place they take in a prompt
TEXT = {"model_type": "llama", "vocab_size": 512, "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None}


def _sizes(layers: int, width: int, heads: int, hidden: int) -> dict:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (layers, width, heads, hidden), strict=True))


SIZES = {  # the towers of a config.json
    "quick": {
        "vision_config": {**_sizes(1, 32, 2, 32), "image_size": 28},
        "qformer_config": {**_sizes(3, 32, 2, 32), "vocab_size": 300, "max_position_embeddings": 64},
        "text_config": {**TEXT, **_sizes(1, 32, 2, 32)},
    },
    "small": {
        "vision_config": {**_sizes(4, 256, 4, 1024), "image_size": 112},
        "qformer_config": {**_sizes(6, 256, 4, 1024), "vocab_size": 1000},
        "text_config": {**TEXT, **_sizes(4, 256, 4, 1024)},
    },
    "full": {  # InstructBLIP's own, but for the decoder, of which there are two layers
        "vision_config": {},
        "qformer_config": {},
        "text_config": {**TEXT, **_sizes(2, 4096, 32, 11008)},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `longvid bench adacm2`."""
    parser.add_argument(
        "--size",
        choices=tuple(SIZES)[1:],
        default="small",
        help="of the random model: a Q-Former 256 wide, or InstructBLIP's",
    )
    parser.add_argument("--frames", type=int, default=256, help="of the video (default: 256)")
    parser.add_argument("--alpha", type=float, default=0.1, help="(default: 0.1)")
    parser.add_argument("--beta", type=float, default=0.1, help="(default: 0.1)")
    parser.add_argument("--words", type=int, default=12, help="tokens of the question (default: 12)")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to decode (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the median counts (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")


def run(arguments: argparse.Namespace) -> dict:
    """Measures; returns plain values, ready for JSON. Raises OptionError for what cannot be run."""
    if arguments.frames < WINDOW or arguments.frames % WINDOW:
        raise OptionError(f"--frames is {arguments.frames}, but must be a multiple of {WINDOW}.")
    for name in ("words", "new_tokens", "repeats"):
        if getattr(arguments, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, but must be at least 1.")
    method = AdaCM2(alpha=arguments.alpha, beta=arguments.beta, carry_queries=False)
    size = "quick" if arguments.quick else arguments.size
    config = config_of(size)
    model = AdaCM2Model(build(config), Settings(video_token=IMAGE, image_token=None, stop_tokens=()), method=method)
    given = inputs(model, arguments.frames, arguments.words)
    ways = {"longvid_jax": ours(model, given, arguments.new_tokens)}
    torch_device = None
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        with tempfile.TemporaryDirectory() as folder:
            theirs, torch_device = load_torch(model, config, folder)
        ways["pytorch"] = naive(theirs, torch_device, given, method, arguments.new_tokens)
    took = {name: turns({way: run[name] for way, run in ways.items()}, arguments.repeats) for name in STAGES}
    results = {
        way: {f"{name}_frames_per_second": arguments.frames / took[name][way] for name in STAGES} for way in ways
    }
    cache = adacm2.largest(given["features"].shape[2], method.alpha, method.beta)
    found = {
        "benchmark": "adacm2",
        "device": jax.devices()[0].device_kind,
        "torch_device": torch_device,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "size": size,
        "dtype": str(model.model.query_tokens.dtype),
        "frames": arguments.frames,
        "tokens": given["features"].shape[2],
        "alpha": method.alpha,
        "beta": method.beta,
        "cache": cache,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
        "results": results,
        "times_as_fast": None,
        "difference": None,
    }
    if "pytorch" in ways:
        found["times_as_fast"] = {name: took[name]["pytorch"] / took[name]["longvid_jax"] for name in STAGES}
        mine, other = (np.asarray(ways[way]["cycle"](), np.float32) for way in ("longvid_jax", "pytorch"))
        found["difference"] = float(np.abs(mine - other).max())
    return found


STAGES = {"cycle": "memory cycle", "end_to_end": "pixels to answer"}


def report(result: dict) -> str:
    """The result of `run` as text."""
    lines = [
        f"{result['size']} random InstructBLIP, {result['dtype']}, {result['device']}, {result['cores']} cores, jax "
        f"{result['jax']}; {result['frames']} frames of {result['tokens']} tokens, alpha {result['alpha']:g}, beta "
        f"{result['beta']:g}: {result['cache']} stay; median of {result['repeats']}",
        f"{'':<14}" + "".join(f"{says:>24}" for says in STAGES.values()),
    ]
    for way, one in result["results"].items():
        lines.append(f"{way:<14}" + "".join(f"{one[f'{name}_frames_per_second']:>15,.1f} frames/s" for name in STAGES))
    if result["times_as_fast"] is None:
        lines.append("torch and transformers are not installed: nothing to compare with")
    else:
        fast = result["times_as_fast"]
        lines.append(
            f"{fast['cycle']:.2f} times as fast as a loop in PyTorch on the {result['torch_device']}, "
            f"{fast['end_to_end']:.2f} times from pixels to an answer of {result['new_tokens']} tokens (goal: 2); "
            f"largest difference of the outputs {result['difference']:.1e}"
        )
        if result["torch_device"] == "cpu" and jax.default_backend() != "cpu":
            lines.append("torch has no such device here and ran on the CPU: not to be compared")
    return "\n".join(lines)


def config_of(size: str) -> dict:
    """The config.json of a random model."""
    return {"model_type": "instructblip", "num_query_tokens": QUERIES, "image_token_index": IMAGE, **SIZES[size]}


def build(config: dict, seed: int = 0) -> InstructBlip:
    """Random weights through which something gets, so that queries attend to some tokens more than to others."""
    settings = convert.network_config(SimpleNamespace(config=config, name="a random model"))
    stacked = jax.default_backend() == "tpu"
    return jax.jit(
        lambda: scaled(InstructBlip(settings, dtype=default_dtype(), stacked=stacked, rngs=nnx.Rngs(seed)))
    )()


def inputs(model: AdaCM2Model, frames: int, words: int) -> dict[str, np.ndarray]:
    """Random frames, normalised, [1, T, 3, H, W], with their features [1, T, P, C], and a question in tokens."""
    rng, config = np.random.default_rng(0), model.model.config
    side = config.vision.image_size
    pixels = rng.normal(size=(1, frames, 3, side, side)).astype(np.float32)
    parts = [
        np.asarray(steps.encode_pixels(model.model, np.moveaxis(pixels[:, start : start + WINDOW], 2, -1)))
        for start in range(0, frames, WINDOW)
    ]
    ids = rng.integers(5, IMAGE, (1, words))
    return {
        "pixel_values": pixels,
        "features": np.concatenate(parts, axis=1),
        "qformer_input_ids": rng.integers(5, config.qformer.vocab_size, (1, words)),
        "input_ids": np.concatenate([np.full((1, QUERIES), IMAGE), ids], axis=1),
    }


def ours(model: AdaCM2Model, given: dict, new_tokens: int) -> dict[str, Callable]:
    """The stages: the cycle gives the queries' outputs [1, Q, width]."""
    windows = [
        jnp.asarray(given["features"][:, start : start + WINDOW])
        for start in range(0, given["features"].shape[1], WINDOW)
    ]
    capacity = max(
        adacm2.largest(windows[0].shape[2], *shares)
        for shares in zip(model.policy.alpha, model.policy.beta, strict=True)
    )
    text, valid = given["qformer_input_ids"].astype(np.int32), np.ones((1, WINDOW), bool)
    rest = {name: given[name] for name in ("pixel_values", "qformer_input_ids", "input_ids")}

    def watch():
        cache, outputs = steps.new_memory(model.model, batch=1, capacity=capacity)
        for n, window in enumerate(windows):
            cache, outputs = steps.watch_window(
                model.model,
                cache,
                outputs,
                window,
                np.array([n * WINDOW]),
                valid,
                text,
                None,
                policy=model.policy,
                carry_queries=False,
            )
        return cache, outputs

    return {
        "kept": lambda: watch()[0],
        "cycle": lambda: jax.block_until_ready(watch()[1]),
        "end_to_end": lambda: model.generate(**rest, max_new_tokens=new_tokens).tokens,
    }


def load_torch(model: AdaCM2Model, config: dict, folder: str):
    """The same weights in transformers' model, by way of a folder, and the device that it is on."""
    import torch
    from transformers import InstructBlipForConditionalGeneration

    path = convert.save_huggingface(model.model, config, os.path.join(folder, "model"), convert.table_for(config))
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(model.model.query_tokens.dtype))
    theirs = InstructBlipForConditionalGeneration.from_pretrained(path, dtype=dtype).eval().to(device)
    return theirs, device


def naive(theirs, device: str, given: dict, method: AdaCM2, new_tokens: int) -> dict[str, Callable]:
    """The same stages in PyTorch."""
    import torch

    from longvid_jax.evaluate import naive_adacm2

    features = torch.tensor(np.asarray(given["features"][0], np.float32)).to(device, theirs.dtype)
    pixels = torch.tensor(given["pixel_values"][0]).to(device, theirs.dtype)
    words, ids = (torch.tensor(given[name]).to(device) for name in ("qformer_input_ids", "input_ids"))

    def end_to_end():
        outputs, _ = naive_adacm2.watch(theirs, naive_adacm2.encode(theirs, pixels), words, method.alpha, method.beta)
        return naive_adacm2.answer(theirs, outputs, ids[:, QUERIES:], new_tokens).cpu().numpy()

    return {
        "kept": lambda: naive_adacm2.watch(theirs, features, words, method.alpha, method.beta)[1],
        "cycle": lambda: (
            naive_adacm2.watch(theirs, features, words, method.alpha, method.beta)[0].float().cpu().numpy()
        ),
        "end_to_end": end_to_end,
    }
