"""Frames a second of ReWind's read-perceive-write cycle, beside the same written naively in PyTorch.

And what the scan over clips costs beside its clip program alone, what compiling takes, and each stage's share.
Everything runs on the same random weights and features, in turns within one process; the median of the turns counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import cost_rewind
from longvid_jax.evaluate.turns import turns
from longvid_jax.memory import rewind
from longvid_jax.models.eva_vit import EvaConfig
from longvid_jax.models.paths import leaves
from longvid_jax.models.perceiver import Instruction, Perceiver, PerceiverConfig, ReadWrite, cycle
from longvid_jax.systems.loading import default_dtype
from longvid_jax.train.initial import scaled

# Of the perceiver and what it looks at: patches of a frame, and words of a question.
SIZES = {
    "quick": (
        PerceiverConfig(width=32, depth=1, heads=2, ff_width=64, num_queries=4, video_width=32, text_width=32),
        4,
    ),
    "small": (
        PerceiverConfig(width=256, depth=4, heads=4, ff_width=1024, num_queries=32, video_width=256, text_width=256),
        64,
    ),
    "full": (PerceiverConfig(), 256),
}
WORDS = 12
STAGES = ("read", "perceive", "write")
# Goals: of the scan beside its clip program, and of the cycle beside PyTorch's.
MOST, LEAST = 1.1, 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `longvid bench rewind`."""
    parser.add_argument(
        "--size", choices=tuple(SIZES)[1:], default="small", help="of the random model: 256 wide, or the paper's"
    )
    parser.add_argument("--frames", type=int, default=1000, help="of the video (default: 1000)")
    parser.add_argument("--clip-frames", type=int, default=8, help="(default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the median counts (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="count FLOPs and bytes of 64 to 4,096 frames at full size, and measure nothing",
    )


def run(arguments: argparse.Namespace) -> dict:
    """Measures; returns plain values, ready for JSON. Raises OptionError for what cannot be run."""
    for name in ("frames", "clip_frames", "repeats"):
        if getattr(arguments, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, but must be at least 1.")
    if arguments.cost:
        return cost_rewind.run(PerceiverConfig(), EvaConfig(), clip_frames=arguments.clip_frames, words=WORDS)
    if arguments.frames % arguments.clip_frames:
        raise OptionError(
            f"--frames is {arguments.frames}, but must be a multiple of the {arguments.clip_frames} of a clip."
        )
    size = "quick" if arguments.quick else arguments.size
    config, patches = SIZES[size]
    networks, given = build(config), inputs(config, patches, arguments.frames, arguments.clip_frames)
    start = time.perf_counter()
    whole = watch.lower(networks, *given).compile()
    compile_seconds = time.perf_counter() - start
    clips = arguments.frames // arguments.clip_frames
    ways = {"scan": lambda: jax.block_until_ready(whole(networks, *given))}
    ways["clip by clip"] = _clip_by_clip(networks, *given)
    torch_device = None
    if importlib.util.find_spec("torch"):
        naive, torch_device = load_torch(networks, config, given)
        ways["pytorch"] = naive
    seconds = turns(ways, arguments.repeats)
    shares = turns(_stages(networks, *given), arguments.repeats)
    total = sum(shares.values())
    found = {
        "benchmark": "rewind",
        "device": jax.devices()[0].device_kind,
        "torch_device": torch_device,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "size": size,
        "dtype": str(given[0].dtype),
        "frames": arguments.frames,
        "clip_frames": arguments.clip_frames,
        "clips": clips,
        "patches": patches,
        "repeats": arguments.repeats,
        "compile_seconds": compile_seconds,
        "frames_per_second": {way: arguments.frames / took for way, took in seconds.items()},
        "scan_beside_clips": seconds["scan"] / seconds["clip by clip"],
        "shares": {stage: took / total for stage, took in shares.items()},
        "times_as_fast": None,
        "difference": None,
    }
    if torch_device is not None:
        found["times_as_fast"] = seconds["pytorch"] / seconds["scan"]
        mine, theirs = np.asarray(ways["scan"]().tokens, np.float32), ways["pytorch"]().float().cpu().numpy()
        found["difference"] = float(np.abs(mine[0, : arguments.frames] - theirs).max())
    return found


def report(result: dict) -> str:
    """The result of `run` as text."""
    if "exponents" in result:
        return cost_rewind.report(result)
    lines = [
        f"{result['size']} random perceiver, {result['dtype']}, {result['device']}, {result['cores']} cores, jax "
        f"{result['jax']}; {result['frames']} frames of {result['patches']} patches in clips of "
        f"{result['clip_frames']}; median of {result['repeats']}",
        f"{'scan over clips':<28}{result['frames_per_second']['scan']:>10,.1f} frames/s, compiled in "
        f"{result['compile_seconds']:.1f} s",
        f"{'clip by clip, fixed memory':<28}{result['frames_per_second']['clip by clip']:>10,.1f} frames/s; the scan "
        f"takes {result['scan_beside_clips']:.2f} times as long (goal: at most {MOST})",
    ]
    if result["times_as_fast"] is None:
        lines.append("torch is not installed: nothing to compare with")
    else:
        lines.append(
            f"{'loop in PyTorch':<28}{result['frames_per_second']['pytorch']:>10,.1f} frames/s on the "
            f"{result['torch_device']}: ours is {result['times_as_fast']:.2f} times as fast (goal: {LEAST}); largest "
            f"difference of the tokens {result['difference']:.1e}"
        )
        if result["torch_device"] == "cpu" and jax.default_backend() != "cpu":
            lines.append("torch has no such device here and ran on the CPU: not to be compared")
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in result["shares"].items())
    return "\n".join([*lines, f"each stage alone, as shares: {shares}"])


