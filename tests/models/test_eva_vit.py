"""EVA's tower against transformers' InstructBlipVisionModel, to 1e-5."""

import jax
import numpy as np
import pytest
import torch

from longvid_jax import convert
from longvid_jax.errors import CheckpointError
from longvid_jax.models.eva_vit import EvaConfig, bicubic
from tests.models import blip

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
tower = jax.jit(lambda vision, pixels: vision(pixels))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of transformers and the folder that it was saved to."""
    model, folder = blip.make(), tmp_path_factory.mktemp("eva")
    model.save_pretrained(folder)
    return model, folder


def expected(model, pixels, **how) -> np.ndarray:
    with torch.no_grad():
        tokens = model.vision_model(torch.tensor(pixels).permute(0, 3, 1, 2), **how).last_hidden_state
    return tokens.numpy()


@pytest.mark.parametrize("stacked", [False, True])
def test_tokens(made, stacked):
    model, folder = made
    vision = convert.from_huggingface(folder, part="vision", stacked=stacked)
    pixels = RNG.normal(size=(3, 28, 28, 3)).astype(np.float32)
    got = tower(vision, pixels)
    assert got.shape == (3, 17, 32)
    np.testing.assert_allclose(got, expected(model, pixels), atol=1e-5, rtol=0)
    count = sum(parameter.numel() for parameter in model.vision_model.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(vision)) == count


@pytest.mark.parametrize("size", [(56, 56), (21, 21), (7, 7), (35, 14), (14, 70), (28, 56), (30, 57)], ids=str)
def test_interpolated_positions(made, size):
    """Larger, smaller, not square, and of a size that is no multiple of a patch."""
    model, folder = made
    vision = convert.from_huggingface(folder, part="vision")
    pixels = RNG.normal(size=(2, *size, 3)).astype(np.float32)
    rows, columns = size[0] // 7, size[1] // 7
    got = tower(vision, pixels[:, : rows * 7, : columns * 7])
    assert got.shape == (2, 1 + rows * columns, 32)
    np.testing.assert_allclose(got, expected(model, pixels, interpolate_pos_encoding=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("new", "old"), [(3, 4), (16, 16), (37, 16), (5, 2), (1, 7)])
def test_bicubic_is_torchs(new, old):
    signal = RNG.normal(size=(1, 1, old, 6)).astype(np.float32)
    resized = torch.nn.functional.interpolate(torch.tensor(signal), size=(new, 6), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(bicubic(new, old) @ signal[0, 0], resized[0, 0].numpy(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(bicubic(new, old).sum(axis=1), 1, atol=1e-6)


def test_without_bias_and_another_eps(tmp_path):
    model = blip.make(vision={"qkv_bias": False, "layer_norm_eps": 1e-2})
    model.save_pretrained(tmp_path)
    pixels = RNG.normal(size=(1, 28, 28, 3)).astype(np.float32)
    got = tower(convert.from_huggingface(tmp_path, part="vision"), pixels)
    np.testing.assert_allclose(got, expected(model, pixels), atol=1e-5, rtol=0)


def test_config():
    """Defaults are transformers'."""
    from transformers import Blip2VisionConfig, InstructBlipVisionConfig

    for config in (InstructBlipVisionConfig(), Blip2VisionConfig()):
        assert EvaConfig.from_huggingface(config.to_dict()) == EvaConfig.from_huggingface({}) == EvaConfig()
    with pytest.raises(CheckpointError, match="hidden_act of the vision tower is 'quick_gelu'"):
        EvaConfig.from_huggingface({"hidden_act": "quick_gelu"})
