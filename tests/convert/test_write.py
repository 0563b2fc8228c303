"""From Hugging Face to the library's own folder and back again: every bit arrives, and what does not do is refused."""

import hashlib
import json
import os
import shutil
import zlib
from importlib.metadata import version

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from longvid_jax import convert
from longvid_jax.convert import write
from longvid_jax.convert.folder import files_beside
from longvid_jax.errors import CheckpointError, OptionError

MODELS = [(model, tied) for model in ("llama", "qwen2", "qwen2_vl") for tied in (False, True)]
of_models = pytest.mark.parametrize(("model", "tied"), MODELS)
KERNEL, SCALE = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def stored(folder) -> dict[str, np.ndarray]:
    """All arrays of a converted checkpoint."""
    checkpoint = convert.Checkpoint(folder)
    return checkpoint.read(checkpoint.arrays)


def expected(tensors: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """The same, of torch's tensors: names by the table, kernels turned, nothing else changed."""
    table = convert.table_for(config)
    named = {table.target(key)[0]: tensor for key, tensor in tensors.items()}
    return {
        path: np.ascontiguousarray(tensor.reshape(len(tensor), -1).T) if path.endswith("kernel") else tensor
        for path, tensor in named.items()
    }


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape), path
        assert found[path].tobytes() == array.tobytes(), path


def tensors_of(folder) -> dict[str, np.ndarray]:
    source = convert.open_source(folder)
    return {key: source.read(key) for key in source.tensors}


# --- every bit arrives ------------------------------------------------------------------------------------------------


@of_models
def test_there(converted, checkpoints, model, tied):
    source, target = converted(model, tied=tied)
    assert_same(stored(target), expected(checkpoints.tensors(model, tied=tied), checkpoints.config(model)))
    assert [file.name for file in target.parent.iterdir() if file.name.startswith(".")] == []


@of_models
def test_back(converted, checkpoints, tmp_path, model, tied):
    source, target = converted(model, tied=tied)
    folder = convert.to_huggingface(target, tmp_path / "back")
    assert_same(load_file(folder / "model.safetensors"), checkpoints.tensors(model, tied=tied))
    config = json.loads((folder / "config.json").read_text())
    added = {"torch_dtype": "float32", "dtype": "float32"}
    assert config == json.loads((source / "config.json").read_text()) | added


def test_in_several_parts_and_files(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "PART_BYTES", 20_000)
    monkeypatch.setattr(write, "STRIPE_BYTES", 5000)
    source, finished = checkpoints.make("qwen2", dtype=np.float16, shards=3), []
    target = convert.to_orbax(source, tmp_path / "deeper" / "target", progress=finished.append)
    tensors = checkpoints.tensors("qwen2", dtype=np.float16)
    assert_same(stored(target), expected(tensors, checkpoints.config("qwen2")))
    assert len(finished) == 5 and sum(finished) == sum(tensor.nbytes for tensor in tensors.values())
    back = convert.to_huggingface(target, tmp_path / "back", max_shard_bytes=20_000)
    assert len(list(back.glob("*.safetensors"))) > 3
    assert_same(tensors_of(back), tensors)


def test_types_of_all_kinds_in_one_checkpoint(checkpoints, tmp_path):
    def mixed(tensors):
        tensors[KERNEL] = tensors[KERNEL].astype(ml_dtypes.bfloat16)
        tensors[SCALE] = tensors[SCALE].astype(np.float16)

    source = checkpoints.make(change=mixed)
    target = convert.to_orbax(source, tmp_path / "target")
    assert_same(tensors_of(convert.to_huggingface(target, tmp_path / "back")), tensors_of(source))


