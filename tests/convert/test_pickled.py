"""Checkpoints in PyTorch's own files: they read as safetensors do, nothing in them runs, and what is wrong is named."""

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from longvid_jax.convert import pickled
from longvid_jax.convert.load import fill
from longvid_jax.convert.source import open_source
from longvid_jax.convert.tables import table_for
from longvid_jax.errors import CheckpointError

parity = pytest.mark.parity
DTYPES = {np.float32: "F32", np.float16: "F16", np.float64: "F64", ml_dtypes.bfloat16: "BF16"}


def as_torch(array: np.ndarray):
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_bin(folder: Path, how: str = "mapped") -> Path:
    """A checkpoint folder with its safetensors, and their index, turned into what transformers used to write."""
    source = open_source(folder)
    renamed = {}
    for file in source.files:
        old = file.stem.replace("model", "pytorch_model")
        renamed[file.name] = f"{old}.bin"
        tensors = {key: as_torch(source.read(key)) for key, info in source.tensors.items() if info.file == file}
        save(tensors, folder / renamed[file.name], how)
        file.unlink()
    if (index := folder / "model.safetensors.index.json").exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {key: renamed[name] for key, name in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()
    return folder


def save(content, file: Path, how: str = "mapped") -> Path:
    import torch

    torch.save(content, file, _use_new_zipfile_serialization=how != "legacy")
    if how == "compressed":
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
    return file


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def fault(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "weights_only" not in message  # torch's advice to run the code
    return message


@parity
@pytest.mark.parametrize("how", ["mapped", "legacy", "compressed"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_as_safetensors_do(checkpoints, dtype, shards, how):
    tensors = checkpoints.tensors("qwen2_vl", dtype=dtype)
    source = open_source(as_bin(checkpoints.make("qwen2_vl", dtype=dtype, shards=shards), how))
    assert {key: info.shape for key, info in source.tensors.items()} == checkpoints.shapes("qwen2_vl")
    assert {info.dtype for info in source.tensors.values()} == {DTYPES[dtype]}
    assert sum(info.nbytes for info in source.tensors.values()) == sum(t.nbytes for t in tensors.values())
    assert len(source.files) == shards
    for key, tensor in tensors.items():
        whole = source.read(key)
        assert whole.dtype == tensor.dtype
        np.testing.assert_array_equal(whole, tensor)
        np.testing.assert_array_equal(source.read(key, (slice(3, 7),)), tensor[3:7])
    kernel = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(source.read(kernel, (slice(None), slice(8, 16))), tensors[kernel][:, 8:16])


@parity
def test_fills_the_model_that_safetensors_fill(checkpoints):
    def filled(folder):
        source = open_source(folder)
        return fill(source, checkpoints.abstract(source.config), table_for(source.config))

    from_safetensors = filled(checkpoints.make())
    jax.tree.map(np.testing.assert_array_equal, filled(as_bin(checkpoints.folder / "checkpoint")), from_safetensors)


@parity
def test_tensors_of_every_layout(folder):
    import torch

    grid = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": grid.T,
        "shared": grid,
        "columns": grid[:, 1::2],
        "repeated": torch.ones(3, 1, dtype=torch.bfloat16).expand(3, 5),
        "trained": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    save(tensors, folder / "weights.pt")
    source = open_source(folder)
    for key, tensor in tensors.items():
        expected = tensor.detach().float().numpy()
        for index in [(), (slice(1, 3),), (slice(None), slice(2, 4))][: expected.ndim + 1]:
            found = source.read(key, index)
            assert found.flags.owndata
            np.testing.assert_array_equal(found.astype(np.float32), expected[index], err_msg=f"{key} {index}")
        assert source.tensors[key].shape == expected.shape
        assert source.tensors[key].nbytes == tensor.numel() * tensor.element_size()


@parity
def test_dtypes_in_the_words_of_safetensors(folder):
    import torch
    from safetensors.torch import save_file

    names = "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 bool".split()
    tensors = {name: torch.zeros(2, dtype=getattr(torch, name)) for name in names}
    save(tensors, folder / "pytorch_model.bin")
    found = {key: info.dtype for key, info in open_source(folder).tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    assert found == {key: info.dtype for key, info in open_source(folder).tensors.items()}


@parity
@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_tensors_that_a_trainer_wrapped(folder, wrapper):
    import torch

    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    wrapped = {wrapper: {"a": torch.ones(2), "steps": 7}, "optimizer": optimizer, "epoch": 3, "b": torch.ones(3)}
    save(wrapped, folder / "checkpoint.pth")
    assert {key: info.shape for key, info in open_source(folder).tensors.items()} == {"a": (2,), "b": (3,)}


@parity
def test_several_files_without_an_index(folder):
    import torch

    save({"a": torch.ones(2)}, folder / "one.bin")
    save({"b": torch.ones(2)}, folder / "two.pth")
    assert open_source(folder).tensors.keys() == {"a", "b"}
    save({"a": torch.ones(2)}, folder / "three.pt")
    assert "the tensor a is also in one.bin" in fault(folder)


@parity
def test_the_order_of_preference_is_that_of_transformers(checkpoints):
    import torch

    folder = checkpoints.make(shards=2)
    save({"any": torch.ones(1)}, folder / "any.pt")
    save({"whole": torch.ones(1)}, folder / "pytorch_model.bin")
    of_bins = {"weight_map": {"sharded": "pytorch_model-1.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(of_bins))
    save({"sharded": torch.ones(1)}, folder / "pytorch_model-1.bin")
    steps = [
        ("model.safetensors.index.json", checkpoints.shapes("llama").keys()),
        ("pytorch_model.bin", {"whole"}),
        ("pytorch_model.bin.index.json", {"sharded"}),
        ("model-*.safetensors", checkpoints.shapes("llama").keys()),
        ("pytorch_model-1.bin", {"any", "sharded"}),
    ]
    for removed, expected in steps:
        assert open_source(folder).tensors.keys() == expected
        for file in folder.glob(removed):
            file.unlink()
    assert open_source(folder).tensors.keys() == {"any"}


@parity
def test_a_file_is_mapped_anew_before_much_of_it_is_resident(folder, monkeypatch):
    import torch

    opened = []
    load = pickled._load
    monkeypatch.setattr(pickled, "_load", lambda file: opened.append(file.name) or load(file))
    monkeypatch.setattr(pickled, "HELD_BYTES", 1000)
    save({f"{n}": torch.zeros(100) for n in range(6)}, folder / "a.bin")
    save({"wide": torch.zeros(10, 100)}, folder / "b.bin")
    source = open_source(folder)
    opened.clear()
    for n in range(6):  # 400 bytes each
        source.read(f"{n}")
    assert opened == ["a.bin"] * 2
    opened.clear()
    for n in range(3):  # little of it is read, but from all of its pages
        source.read("wide", (slice(None), slice(n, n + 1)))
    assert opened == ["b.bin"] * 3
    opened.clear()
    monkeypatch.setattr(pickled, "_can_be_mapped", lambda file: False)
    for n in range(6):
        source.read(f"{n}")
    assert opened == ["a.bin"]


@parity
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read as Linux tells it")
def test_of_a_file_only_what_is_read_becomes_resident(folder):
    import torch

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    save({"big": torch.ones(1 << 24), "small": torch.ones(2)}, folder / "pytorch_model.bin")  # 64 MiB
    open_source(folder).read("small")  # what torch needs at all
    before = resident()
    source = open_source(folder)
    source.read("big", (slice(1 << 20, 1 << 21),))
    assert resident() - before < 1 << 25


class Code:
    """Unpickled as Python does, it makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@parity
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 5")
@pytest.mark.parametrize("how", ["mapped", "legacy", "protocol 2", "protocol 5"])
def test_code_is_refused_and_does_not_run(folder, how):
    import torch

    made = folder / "made"
    assert pickle.loads(pickle.dumps(Code(made))) is None
    made.rmdir()  # it would have worked
    content, file = {"a": torch.ones(2), "b": Code(made)}, folder / "pytorch_model.bin"
    if how.startswith("protocol"):
        file.write_bytes(pickle.dumps({"b": Code(made)}, protocol=int(how[-1])))
    else:
        save(content, file, how)
    message = fault(folder)
    assert not made.exists()
    assert message.startswith(str(file))
    assert "safetensors" in message
    if how != "protocol 5":  # in which torch does not even look for tensors
        assert "holds code other than tensors (posix.mkdir), which is not run" in message


@parity
def test_whole_modules_and_scripts_are_code(folder):
    import torch

    save(torch.nn.Linear(2, 2), folder / "pytorch_model.bin")
    assert "code other than tensors (torch.nn.modules.linear.Linear)" in fault(folder)
    (folder / "pytorch_model.bin").unlink()
    with zipfile.ZipFile(folder / "scripted.pt", "w") as archive:  # what marks TorchScript's own archives
        for name in ("version", "byteorder", "constants.pkl", "data.pkl"):
            archive.writestr(f"scripted/{name}", "3\n")
    with pytest.warns(UserWarning, match="TorchScript"):
        assert "code other than tensors (TorchScript)" in fault(folder)


@parity
@pytest.mark.parametrize("how", ["mapped", "legacy"])
@pytest.mark.parametrize("damage", ["cut by 10", "cut by 500", "halved", "cut to 100", "empty", "zeros", "pointer"])
def test_a_damaged_file_is_named(checkpoints, how, damage):
    file = as_bin(checkpoints.make(), how) / "pytorch_model.bin"
    whole = file.read_bytes()
    damaged = {
        "cut by 10": whole[:-10],
        "cut by 500": whole[:-500],
        "halved": whole[: len(whole) // 2],
        "cut to 100": whole[:100],
        "empty": b"",
        "zeros": bytes(1000),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n",
    }
    file.write_bytes(damaged[damage])
    message = fault(file.parent)
    assert message.startswith(str(file))
    assert "fetch this file again" in message


@parity
def test_without_tensors_by_name(folder):
    import torch

    file = folder / "pytorch_model.bin"
    for content in ({"epoch": 3}, {}, [torch.ones(2)], torch.ones(2), {"optimizer": {"a": torch.ones(2)}}):
        save(content, file)
        assert f"{file} holds no tensors by name" in fault(folder)


@parity
def test_tensors_that_cannot_be_taken(folder):
    import torch

    one, file = torch.ones(2), folder / "pytorch_model.bin"
    for content, says in [
        ({3: one}, "the key 3, which is no name"),
        ({"a": one, "model": {"a": one}}, "the tensor a at its top and below"),
        ({"a": torch.eye(2).to_sparse()}, "the tensor a is sparse"),
        ({"a": torch.ones(2, device="meta")}, "the tensor a is sparse or has no values"),
    ]:
        save(content, file)
        message = fault(folder)
        assert message.startswith(str(file))
        assert says in message


@parity
def test_faults_of_an_index(checkpoints):
    folder = as_bin(checkpoints.make(shards=3))
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "pytorch_model-00002-of-00003.bin"
    index.write_text(json.dumps(content))
    assert "pytorch_model-00002-of-00003.bin does not hold model.extra.weight" in fault(folder)
    (folder / "pytorch_model-00001-of-00003.bin").unlink()
    assert f"{index} names files that are absent: pytorch_model-00001-of-00003.bin" in fault(folder)


def test_without_torch(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    message = fault(folder)
    assert "pytorch_model.bin can be read by torch only" in message
    assert "`pip install torch`, or save the model as safetensors (safe_serialization=True)" in message


@parity
def test_a_torch_that_may_run_code(folder, monkeypatch):
    import torch

    save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1+cpu"))
    assert "torch only, 2.6 or newer" in fault(folder)
