"""Training steps fed as they are in a run, with examples made on the way, beside the same steps on batches at hand."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time

import jax
import jax.numpy as jnp

from longvid_jax.errors import OptionError
from longvid_jax.train import config as configs
from longvid_jax.train import flops, models, optimizer
from longvid_jax.train.feed import Feed, on_device
from longvid_jax.train.state import init
from longvid_jax.train.steps import Steps
from longvid_jax.train.tasks import Curriculum


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `longvid bench train`."""
    parser.add_argument("--config", default="qwen2vl_world:tiny", help="as for longvid train (default: %(default)s)")
    parser.add_argument("--stage", type=int, help="which of its stages, from 0 (default: the last)")
    parser.add_argument("--steps", type=int, default=30, help="of a turn (default: 30)")
    parser.add_argument("--repeats", type=int, default=2, help="turns, of which the fastest counts (default: 2)")


def run(arguments: argparse.Namespace) -> dict:
    """Steps in turns; returns plain values, ready for JSON. Raises OptionError for what cannot be run."""
    for name in ("steps", "repeats"):
        if getattr(arguments, name) < 1:
            raise OptionError(f"--{name} is {getattr(arguments, name)}, but must be at least 1.")
    config = configs.load(arguments.config)
    number = len(config.stages) - 1 if arguments.stage is None else arguments.stage
    if not 0 <= number < len(config.stages):
        raise OptionError(f"--stage is {number}, but {arguments.config} has the stages 0 to {len(config.stages) - 1}.")
    model, module = models.build(config)
    curriculum = Curriculum(config, model)
    batches, task = curriculum.of_stages[number], config.stages[number].task
    count = min(arguments.steps, curriculum.counts[number] - 1)
    if count < 1:
        raise OptionError(f"stage {number} of {arguments.config} has a single step; choose another one.")
    update, schedule = optimizer.make(curriculum.optim, len(curriculum))
    structure, state = init(
        module, update, models.trainable(config), tuple(config.frozen), compute_dtype=jnp.dtype(config.compute_dtype)
    )
    steps = Steps(config, model, structure, update, schedule)

    def take(state, batch):
        state, _, cost = steps.take(state, batch, task, compiling=contextlib.nullcontext)
        return state, cost

    made = [batches[b] for b in range(count + 1)]
    ready = [dataclasses.replace(batch, arrays=on_device(batch.arrays, None)) for batch in made]
    for batch in ready:  # compiles every shape
        state, _ = take(state, batch)
    at_hand, fed, waits = [], [], []
    for _ in range(arguments.repeats):
        jax.block_until_ready(state)
        begin, work = time.perf_counter(), 0.0
        for batch in ready[1:]:
            state, cost = take(state, batch)
            work += cost
        jax.block_until_ready(state)
        at_hand.append(time.perf_counter() - begin)

        with Feed(batches, 0, mesh=None, workers=config.workers, ahead=config.ahead) as feed:
            state, _ = take(state, feed.next(state.step)[0])  # the first comes when its makers have begun
            jax.block_until_ready(state)
            begin, waited = time.perf_counter(), 0.0
            for _ in range(count):
                batch, late = feed.next(state.step)
                state, _ = take(state, batch)
                waited += late
            jax.block_until_ready(state)
            fed.append(time.perf_counter() - begin)
            waits.append(waited / fed[-1])
    best, peak = min(fed), flops.peak(config.compute_dtype)
    tokens = sum(int((batch.arrays["groups"] >= 0).sum()) for batch in made[1:] if "groups" in batch.arrays)
    return {
        "config": arguments.config,
        "stage": number,
        "steps": count,
        "device": jax.devices()[0].device_kind,
        "parameters": sum(value.size for value in (*state.trainable.values(), *state.frozen.values())),
        "examples_per_s": sum(len(batch.examples) for batch in made[1:]) / best,
        "frames_per_s": sum(example.num_frames for batch in made[1:] for example in batch.examples) / best,
        "tokens_per_s": tokens / best,
        "mfu": work / best / peak if peak else None,
        "data_wait": waits[fed.index(best)],
        "seconds_a_step": {"fed": best / count, "at_hand": min(at_hand) / count},
        "ratio": best / min(at_hand),
    }


def report(result: dict) -> str:
    """The result of `run` as text."""
    seconds, mfu = result["seconds_a_step"], result["mfu"]
    return "\n".join(
        [
            f"{result['config']}, stage {result['stage']}: {result['parameters']:,} parameters, "
            f"{result['steps']} steps on {result['device']}",
            f"{result['examples_per_s']:,.1f} videos, {result['frames_per_s']:,.0f} frames and "
            f"{result['tokens_per_s']:,.0f} tokens a second, MFU {'unknown' if mfu is None else f'{100 * mfu:.1f} %'}",
            f"waiting for data {100 * result['data_wait']:.1f} % of the time",
            f"a step takes {1000 * seconds['fed']:,.0f} ms with videos made on the way, "
            f"{1000 * seconds['at_hand']:,.0f} ms with the same batches at hand: {result['ratio']:.2f} times as long",
        ]
    )