def build(config: PerceiverConfig, seed: int = 0) -> tuple[Perceiver, ReadWrite]:
    """Random networks through which something gets, with open gates."""
    dtype, stacked = default_dtype(), jax.default_backend() == "tpu"

    @jax.jit
    def start():
        rngs = nnx.Rngs(seed)
        made = Perceiver(config, dtype=dtype, stacked=stacked, rngs=rngs), ReadWrite(config, dtype=dtype, rngs=rngs)
        made = [scaled(module) for module in made]
        places = [leaf.path for leaf in leaves(made[0])]
        values, structure = jax.tree.flatten(made[0])
        opened = [x + 0.5 if path.endswith("gate") else x for path, x in zip(places, values, strict=True)]
        return jax.tree.unflatten(structure, opened), made[1]

    return start()


def inputs(config: PerceiverConfig, patches: int, frames: int, clip_frames: int) -> tuple[jax.Array, jax.Array]:
    """Random features [C, 1, F, P, W], and BERT's outputs [1, S, text_width] for a question."""
    rng, dtype = np.random.default_rng(0), default_dtype()
    features = rng.normal(size=(frames // clip_frames, 1, clip_frames, patches, config.video_width))
    return jnp.asarray(features, dtype), jnp.asarray(rng.normal(size=(1, WORDS, config.text_width)), dtype)


def instruction(perceiver: Perceiver, words: jax.Array) -> Instruction:
    return perceiver.instruct(words, jnp.ones(words.shape[:2], bool))


@jax.jit
def watch(networks, features: jax.Array, words: jax.Array) -> rewind.TokenMemory:
    """The memory after all clips, from an empty one."""
    perceiver, memory = networks
    config, (clips, _, frames) = perceiver.config, features.shape[:3]
    empty = rewind.empty(1, clips * frames, config.num_write, config.width, config.heads, features.dtype)
    given = rewind.Clips(features, jnp.ones(features.shape[:3], bool))
    return rewind.watch(empty, given, *cycle(perceiver, memory, instruction(perceiver, words)))


def _clip_by_clip(networks, features: jax.Array, words: jax.Array) -> Callable:
    """The same clip program once a clip, on a memory of the same size that is always as full as at the end."""
    config, (clips, _, frames) = networks[0].config, features.shape[:3]

    @partial(jax.jit, donate_argnums=1)
    def step(networks, memory, features, told):
        given = rewind.Clips(features, jnp.ones(features.shape[:2], bool))
        after = rewind.step(memory, given, *cycle(*networks, told))
        return rewind.TokenMemory(after.tokens, after.keys, after.values, memory.length)

    room, each = clips * frames, list(features)  # cut beforehand, so that the program alone is timed
    told = _told(networks, words)
    empty = rewind.empty(1, room, config.num_write, config.width, config.heads, features.dtype)

    def all_clips():
        memory = jax.tree.map(jnp.array, empty)
        memory = rewind.TokenMemory(memory.tokens, memory.keys, memory.values, jnp.full((1,), room - frames, jnp.int32))
        for clip in each:
            memory = step(networks, memory, clip, told)
        return jax.block_until_ready(memory)

    return all_clips


@jax.jit
def _told(networks, words: jax.Array) -> Instruction:
    return instruction(networks[0], words)


def _stages(networks, features: jax.Array, words: jax.Array) -> dict[str, Callable]:
    """Each stage of one clip alone, with a memory as full as at the end."""
    config, (clips, _, frames) = networks[0].config, features.shape[:3]
    room = clips * frames * config.num_write
    told = _told(networks, words)
    keys = jnp.ones((1, config.heads, room, config.width // config.heads), features.dtype)
    queries = jnp.ones((1, config.num_queries + 1, config.width), features.dtype)
    perceived = jnp.ones((1, frames, config.num_queries + 1, config.width), features.dtype)
    numbers, valid = jnp.arange(frames)[None], jnp.ones((1, frames), bool)
    given = {
        "read": (keys, keys, jnp.ones((1, room), bool)),
        "perceive": (queries, features[0], numbers, valid),
        "write": (perceived, numbers),
    }

    def way(index: int, arguments: tuple) -> Callable:
        run = jax.jit(lambda networks, told, *given: cycle(*networks, told)[index](*given))
        return lambda: [jax.block_until_ready(run(networks, told, *arguments)) for _ in range(8)]

    return {stage: way(index, given[stage]) for index, stage in enumerate(STAGES)}


def load_torch(networks, config: PerceiverConfig, given) -> tuple[Callable, str]:
    """The same in PyTorch, and the device that it is on."""
    import torch

    from longvid_jax.evaluate.naive_rewind import NaiveRewind

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(given[0].dtype))
    naive = NaiveRewind(_named(networks), config, device, dtype)
    features, words = (torch.tensor(np.asarray(x, np.float32)).to(device, dtype) for x in (given[0][:, 0], given[1][0]))

    def watch():
        written = naive.watch(features, words)
        if device == "cuda":
            torch.cuda.synchronize()
        return written

    return watch, device


def _named(networks) -> dict[str, np.ndarray]:
    """Our parameters by path, each layer its own."""
    found = {}
    for part, module in zip(("perceiver", "memory"), networks, strict=True):
        for leaf in leaves(module):
            for n, path in enumerate(leaf.part_paths):
                found[f"{part}/{path}"] = np.asarray(leaf.value[n] if leaf.stacked else leaf.value, np.float32)
    return found
