"""What ReWind's cycle costs against the number of frames: arithmetic and memory traffic, counted and not measured.

The program of a clip, at the memory's final size, times the number of clips: an upper bound, as a memory grows. Layers
stand one behind the other in it, since XLA counts the body of a loop once; the vision tower's alike layers are counted
by what a second one adds to a first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longvid_jax.memory import rewind
from longvid_jax.models.eva_vit import EvaConfig, EvaViT
from longvid_jax.models.perceiver import Instruction, Perceiver, PerceiverConfig, ReadWrite, cycle
from longvid_jax.train import flops

FRAMES = (64, 128, 256, 512, 1024, 2048, 4096)
MOST = 1.03  # of the exponents: the goal
DTYPE = jnp.bfloat16


def run(
    config: PerceiverConfig, vision: EvaConfig, *, clip_frames: int, words: int, frames: Sequence[int] = FRAMES
) -> dict:
    """FLOPs and bytes of watching, of its cycle and of READ by numbers of frames, and the exponents that fit them."""
    seeing = _seeing(vision, clip_frames)
    rows = [_at(config, vision, count, clip_frames, words, seeing) for count in frames]
    exponents = {
        name: exponent(frames, [row[name] for row in rows])
        for name in rows[0]
        if name != "frames" and "read" not in name
    }
    return {"benchmark": "rewind cost", "clip_frames": clip_frames, "rows": rows, "exponents": exponents, "goal": MOST}


def exponent(frames: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(frames), np.log(costs), 1)[0])


def _seeing(vision: EvaConfig, clip_frames: int) -> dict[str, float]:
    """What the vision tower costs for a clip."""
    pixels = jax.ShapeDtypeStruct((clip_frames, vision.image_size, vision.image_size, 3), DTYPE)

    def of(depth: int) -> dict[str, float]:
        few = dataclasses.replace(vision, depth=depth)
        tower = jax.eval_shape(lambda: EvaViT(few, dtype=DTYPE, rngs=nnx.Rngs(0)))
        return _cost(lambda tower, pixels: tower(pixels), (tower, pixels))

    one, two = of(1), of(2)
    return {name: one[name] + (vision.depth - 1) * (two[name] - one[name]) for name in one}


def _at(
    config: PerceiverConfig, vision: EvaConfig, frames: int, clip_frames: int, words: int, seeing: dict[str, float]
) -> dict:
    clips, dtype, patches = -(-frames // clip_frames), DTYPE, vision.side**2
    networks = jax.eval_shape(
        lambda: (
            Perceiver(config, dtype=dtype, rngs=nnx.Rngs(0)),
            ReadWrite(config, dtype=dtype, rngs=nnx.Rngs(0)),
        )
    )
    sizes = config.num_write, config.width, config.heads
    memory = jax.eval_shape(lambda: rewind.empty(1, clips * clip_frames, *sizes, dtype))
    features = jax.ShapeDtypeStruct((1, clip_frames, patches, config.video_width), dtype)
    told = Instruction(
        jax.ShapeDtypeStruct((1, words, config.width), dtype),
        jax.ShapeDtypeStruct((1, words), jnp.bool_),
        jax.ShapeDtypeStruct((1, config.width), dtype),
    )

    def clip(networks, memory, features, told):
        given = rewind.Clips(features, jnp.ones(features.shape[:2], bool))
        return rewind.step(memory, given, *cycle(*networks, told))

    def read(networks, memory, features, told):
        return cycle(*networks, told)[0](*memory.by_token)

    given = networks, memory, features, told
    whole, reading = _cost(clip, given, donated=1), _cost(read, given)
    return {
        "frames": frames,
        **{name: clips * (seeing[name] + whole[name]) for name in ("flops", "bytes")},
        **{f"cycle_{name}": clips * whole[name] for name in ("flops", "bytes")},
        **{f"read_{name}": clips * reading[name] for name in ("flops", "bytes")},
    }


def _cost(function: Callable, given: tuple, donated: int | None = None) -> dict[str, float]:
    """Of one run: FLOPs of matrix products, and the bytes that XLA counts for the program, the donated in place or not.

    What is written in place counts as written whole where it is scattered, which the memory is.
    """
    compiled = jax.jit(function, donate_argnums=() if donated is None else donated).lower(*given).compile()
    return {
        "flops": flops.count(jax.make_jaxpr(function)(*given).jaxpr),
        "bytes": float(compiled.cost_analysis()["bytes accessed"]),
    }


def report(result: dict) -> str:
    """The result of `run` as text."""
    lines = [
        f"watching in clips of {result['clip_frames']} frames, without the decoder's prefill",
        f"{'frames':>8}{'TFLOP':>12}{'GB':>12}{'of the cycle':>20}{'GB':>10}{'of READ':>12}{'GB':>10}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['frames']:>8}{row['flops'] / 1e12:>12.2f}{row['bytes'] / 1e9:>12.1f}"
            + "".join(
                f"{row[f'{part}_flops'] / 1e12:>{width}.3f}{row[f'{part}_bytes'] / 1e9:>10.2f}"
                for part, width in (("cycle", 20), ("read", 12))
            )
        )
    told = result["exponents"]
    lines += [
        f"FLOPs grow as frames to the {told['flops']:.3f}, bytes to the {told['bytes']:.3f} (goal: at most {MOST}); "
        f"those of the cycle alone to the {told['cycle_flops']:.3f} and {told['cycle_bytes']:.3f}"
    ]
    return "\n".join(lines)
