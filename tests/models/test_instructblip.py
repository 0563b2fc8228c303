"""Whole InstructBLIPs and BLIP-2s against transformers', logits to 1e-4."""

import json

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from longvid_jax import convert
from longvid_jax.errors import CheckpointError
from longvid_jax.models.instructblip import InstructBlipConfig
from tests.models import blip

pytestmark = pytest.mark.parity
TEXTS = {
    "llama": blip.LLAMA,
    "llama-tied": {**blip.LLAMA, "tie_word_embeddings": True},
    "qwen2": {**blip.QWEN2, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize(("kind", "text"), [("InstructBlip", name) for name in TEXTS] + [("Blip2", "llama")])
def test_logits(tmp_path, kind, text):
    model = blip.make(kind, text=TEXTS[text])
    model.save_pretrained(tmp_path)
    given = blip.inputs(np.random.default_rng(0))
    expected = blip.expected_logits(model, given)
    assert np.abs(expected).max() > 0.5
    for stacked in (False, True) if text == "llama" else (False,):
        ours = convert.from_huggingface(tmp_path, stacked=stacked)
        np.testing.assert_allclose(blip.logits(ours, given), expected, atol=1e-4, rtol=0)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == count


def test_the_instruction_matters(tmp_path):
    blip.make().save_pretrained(tmp_path)
    ours, given = convert.from_huggingface(tmp_path), blip.inputs(np.random.default_rng(0))
    before = blip.logits(ours, given)
    given["qformer_input_ids"][0, 2] += 1
    changed = np.abs(blip.logits(ours, given) - before).max(axis=(1, 2))
    assert changed[0] > 1e-2
    assert changed[1] == 0


@pytest.mark.parametrize("kind", ["InstructBlip", "Blip2"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_fields_that_a_config_leaves_out(kind, model_type):
    """transformers writes parts of a config with what differs from its own defaults only."""
    least = {
        "model_type": {"InstructBlip": "instructblip", "Blip2": "blip-2"}[kind],
        "text_config": {"model_type": model_type},
    }
    whole = getattr(transformers, f"{kind}Config")(**least).to_dict()
    assert whole["text_config"]["intermediate_size"] > 0
    config = InstructBlipConfig.from_huggingface(least)
    assert config == InstructBlipConfig.from_huggingface(whole)
    assert (config.vision.depth, config.vision.width, config.qformer.width) == (39, 1408, 768)
    assert config.qformer.words == (kind == "InstructBlip")


def test_a_language_model_that_is_not_known():
    for text in ({"model_type": "opt"}, {"model_type": "t5"}, {}, None):
        assert InstructBlipConfig.from_huggingface({"model_type": "blip-2", "text_config": text}).text is None


def test_frame_numbers(tmp_path):
    """f_t = x_t + E(t), and the last embedding for all numbers beyond it."""
    blip.make().save_pretrained(tmp_path)
    rng, file = np.random.default_rng(0), tmp_path / "model.safetensors"
    x, table = rng.normal(size=(2, 3, 17, 32)).astype(np.float32), rng.normal(size=(6, 32)).astype(np.float32)
    numbers = np.array([[0, 1, 5], [4, 6, 900]])
    np.testing.assert_array_equal(convert.from_huggingface(tmp_path).placed(x, numbers), x)
    save_file({**load_file(file), "frame_positions.weight": table}, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_frame_positions": 6}))
    expected = x + table[[[0, 1, 5], [4, 5, 5]]][:, :, None]
    np.testing.assert_allclose(convert.from_huggingface(tmp_path).placed(x, numbers), expected, rtol=1e-6)


def test_an_activation_that_is_not_known():
    config = blip.config_of().to_dict()
    config["qformer_config"]["hidden_act"] = "relu"
    with pytest.raises(CheckpointError, match="hidden_act is 'relu'"):
        InstructBlipConfig.from_huggingface(config)