@pytest.mark.parametrize("dtype", [jnp.float32, "bfloat16", np.float16, None])
@pytest.mark.parametrize("kept", ["float64", "float32", "bfloat16", "float16"])
def test_casts_are_numpys(checkpoints, tmp_path, kept, dtype):
    """Without a dtype what is stored stays, but for float64, which jax would not take."""
    tensors = checkpoints.tensors("llama", dtype=np.dtype(kept))
    target = convert.to_orbax(checkpoints.make(dtype=np.dtype(kept)), tmp_path / "target", dtype=dtype)
    becomes = np.dtype(dtype or kept.replace("float64", "float32"))
    cast = {key: tensor.astype(becomes) for key, tensor in tensors.items()}
    assert_same(stored(target), expected(cast, checkpoints.config("llama")))


@pytest.mark.parity
def test_from_torchs_own_files(checkpoints, tmp_path):
    import torch

    source, tensors = checkpoints.make(), checkpoints.tensors("llama")
    torch.save({key: torch.from_numpy(tensor) for key, tensor in tensors.items()}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    target = convert.to_orbax(source, tmp_path / "target")
    assert_same(stored(target), expected(tensors, checkpoints.config("llama")))
    assert list(json.loads((target / "provenance.json").read_text())["files"]) == ["pytorch_model.bin"]
    assert_same(load_file(convert.to_huggingface(target, tmp_path / "back") / "model.safetensors"), tensors)


@pytest.mark.parity
@pytest.mark.parametrize(("model", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen2_vl", False)])
def test_logits_come_and_go(checkpoints, tmp_path, model, tied):
    """torch's logits are ours after converting, and torch's again, with the same bits, after exporting."""
    import torch
    import transformers

    from longvid_jax.models.llama import forward

    torch.manual_seed(0)
    config = checkpoints.config(model, tied=tied)
    made = getattr(transformers, config["architectures"][0])
    original = made(made.config_class(**config)).eval()
    original.save_pretrained(tmp_path / "torch", max_shard_size="30KB")
    ids = np.random.default_rng(0).integers(0, 64, (2, 40))
    with torch.no_grad():
        logits = original(torch.tensor(ids)).logits.numpy()
    target = convert.to_orbax(tmp_path / "torch", tmp_path / "converted")
    module = convert.from_huggingface(target, stacked=True)  # which compiles sooner
    decoder = getattr(module, "text", module)
    np.testing.assert_allclose(jax.jit(forward)(decoder, jnp.asarray(ids)), logits, atol=1e-4, rtol=0)
    again, report = made.from_pretrained(convert.to_huggingface(target, tmp_path / "back"), output_loading_info=True)
    assert not any(report.values()), report
    for key, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(ids)).logits.numpy(), logits)


# --- what goes with it ------------------------------------------------------------------------------------------------

BESIDE = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"model_max_length": 7}',
    "generation_config.json": '{"temperature": 0.5}',
    "preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "a b",
    "tokenizer.model": "\x00pieces",
    "LICENSE": "as you like",
    "NOTICE.md": "none",
}
LEFT = {"modeling_llama.py": "raise SystemExit", "provenance.json": "{}", "notes.md": "", "training_args.bin": ""}


def test_files_beside(checkpoints, tmp_path):
    source = checkpoints.make(shards=2)
    for name, text in {**BESIDE, **LEFT}.items():
        (source / name).write_text(text)
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    target = convert.to_orbax(source, tmp_path / "target")
    back = convert.to_huggingface(target, tmp_path / "back")
    own = {"config.json", "params", "provenance.json"}
    assert {file.name for file in target.iterdir()} == {*BESIDE, *own}
    assert {file.name for file in back.iterdir()} == {*BESIDE, "config.json", "model.safetensors"}
    for folder in (target, back):
        for name, text in BESIDE.items():
            assert (folder / name).read_text() == text, name
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert [file.name for file in files_beside(target)] == sorted(BESIDE)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_provenance(checkpoints, tmp_path, dtype):
    hub = tmp_path / "models--someone--model" / "snapshots" / ("0123456789" * 4)
    hub.parent.mkdir(parents=True)
    source = checkpoints.make("qwen2", shards=2).rename(hub)
    target = convert.to_orbax(source, tmp_path / "target", dtype=dtype)
    provenance = json.loads((target / "provenance.json").read_text())
    arrays = stored(target)
    assert provenance.pop("parameters_crc32") == {path: zlib.crc32(array.tobytes()) for path, array in arrays.items()}
    params = [path for path in (target / "params").rglob("*") if path.is_file()]
    assert provenance.pop("params_bytes") == {
        str(path.relative_to(target / "params")): path.stat().st_size for path in params
    }
    assert provenance.pop("config") == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()[:16]
    table = provenance.pop("table")
    assert table == write.table_hash(convert.table_for(checkpoints.config("qwen2")))
    assert table != write.table_hash(convert.table_for(checkpoints.config("qwen2_vl")))
    assert provenance == {
        "longvid_jax": version("longvid_jax"),
        "architecture": "qwen2",
        "format": 1,
        "source": str(source),
        "revision": "0123456789" * 4,
        "files": {file.name: file.stat().st_size for file in source.glob("*.safetensors")},
        "dtype": dtype,
    }
    assert convert.Checkpoint(target).provenance["source"] == str(source)


