"""A small random AdaCM2 model, videos for it, and what tests of it compare."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import longvid_jax as lv
from longvid_jax.memory import adacm2
from longvid_jax.models.layers import Embed
from longvid_jax.models.paths import leaves

SMOKE = f"{Path(__file__).parents[2] / 'configs' / 'adacm2.py'}:smoke"
TOKENS, LAYERS, POSITIONS = 5, 2, 64  # of a frame of 28 x 28 pixels, that cross-attend, and of frames
QUESTIONS = ["what colour is the circle?", "how many squares are there, and where?", "is it red?"]
CHOICES = {"alpha": 0.3, "beta": 0.5}


def randomised(module):
    """No parameter at its usual initial value, so that the question and what is seen matter."""
    for number, leaf in enumerate(leaves(module)):
        drawn = np.random.default_rng(number).normal(size=leaf.value.shape).astype(np.float32)
        around = 1.0 if leaf.path.endswith("scale") else 0.0
        yield jnp.asarray(around + 0.15 * drawn)


def with_random(module):
    return jax.tree.unflatten(jax.tree.structure(module), list(randomised(module)))


def batch_of(videos, window, first=0):
    """Windows of several videos [T, H, W, 3] side by side, blank behind the end of each; first: a frame's number."""
    for start in range(0, max(map(len, videos)), window):
        rows = [video[start : start + window] for video in videos]
        width = max(map(len, rows))
        padded = [np.pad(row, ((0, width - len(row)),) + ((0, 0),) * 3) for row in rows]
        valid = np.stack([np.arange(width) < len(row) for row in rows])
        times = np.broadcast_to(np.float32((first + np.arange(start, start + width)) / 2), valid.shape)
        yield lv.Frames(np.stack(padded), times, valid)


def watch(model, questions, videos, window=6):
    memory = model.begin(questions)
    for frames in batch_of(videos, window):
        memory = model.watch(memory, frames)
    return memory


def logits_after(model, memory):
    """The logits of the first tokens of an answer, through the machine that answer() runs on."""
    out, _ = model._decode(model.finish(lv.fork(memory)), max_new_tokens=3, keep_logits=True)
    return np.asarray(out.logits)


def same(memory, again):
    ours, theirs = jax.tree.flatten(memory), jax.tree.flatten(again)
    assert ours[1] == theirs[1]
    for x, y in zip(ours[0], theirs[0], strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def largest(alpha=CHOICES["alpha"], beta=CHOICES["beta"]):
    return adacm2.largest(TOKENS, alpha, beta)


def changed(module, frames):
    """A copy of a network with other frame positions, an Embed or None."""
    module = nnx.merge(*nnx.split(module))
    count = 0 if frames is None else frames.shape[0]
    module.config = dataclasses.replace(module.config, num_frames=count)
    module.frames = None
    if frames is not None:
        module.frames = Embed(*frames.shape, dtype=jnp.float32, rngs=nnx.Rngs(0))
        module.frames.embedding.set_value(frames)
    return module
