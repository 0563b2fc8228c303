"""What ReTaKe costs and saves: plain against compressed, with and without scoring, and beside transformers.

The latter only where there is torch.
Everything runs on the same random weights and tokens, in turns within one process; the median of the turns counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from longvid_jax.convert.settings import Settings
from longvid_jax.evaluate import tiny
from longvid_jax.models.llama import DecoderConfig
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig, VisionConfig
from longvid_jax.ops.rope import Rope
from longvid_jax.systems import retake_steps as steps
from longvid_jax.systems.loading import default_dtype, load
from longvid_jax.systems.retake import ReTaKe, RetakeModel
from longvid_jax.systems.retake_reader import Reader

SMALL = {"width": 512, "depth": 8, "heads": 8, "kv_heads": 2, "vision_width": 256, "vision_depth": 4}
SEVEN_B = Qwen2VLConfig(
    text=DecoderConfig(
        vocab_size=152064,
        width=3584,
        depth=28,
        heads=28,
        kv_heads=4,
        ff_width=18944,
        norm_eps=1e-6,
        qkv_bias=True,
        o_bias=False,
        tied=False,
        rope=Rope(head_dim=128, theta=1e6, sections=(16, 24, 24)),
    ),
    vision=VisionConfig(),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `longvid bench retake`."""
    parser.add_argument(
        "--size", choices=("small", "7b"), default="small", help="of the random model: 22 M parameters or Qwen2-VL-7B's"
    )
    parser.add_argument("--frames", type=int, default=256, help="sampled frames of the video (default: 256)")
    parser.add_argument(
        "--grid", type=int, nargs=2, default=(4, 4), metavar=("ROWS", "COLUMNS"), help="tokens of a frame"
    )
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="of ReTaKe (default: 0.25)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the median counts (default: 3)")


def run(args: argparse.Namespace) -> dict:
    """Measures; returns plain values, ready for JSON."""
    method = ReTaKe(keep_ratio=args.keep_ratio)
    with tempfile.TemporaryDirectory() as folder:
        if args.size == "small":
            plain = load(tiny.write_checkpoint(os.path.join(folder, "model"), **SMALL))
        else:
            plain = RetakeModel(_random_model(SEVEN_B), Settings(video_token=151656, image_token=None, stop_tokens=()))
        plain.settings = dataclasses.replace(plain.settings, stop_tokens=())  # all turns write equally many tokens
        given = _inputs(plain, args.frames, tuple(args.grid))
        systems = {"plain": plain, "retake": RetakeModel(plain.model, plain.settings, method=method)}
        ways = {name: _ours(system, given) for name, system in systems.items()}
        if args.size == "small" and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            ways["transformers"] = _transformers(os.path.join(folder, "model"), given)
        first, rest = _first_token_and_rest(ways, args.new_tokens, args.repeats)
        traces = {name: system.generate(**given, max_new_tokens=1).trace for name, system in systems.items()}
    prompt = given["input_ids"].shape[1]
    results = {
        name: {
            "seconds_to_first_token": first[name],
            "prefill_tokens_per_second": prompt / first[name],
            "milliseconds_per_token": 1000 * rest[name],
            "cache_bytes": traces[name].cache_bytes if name in traces else None,
        }
        for name in ways
    }
    with_scores, without = _scoring(plain, method, args.frames, tuple(args.grid), args.repeats)
    config = plain.model.config.text
    tokens = args.grid[0] * args.grid[1] * method.chunk_frames // 2
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "size": args.size,
        "dtype": str(plain.model.text.embed.embedding.dtype),
        "frames": args.frames,
        "prompt_tokens": prompt,
        "keep_ratio": args.keep_ratio,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "results": results,
        "scoring": {
            "seconds_with": with_scores,
            "seconds_without": without,
            "share_of_time": with_scores / without - 1,
            "share_of_flops": scoring_share(config, tokens, past=0),
            "share_of_flops_7b": scoring_share(SEVEN_B.text, 2304, past=0),
        },
    }


def report(result: dict) -> str:
    """The result of `run` as text."""
    lines = [
        f"{result['size']} random Qwen2-VL, {result['dtype']}, {result['device']}, jax {result['jax']}; "
        f"{result['frames']} frames, {result['prompt_tokens']:,} tokens, keep_ratio {result['keep_ratio']}; "
        f"median of {result['repeats']}",
        f"{'':<14}{'first token':>14}{'prefill':>16}{'a token':>12}{'cache':>12}",
    ]
    for name, one in result["results"].items():
        cache = "" if one["cache_bytes"] is None else f"{one['cache_bytes'] / 1e6:.1f} MB"
        lines.append(
            f"{name:<14}{one['seconds_to_first_token']:>12.2f} s{one['prefill_tokens_per_second']:>10.0f} tok/s"
            f"{one['milliseconds_per_token']:>9.1f} ms{cache:>12}"
        )
    plain, retake = result["results"]["plain"], result["results"]["retake"]
    speed = plain["milliseconds_per_token"] / retake["milliseconds_per_token"]
    lines.append(f"decoding with ReTaKe's cache is {speed:.2f} times as fast as with the whole one (goal: above 1)")
    if (torch := result["results"].get("transformers")) is not None:
        prefill = plain["seconds_to_first_token"] / torch["seconds_to_first_token"]
        decode = plain["milliseconds_per_token"] / torch["milliseconds_per_token"]
        lines.append(
            f"plain beside transformers: {prefill:.2f} of its time to the first token (goal: at most 1.2), "
            f"{decode:.2f} of its time a token (goal: at most 1)"
        )
    scoring = result["scoring"]
    lines.append(
        f"scoring and selection: {100 * scoring['share_of_time']:.1f} % more time of the decoder's prefill, "
        f"{100 * scoring['share_of_flops']:.1f} % more FLOPs ({100 * scoring['share_of_flops_7b']:.1f} % at 7B shapes "
        "with no past; goal: at most 5 %)"
    )
    return "\n".join(lines)


