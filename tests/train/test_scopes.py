"""The names by which a trace's stages are told apart."""

import jax
import jax.numpy as jnp
import numpy as np

from longvid_jax.memory import dpselect, pivotkv
from longvid_jax.memory.dpselect import Lookback
from longvid_jax.ops.rope import Rope
from longvid_jax.train import config as configs
from longvid_jax.train import models, optimizer
from longvid_jax.train.state import init, make_train_step
from longvid_jax.train.tasks import Curriculum, task


def names(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).as_text(debug_info=True)


def test_a_training_step():
    config = configs.load("qwen2vl_world:smoke")
    model, module = models.build(config)
    update, _ = optimizer.make(configs.plain(config.optim), 10)
    structure, state = init(module, update)
    step = make_train_step(structure, task("answers").loss(model, "none"), update)
    text = names(step, state, Curriculum(config, model)[2].arrays)
    for stage in ("gradient", "vision", "decoder", "loss", "optimizer"):
        assert f"{stage}/" in text or f"{stage})" in text, stage


def test_the_papers_stages():
    features = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 8)), jnp.float32)
    empty = Lookback.empty(2, 8, jnp.float32)
    text = names(lambda x: dpselect.stream_keyframes(empty, x, x[0], jnp.ones(4, bool), jnp.bool_(False)), features)
    assert "dpselect/" in text
    valid, count, rope = jnp.ones((1, 6), bool), jnp.array([2]), Rope(8)
    select = pivotkv.compress(count, valid, None, pivots="mean", reforged=False)
    q = k = v = jnp.ones((1, 1, 6, 8))
    text = names(lambda q, k, v: select(q, k, v, jnp.zeros((1, 6, 1), jnp.int32), rope, 0), q, k, v)
    assert "pivotkv/" in text
