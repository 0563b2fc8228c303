"""A small random AdaCM2 model and a video, for the files of tests that have none of their own."""

import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax.train import config, models
from longvid_jax.train.export import export
from tests.systems.small_adacm2 import SMOKE, with_random


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with both tokenizers, as training writes it."""
    wanted = config.load(SMOKE, ["--config.model.qformer_config.num_hidden_layers=4"])
    model, module = models.build(wanted)
    return export(with_random(module), model, wanted, tmp_path_factory.mktemp("adacm2"))


@pytest.fixture(scope="module")
def load(folder):
    """load(**choices): the model with a method of its own; without choices the plain one."""
    plain = lv.load(folder)

    def load(module=None, **choices):
        method = lv.AdaCM2(**choices) if choices else None
        module = plain.model if module is None else module
        return type(plain)(module, plain.settings, method=method, tokenizer=plain.tokenizer, words=plain.words)

    return load


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (45, 28, 28, 3), dtype=np.uint8)
