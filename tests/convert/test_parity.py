"""Against transformers: its tiny random models come in, and what is written goes back into it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from longvid_jax.convert.load import fill
from longvid_jax.convert.save import save_huggingface
from longvid_jax.convert.source import open_source
from longvid_jax.convert.tables import table_for
from longvid_jax.models.llama import forward

pytestmark = pytest.mark.parity


def theirs(config: dict):
    torch.manual_seed(0)
    model = getattr(transformers, config["architectures"][0])
    return model(model.config_class(**config)).eval()


def load(checkpoints, folder, *, stacked=False):
    source = open_source(folder)
    return source.config, fill(source, checkpoints.abstract(source.config, stacked=stacked), table_for(source.config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen2_vl"])
def test_the_test_checkpoints_have_transformers_layout(checkpoints, tmp_path, model, tied):
    theirs(checkpoints.config(model, tied=tied)).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in saved.items()} == checkpoints.shapes(model, tied=tied)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_logits_come_and_go(checkpoints, tmp_path, model, tied, stacked):
    """torch's logits are ours after loading, and torch's again, with the same bits, after saving."""
    torch_model = theirs(checkpoints.config(model, tied=tied))
    torch_model.save_pretrained(tmp_path / "torch", max_shard_size="20KB")
    assert (tmp_path / "torch" / "model.safetensors.index.json").exists()
    config, module = load(checkpoints, tmp_path / "torch", stacked=stacked)
    ids = np.random.default_rng(0).integers(0, 64, (2, 40))
    with torch.no_grad():
        expected = torch_model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(jax.jit(forward)(module, jnp.asarray(ids)), expected, atol=1e-4, rtol=0)
    again, report = type(torch_model).from_pretrained(
        save_huggingface(module, config, tmp_path / "ours", table_for(config)), output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(ids)).logits.numpy(), expected)


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_vl_comes_and_goes(checkpoints, tmp_path, tied, newer):
    torch_model = theirs(checkpoints.config("qwen2_vl", tied=tied)).to(torch.bfloat16)
    # save_original_format=False writes the keys as the model has them inside: model.language_model., model.visual.
    torch_model.save_pretrained(tmp_path / "torch", save_original_format=not newer)
    assert any(key.startswith("model.visual.") for key in open_source(tmp_path / "torch").tensors) == newer
    config, module = load(checkpoints, tmp_path / "torch")
    again, report = type(torch_model).from_pretrained(
        save_huggingface(module, config, tmp_path / "ours", table_for(config)), dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    state, expected = again.state_dict(), torch_model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key


def test_the_vision_tower_computes_the_same(checkpoints, tmp_path):
    torch_model = theirs(checkpoints.config("qwen2_vl"))
    torch_model.save_pretrained(tmp_path / "torch")
    _, module = load(checkpoints, tmp_path / "torch")
    frames, rows, columns = 3, 4, 6
    patches = np.random.default_rng(0).normal(size=(frames, rows * columns, 3 * 2 * 4 * 4)).astype(np.float32)
    with torch.no_grad():
        output = torch_model.model.visual(
            torch.tensor(patches.reshape(-1, patches.shape[-1])), grid_thw=torch.tensor([[frames, rows, columns]])
        )
    expected = output.pooler_output.numpy().reshape(frames, -1, 32)
    np.testing.assert_allclose(module.vision(jnp.asarray(patches), (rows, columns)), expected, atol=1e-5, rtol=0)
