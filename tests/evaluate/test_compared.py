"""Models kept as the tensors in which they differ from another."""

import json

import jax.numpy as jnp
import pytest
from safetensors.flax import load_file, save_file

from longvid_jax.errors import CheckpointError
from longvid_jax.evaluate import compared
from tests.systems.small_rewind import make


def test_what_is_kept_is_the_difference(tmp_path):
    """The model that comes back is the other one to the bit, of its base's files."""
    base = make(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (tmp_path / "other").mkdir()
    other = weights | {"separator": weights["separator"] + 1}
    save_file(other, tmp_path / "other" / "model.safetensors")
    (tmp_path / "kept").mkdir()
    assert compared.keep(base, tmp_path / "other", tmp_path / "kept" / "one.safetensors") == ["separator"]
    assert list(load_file(tmp_path / "kept" / "one.safetensors")) == ["separator"]
    with compared.folders(base, tmp_path / "kept") as found:
        (folder,) = found.values()
        assert list(found) == ["one"]
        assert {file.name for file in folder.iterdir()} == {file.name for file in base.iterdir()}
        assert json.loads((folder / "config.json").read_text()) == json.loads((base / "config.json").read_text())
        back = load_file(folder / "model.safetensors")
        assert back.keys() == other.keys()
        assert all(jnp.array_equal(back[name], other[name]) and back[name].dtype == other[name].dtype for name in other)
    assert not folder.exists()


def test_models_of_another_kind(tmp_path):
    base = make(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (tmp_path / "other").mkdir()
    save_file({**weights, "more": weights["separator"]}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be compared: only one of them has more"):
        compared.keep(base, tmp_path / "other", tmp_path / "one.safetensors")
