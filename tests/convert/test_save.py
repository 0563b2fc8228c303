"""Writing a Hugging Face folder, and reading it again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from longvid_jax.convert import save
from longvid_jax.convert.load import fill
from longvid_jax.convert.save import save_huggingface
from longvid_jax.convert.source import open_source
from longvid_jax.convert.tables import table_for
from longvid_jax.errors import CheckpointError
from longvid_jax.models.llama import Decoder, DecoderConfig


def load(checkpoints, folder, *, stacked=False, **how):
    source = open_source(folder)
    return fill(source, checkpoints.abstract(source.config, stacked=stacked), table_for(source.config), **how)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen2_vl"])
def test_load_then_save_gives_the_same_bits(checkpoints, tmp_path, model, tied, stacked):
    config, tensors = checkpoints.config(model, tied=tied), checkpoints.tensors(model, tied=tied)
    module = load(checkpoints, checkpoints.make(model, tied=tied), stacked=stacked)
    saved = load_file(save_huggingface(module, config, tmp_path / "saved", table_for(config)) / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert saved[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("stacked", [False, True])
def test_save_then_load_gives_the_same_bits(checkpoints, tmp_path, stacked):
    config = checkpoints.config("qwen2")
    module = Decoder(DecoderConfig.from_huggingface(config), dtype=jnp.bfloat16, stacked=stacked, rngs=nnx.Rngs(0))
    again = load(checkpoints, save_huggingface(module, config, tmp_path / "saved", table_for(config)), stacked=stacked)
    for ours, theirs in zip(jax.tree.leaves(module), jax.tree.leaves(again), strict=True):
        assert ours.dtype == theirs.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_sharded_arrays_are_saved_whole(checkpoints, tmp_path):
    config, tensors = checkpoints.config("llama"), checkpoints.tensors("llama")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    module = load(
        checkpoints,
        checkpoints.make(),
        stacked=True,
        shardings=lambda path, shape: (
            sharding if len(shape) > 1 else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        ),
    )
    saved = load_file(save_huggingface(module, config, tmp_path / "saved", table_for(config)) / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, saved, tensors)


def test_dtype_and_config(checkpoints, tmp_path):
    config = {**checkpoints.config("llama"), "torch_dtype": "float32", "note": "kept"}
    module = load(checkpoints, checkpoints.make())
    folder = save_huggingface(module, config, tmp_path / "a" / "saved", table_for(config), dtype=jnp.bfloat16)
    assert {info.dtype for info in open_source(folder).tensors.values()} == {"BF16"}
    written = json.loads((folder / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert written["note"] == "kept"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "float32"
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_a_folder_with_something_in_it_is_left_alone(checkpoints):
    folder = checkpoints.make()
    module, before = load(checkpoints, folder), (folder / "model.safetensors").read_bytes()
    config = checkpoints.config("llama")
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        save_huggingface(module, config, folder, table_for(config))
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_save_that_fails(checkpoints, tmp_path, monkeypatch, error):
    config, module = checkpoints.config("llama"), load(checkpoints, checkpoints.make())

    def fails(number):
        raise error

    monkeypatch.setattr(save.os, "fsync", fails)
    with pytest.raises(type(error)):
        save_huggingface(module, config, tmp_path / "out" / "saved", table_for(config))
    assert list((tmp_path / "out").iterdir()) == []
