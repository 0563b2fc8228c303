"""The loss of naming against a NumPy one, and that a vision tower learns to name by it."""

import numpy as np
import pytest
from flax import nnx

from longvid_jax.models.llama import DecoderConfig
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig, VisionConfig
from longvid_jax.ops.rope import Rope
from longvid_jax.train import losses

WORDS = [(a, b) for a in (3, 5, 9) for b in (1, 7)]  # token numbers of 3 colours and 2 shapes
KNOWN = [True, True, True, False, True, True]
PIXELS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.fixture(scope="module")
def model():
    text = DecoderConfig(12, 32, 1, 2, 1, 32, 1e-6, True, False, True, Rope(16, sections=(4, 2, 2)))
    return Qwen2VL(Qwen2VLConfig(text, VisionConfig(1, 16, 32, 2, 2, 7)), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    state = rng.choice(3, (2, 3, 6), p=(0.5, 0.3, 0.2))  # absent, in sight, unsure
    return {
        "frames": rng.integers(0, 256, (2, 6, 28, 28, 3), dtype=np.uint8),
        "things": (state == 1).astype(np.float32),
        "unsure": (state == 2).astype(np.float32),
        "coloured": np.array([[1, 0, 1], [1, 1, 0]], np.float32),
    }


def test_as_by_hand(model, batch):
    total, weight, more = losses.naming(model, batch, words=WORDS, known=KNOWN, **PIXELS)
    patches, grid = losses._patches(model, batch["frames"], **PIXELS)
    x = np.asarray(model.vision(patches.reshape(-1, *patches.shape[2:]), grid), np.float64)  # [6, N, D]
    table = np.asarray(model.text.embed.embedding[...], np.float64)

    def loss(tokens, truth, bias):
        logit = np.log(np.exp(tokens).sum()) + bias
        return np.log1p(np.exp(-logit if truth else logit)), (logit > 0) == truth

    wanted, right = 0.0, 0
    things, unsure = (batch[name].reshape(6, 6) for name in ("things", "unsure"))
    for moment in range(6):
        coloured = batch["coloured"].reshape(6)[moment]
        firsts, seconds = (3, 5, 9), (1, 7)
        for word, mine in [(w, [k for k in range(6) if w in WORDS[k]]) for w in (*firsts, *seconds)]:
            if word in firsts and not coloured:
                continue
            if things[moment, mine].any():
                wanted += loss(x[moment] @ table[word], True, losses.BIAS)[0]
            elif not unsure[moment, mine].any():
                wanted += loss(x[moment] @ table[word], False, losses.BIAS)[0]
        all_right = True
        for k, (first, second) in enumerate(WORDS):
            if coloured and (things[moment, k] or (KNOWN[k] and not unsure[moment, k])):
                tokens = x[moment] @ table[first] + x[moment] @ table[second]
                one, fits = loss(tokens, bool(things[moment, k]), 2 * losses.BIAS)
                wanted, all_right = wanted + one, all_right and fits
        right += all_right
    np.testing.assert_allclose(float(total), wanted, rtol=1e-5)
    assert float(weight) == 6 and float(more["right"]) == right


def test_only_vision_and_the_words_have_a_gradient(model, batch):
    import jax

    from longvid_jax.train.parameters import split

    structure, params, _ = split(model)

    def loss(params):
        return losses.naming(structure.module(params), batch, words=WORDS, known=KNOWN, **PIXELS)[0]

    moved = {path for path, grad in jax.grad(loss)(params).items() if np.abs(grad).max() > 0}
    assert {path.split("/")[0] for path in moved} == {"vision", "text"}
    assert [path for path in moved if path.startswith("text")] == ["text/embed/embedding"]
