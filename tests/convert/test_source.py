"""Reading a checkpoint folder: what is in it, slices of it, and everything that can be wrong with it."""

import json

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from longvid_jax.convert.source import open_source
from longvid_jax.errors import CheckpointError


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_headers_and_slices(checkpoints, shards, dtype):
    tensors = checkpoints.tensors("qwen2_vl", dtype=dtype)
    source = open_source(checkpoints.make("qwen2_vl", dtype=dtype, shards=shards))
    assert source.config == checkpoints.config("qwen2_vl")
    assert {key: info.shape for key, info in source.tensors.items()} == checkpoints.shapes("qwen2_vl")
    assert sum(info.nbytes for info in source.tensors.values()) == sum(t.nbytes for t in tensors.values())
    assert len({info.file for info in source.tensors.values()}) == shards
    for key, tensor in tensors.items():
        whole = source.read(key)
        assert whole.dtype == tensor.dtype
        np.testing.assert_array_equal(whole, tensor)
        np.testing.assert_array_equal(source.read(key, (slice(3, 7),)), tensor[3:7])
    kernel = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(source.read(kernel, (slice(None), slice(8, 16))), tensors[kernel][:, 8:16])


def test_several_files_without_an_index(checkpoints):
    folder = checkpoints.make(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    assert open_source(folder).tensors.keys() == checkpoints.shapes("llama").keys()


def test_files_that_the_index_does_not_name_are_left_alone(checkpoints):
    folder = checkpoints.make(shards=2)
    save_file({"model.norm.weight": np.ones(32, np.float32)}, folder / "consolidated.safetensors")
    assert open_source(folder).tensors.keys() == checkpoints.shapes("llama").keys()


def fault(path, **how) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(path, **how)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_no_such_path(tmp_path):
    assert "neither a folder that exists nor a Hugging Face hub id" in fault(tmp_path / "nothing")
    assert "neither a folder that exists" in fault("nothing")


def test_hub_id_without_network():
    message = fault("some-owner/some-model")
    assert "some-owner/some-model is neither a folder nor could it be fetched from the Hugging Face hub (" in message
    assert "give a local folder or check the name, your access and the network" in message


def test_of_a_hub_id_only_what_is_needed_is_fetched(checkpoints, monkeypatch):
    there = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    there += ["tokenizer.model", "merges.txt", "chat_template.jinja"]
    not_needed = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/params.json",
        "modeling_new.py",
        "README.md",
    ]
    fetched = {}

    def snapshot_download(hub_id, *, revision, allow_patterns, ignore_patterns):
        names = filter_repo_objects(there + not_needed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.update(hub_id=hub_id, revision=revision, names=list(names))
        return str(checkpoints.make())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_source("owner/model", revision="v1")
    assert fetched == {"hub_id": "owner/model", "revision": "v1", "names": there}
    assert source.name == "owner/model"
    assert source.path == checkpoints.folder / "checkpoint"


def test_revision_of_a_folder(checkpoints):
    assert "revision 'main'" in fault(checkpoints.make(), revision="main")


def test_a_file_instead_of_its_folder(checkpoints):
    assert "is a file" in fault(checkpoints.make() / "model.safetensors")


def test_no_config(checkpoints):
    folder = checkpoints.make()
    (folder / "config.json").unlink()
    assert f"{folder} holds no config.json" in fault(folder)


@pytest.mark.parametrize(("text", "says"), [("{", "cannot be read as JSON"), ("[1]", "holds a JSON list")])
def test_config_that_is_no_object(checkpoints, text, says):
    folder = checkpoints.make()
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'} {says}" in fault(folder)


def test_no_weights(checkpoints):
    folder = checkpoints.make()
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in fault(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "holds pytorch_model.bin but no *.safetensors" in fault(folder)


def test_index_names_absent_files(checkpoints):
    folder = checkpoints.make(shards=3)
    for n in (1, 3):
        (folder / f"model-0000{n}-of-00003.safetensors").unlink()
    message = fault(folder)
    assert "files that are absent: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in message


def test_index_places_a_tensor_where_it_is_not(checkpoints):
    folder = checkpoints.make(shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert "model-00002-of-00002.safetensors does not hold model.extra.weight" in fault(folder)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [(None, "no usable weight_map"), ({"a": 1}, "no usable weight_map"), ({"a": "../b.safetensors"}, "its own folder")],
)
def test_index_of_another_form(checkpoints, weight_map, says):
    folder = checkpoints.make(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert says in fault(folder)


def test_truncated_body_names_file_and_tensor(checkpoints):
    folder = checkpoints.make(shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    message = fault(folder)
    assert message.startswith(f"{file}: truncated at byte {len(whole) - 10:,} of {len(whole):,}")
    assert f"within the tensor {last}" in message


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:20], lambda b: b[:8] + b"\xff" * 64 + b[72:], lambda b: b"\xff" * 8 + b[8:]]
)
def test_damaged_header_names_the_file(checkpoints, damage):
    folder = checkpoints.make()
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = fault(folder)
    assert message.startswith(f"{file}: ")
    assert message.endswith("; fetch this file again.")


def test_one_tensor_in_two_files(checkpoints):
    folder = checkpoints.make(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": np.ones(32, np.float32)}, folder / "more.safetensors")
    message = fault(folder)
    assert "more.safetensors: the tensor model.norm.weight is also in model-0000" in message