def scoring_share(config: DecoderConfig, chunk: int, past: int) -> float:
    """FLOPs of PivotKV's scores and re-rotation of a chunk, as a share of those of the decoder's own pass over it.

    A multiply-add is two. Per layer: projections and MLP, attention over past and chunk; scores are one more q k^T
    with its softmax (5 a logit), the stored keys are turned once more (6 a number).
    """
    heads, kv = config.heads * config.rope.head_dim, config.kv_heads * config.rope.head_dim
    weights = config.width * (2 * heads + 2 * kv + 3 * config.ff_width)
    own = 2 * chunk * weights + 4 * chunk * (past + chunk) * heads + 5 * chunk * (past + chunk) * config.heads
    scores = 2 * chunk * chunk * heads + 5 * chunk * chunk * config.heads + 6 * chunk * kv
    return scores / own


def _random_model(config: Qwen2VLConfig) -> Qwen2VL:
    stacked = jax.default_backend() == "tpu"
    return jax.jit(lambda: Qwen2VL(config, dtype=default_dtype(), stacked=stacked, rngs=nnx.Rngs(0)))()


def _inputs(model: RetakeModel, frames: int, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """What a processor would make of a random video between two bits of random text."""
    vision, rng = model.model.config.vision, np.random.default_rng(0)
    patches = frames // vision.temporal
    text = rng.integers(1, 200, 40)
    video = np.full(patches * grid[0] * grid[1], model.settings.video_token)
    shape = (len(video) * vision.merge**2, vision.channels * vision.temporal * vision.patch**2)
    ids = np.concatenate([text[:16], video, text[16:]])[None]
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "mm_token_type_ids": np.where(ids == model.settings.video_token, 2, 0),
        "pixel_values_videos": rng.normal(size=shape).astype(np.float32),
        "video_grid_thw": np.array([[patches, grid[0] * vision.merge, grid[1] * vision.merge]]),
    }


def _ours(system: RetakeModel, given: dict) -> Callable[[int], None]:
    return lambda new_tokens: system.generate(**given, max_new_tokens=new_tokens)


def _transformers(folder: str, given: dict) -> Callable[[int], None]:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}

    def generate(new_tokens: int) -> None:
        with torch.inference_mode():
            model.generate(**tensors, max_new_tokens=new_tokens, do_sample=False)

    return generate


def _first_token_and_rest(
    ways: dict[str, Callable[[int], None]], new_tokens: int, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds to the first token and for each further one, of each way, in turns."""
    for way in ways.values():
        way(1), way(new_tokens)  # compile
    turns = [
        {name: (_seconds(way, 1), _seconds(way, new_tokens)) for name, way in ways.items()} for _ in range(repeats)
    ]
    first = {name: statistics.median(turn[name][0] for turn in turns) for name in ways}
    rest = {
        name: statistics.median((turn[name][1] - turn[name][0]) / (new_tokens - 1) for turn in turns) for name in ways
    }
    return first, rest


def _scoring(
    plain: RetakeModel, method: ReTaKe, frames: int, grid: tuple[int, int], repeats: int
) -> tuple[float, float]:
    """Seconds of the decoder's prefill of a video with DPSelect, scoring and selection, and of the same without.

    Both attend to as many tokens: without scores each chunk's first tokens stay.
    """
    scored = steps.Static(True, method.dpselect, method.pivots, method.reforge)
    readers = [
        Reader(plain.model, method, scored),
        Reader(
            plain.model,
            dataclasses.replace(method, dpselect=None),
            dataclasses.replace(scored, compress=False, dpselect=None),
        ),
    ]
    config, length, chunks = plain.model.config.text, readers[0].length, frames // method.chunk_frames
    shape = (1, length, grid[0] * grid[1], config.width)
    features = jax.random.normal(jax.random.key(0), shape).astype(plain.model.text.embed.embedding.dtype)
    patches, times = np.array([length]), np.zeros((1, length), np.float32)

    def prefill(reader: Reader) -> None:
        memory = reader.begin([[1] * 16], [[1] * 24], np.array([frames // 2]), grid)
        for _ in range(chunks):
            memory = reader.look(memory, features, patches, times)
        jax.block_until_ready(reader.finish(memory).cache)

    for reader in readers:
        prefill(reader)
    turns = [[_seconds(prefill, reader) for reader in readers] for _ in range(repeats)]
    return tuple(statistics.median(turn[i] for turn in turns) for i in (0, 1))


def _seconds(fn: Callable, *args) -> float:
    start = time.perf_counter()
    fn(*args)
    return time.perf_counter() - start


def main() -> None:
    """For a machine without the installed command: python -m longvid_jax.evaluate.bench_retake."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    result = run(parser.parse_args())
    print(report(result), json.dumps(result), sep="\n")


if __name__ == "__main__":
    main()