def test_what_is_damaged_is_not_exported(converted, tmp_path):
    """A bit that has turned in the stored data, which Orbax reads as it is."""
    target = shutil.copytree(converted("llama")[1], tmp_path / "damaged")
    data = max((target / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"params: [\w/]+ is damaged, its checksum .*; convert again\.$"):
        convert.to_huggingface(target, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_needs(converted, checkpoints, tmp_path, dtype):
    source, _ = converted("qwen2_vl")
    tensors = checkpoints.tensors("qwen2_vl")
    needs = convert.needs(source, dtype=dtype)
    size = sum(tensor.size for tensor in tensors.values())
    assert (needs.architecture, needs.arrays, needs.parameters) == ("qwen2_vl", len(tensors), size)
    assert (needs.source_bytes, needs.dtype) == (4 * size, dtype or "float32")
    assert needs.target_bytes == (2 if dtype else 4) * size
    assert needs.largest_bytes == (2 if dtype else 4) * 64 * 64
    assert tensors["visual.merger.mlp.0.weight"].shape == (64, 64) and needs.largest_array == "vision/merger/fc1/kernel"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    bare = convert.needs(tmp_path, dtype=dtype)
    assert bare.source_bytes is None and "not there" in str(bare)
    assert (bare.arrays, bare.target_bytes, bare.peak_bytes) == (needs.arrays, needs.target_bytes, needs.peak_bytes)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(source, target, match, error=CheckpointError, **how):
    """It is, in one sentence, and leaves nothing but the source and what was there."""
    before = {path: path.stat().st_mtime_ns for path in target.parent.rglob("*")}
    with pytest.raises(error, match=match) as caught:
        convert.to_orbax(source, target, **how)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert {path: path.stat().st_mtime_ns for path in target.parent.rglob("*")} == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", [KERNEL, SCALE])
def test_values_that_are_not_finite(checkpoints, tmp_path, key, bad):
    def spoil(tensors):
        tensors[key].reshape(-1)[-1] = bad

    source = checkpoints.make(change=spoil, dtype=ml_dtypes.bfloat16)
    with pytest.raises(CheckpointError, match=rf"^model\.safetensors: {key} has NaN or infinity in it; .*\.$"):
        convert.to_orbax(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_values_too_large_for_float16(checkpoints, tmp_path):
    def grow(tensors):
        tensors[KERNEL][3, 5] = 65520  # the least that is rounded to infinity

    source = checkpoints.make(change=grow)
    with pytest.raises(CheckpointError, match=rf"{KERNEL} has values too large for float16; .* bfloat16 or float32\.$"):
        convert.to_orbax(source, tmp_path / "target", dtype="float16")
    assert not (tmp_path / "target").exists()
    kernel = stored(convert.to_orbax(source, tmp_path / "target", dtype="bfloat16"))["layers/01/mlp/up/kernel"]
    assert kernel[5, 3] == 65536


def test_arguments(converted, tmp_path):
    source, target = converted("llama")
    out = tmp_path / "target"
    for dtype in ("int8", "float64", "half-ish", object()):
        refused(source, out, "must be one of float32, bfloat16, float16", OptionError, dtype=dtype)
    refused(target, out, "is converted already")
    refused(source, out, "has no revision 'main'", revision="main")
    with pytest.raises(CheckpointError, match="give a folder that `longvid convert` has made"):
        convert.to_huggingface(source, out)
    assert list(tmp_path.iterdir()) == []


def test_a_trained_copy_of_tied_weights(checkpoints, tmp_path):
    """It would be lost."""

    def copied(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    source = checkpoints.make(tied=True, change=copied)
    assert "lm_head/kernel" not in stored(convert.to_orbax(source, tmp_path / "same"))

    def trained(tensors):
        copied(tensors)
        tensors["lm_head.weight"][-1, -1] += 1

    source = checkpoints.make(tied=True, change=trained)
    refused(source, tmp_path / "other", "lm_head.weight differs from model.embed_tokens.weight")


def test_too_little_space_is_known_before(converted, tmp_path, monkeypatch):
    source, _ = converted("llama")
    size = convert.needs(source).target_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    refused(source, tmp_path / "target", rf"{size:,} bytes are needed and the disk of .* has {size - 1:,} free")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    convert.to_orbax(source, tmp_path / "target")


# --- the target -------------------------------------------------------------------------------------------------------


def test_one_at_a_time(converted, tmp_path):
    """The second is told; the first goes on to the end."""
    source, whole = converted("llama")
    told = []

    def second(size):
        with pytest.raises(CheckpointError, match="another process is writing .*target; wait for it or") as caught:
            convert.to_orbax(source, tmp_path / "target", overwrite=True)
        told.append(caught)

    convert.to_orbax(source, tmp_path / "target", progress=second)
    assert len(told) == 2  # what was there before, and the one part
    assert_same(stored(tmp_path / "target"), stored(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_overwriting_replaces_what_a_conversion_made(converted, tmp_path):
    (source, whole), other = converted("llama"), converted("qwen2")[1]
    target = shutil.copytree(other, tmp_path / "target")
    refused(source, target, "already exists and is not empty; give --overwrite")
    (target / "notes.txt").write_text("of the old one")

    def stop(size):
        assert_same(stored(target), stored(other))  # until the new one is whole
        if size:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        convert.to_orbax(source, target, overwrite=True, progress=stop)
    assert_same(stored(target), stored(other))
    assert (target / "notes.txt").exists()
    convert.to_orbax(source, target, overwrite=True)
    assert_same(stored(target), stored(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and not (target / "notes.txt").exists()


def test_a_replacement_that_fails_leaves_the_old_one(converted, tmp_path, monkeypatch):
    (source, _), other = converted("llama"), converted("qwen2")[1]
    target, rename = shutil.copytree(other, tmp_path / "target"), os.rename

    def fails(old, new):
        if new == target and "converting" in str(old):
            raise PermissionError("not now")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(PermissionError):
        convert.to_orbax(source, target, overwrite=True)
    assert_same(stored(target), stored(other))
    monkeypatch.undo()
    convert.to_orbax(source, target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_nothing_else_is_replaced(converted, tmp_path):
    source, whole = converted("llama")

    def kept(folder, *without):
        target = shutil.copytree(folder, tmp_path / "target")
        for name in without:
            (target / name).unlink()
        refused(source, target, "holds something else than what would replace it", overwrite=True)
        shutil.rmtree(target)

    kept(source)
    kept(whole, "provenance.json")  # parameters that somebody else keeps in a folder of this name
    kept(whole, "params/orbax.checkpoint")
    (tmp_path / "notes" / "params" / "deeper").mkdir(parents=True)
    kept(tmp_path / "notes")
    (tmp_path / "file").write_text("")
    refused(source, tmp_path / "file", "is a file", overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_same(stored(convert.to_orbax(source, empty)), stored(whole))
