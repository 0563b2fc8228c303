"""Writing a Hugging Face folder, and reading it again."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from longvid_jax.convert import save
from longvid_jax.convert.load import fill
from longvid_jax.convert.ops import Transpose
from longvid_jax.convert.save import Part, save_huggingface, write_huggingface
from longvid_jax.convert.source import INDEX, open_source
from longvid_jax.convert.tables import Rule, Table, table_for
from longvid_jax.errors import CheckpointError
from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.models.paths import leaves


def load(checkpoints, folder, *, stacked=False, **how):
    source = open_source(folder)
    return fill(source, checkpoints.abstract(source.config, stacked=stacked), table_for(source.config), **how)


def parts_of(module) -> dict[str, Part]:
    """The parameters as an unordered supplier has them."""
    parts = {}
    for leaf in leaves(module):
        arrays = leaf.value if leaf.stacked else [leaf.value]
        for path, array in zip(leaf.part_paths, map(np.asarray, arrays), strict=True):
            parts[path] = Part(array.shape, array.dtype, lambda array=array: array)
    return dict(sorted(parts.items(), reverse=True))


TABLE = Table((Rule("{n}.weight", "layers/{n}/kernel", Transpose()), Rule("{n}.bias", "layers/{n}/bias")))
LLAMA = {"model_type": "llama"}


def kernels(count: int, shape=(2, 3), value=0.0) -> dict[str, Part]:
    return {
        f"layers/{n:02d}/kernel": Part(shape, np.dtype(np.float32), lambda n=n: np.full(shape, n + value, np.float32))
        for n in range(count)
    }


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


@pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_save_that_fails(checkpoints, tmp_path, monkeypatch, error):
    config, module = checkpoints.config("llama"), load(checkpoints, checkpoints.make())

    def fails(number):
        raise error

    monkeypatch.setattr(save.os, "fsync", fails)
    with pytest.raises(type(error)):
        save_huggingface(module, config, tmp_path / "out" / "saved", table_for(config))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen2_vl"])
def test_shards_hold_the_same_bits(checkpoints, tmp_path, model):
    config, tensors = checkpoints.config(model), checkpoints.tensors(model)
    module = load(checkpoints, checkpoints.make(model))
    bound, seen = 12_000, []
    folder = write_huggingface(
        parts_of(module), config, tmp_path / "saved", table_for(config), max_shard_bytes=bound, progress=seen.append
    )
    index = json.loads((folder / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{n + 1:05d}-of-{len(names):05d}.safetensors" for n in range(len(names))]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["config.json", INDEX, *names])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) == sum(seen)
    shards = {name: load_file(folder / name) for name in names}
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in shard.values()) <= bound or len(shard) == 1 for shard in shards.values())
    assert {key: name for name, shard in shards.items() for key in shard} == index["weight_map"]
    saved = {key: tensor.tobytes() for shard in shards.values() for key, tensor in shard.items()}
    assert saved == {key: tensor.tobytes() for key, tensor in tensors.items()}
    again = load(checkpoints, folder)
    jax.tree.map(np.testing.assert_array_equal, again, module)


def test_layers_follow_each_other_and_a_large_tensor_is_alone(tmp_path):
    parts = dict(sorted(kernels(101).items()))  # 100 before 11
    parts["layers/07/kernel"] = Part((4, 50), np.dtype(np.float32), lambda: np.ones((4, 50), np.float32))
    folder = write_huggingface(parts, LLAMA, tmp_path / "saved", TABLE, max_shard_bytes=60)
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    assert [key for key, name in where.items() if name == where["7.weight"]] == ["7.weight"]
    order = [where.pop(f"{n}.weight") for n in range(101) if n != 7]
    assert order == sorted(order)
    assert len(set(order)) == 50  # two of 24 bytes in each


def test_what_just_fits_is_one_file(tmp_path):
    whole = write_huggingface(kernels(4), LLAMA, tmp_path / "whole", TABLE, max_shard_bytes=96)
    assert sorted(path.name for path in whole.iterdir()) == ["config.json", "model.safetensors"]
    split = write_huggingface(kernels(4), LLAMA, tmp_path / "split", TABLE, max_shard_bytes=95)
    assert len(list(split.glob("*.safetensors"))) == 2


def test_types_stay_apart_and_aligned(tmp_path):
    parts = kernels(2) | {"layers/00/bias": Part((3,), np.dtype(jnp.bfloat16), lambda: np.ones(3, jnp.bfloat16))}
    folder = write_huggingface(parts, LLAMA | {"torch_dtype": "kept"}, tmp_path / "saved", TABLE)
    tensors = open_source(folder).tensors
    assert {key: info.dtype for key, info in tensors.items()} == {
        "0.bias": "BF16",
        "0.weight": "F32",
        "1.weight": "F32",
    }
    assert all(info.offset % 4 == 0 for info in tensors.values() if info.dtype == "F32")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "kept"


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_one_parameter_at_a_time_is_in_memory_and_asked_for_once(tmp_path, dtype):
    shape, asked = (1 << 10, 1 << 10), []

    def part(n):
        def values():
            asked.append(n)
            return np.full(shape, n, np.float32)

        return Part(shape, np.dtype(np.float32), values)

    parts = {f"layers/{n:02d}/kernel": part(n) for n in range(6)}
    tracemalloc.start()
    write_huggingface(parts, LLAMA, tmp_path / "saved", TABLE, dtype=dtype, max_shard_bytes=9 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert asked == list(range(6))
    assert peak < 2.2 * 4 * shape[0] * shape[1]


def test_a_saved_module_keeps_nothing_in_host_memory(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    module = {"layers": tuple({"kernel": jnp.zeros((512, 512), device=sharding)} for _ in range(4))}
    tracemalloc.start()
    save_huggingface(module, LLAMA, tmp_path / "saved", TABLE)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak > 512 * 512 * 4  # it sees such arrays
    assert kept < 512 * 512 * 4


def test_files_beside(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "merges.txt", "config.json", INDEX, "model-00001-of-00002.safetensors"):
        (other / name).write_text(f"theirs: {name}")
    folder = write_huggingface(kernels(2), LLAMA, tmp_path / "saved", TABLE, beside=sorted(other.iterdir()))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    assert (folder / "tokenizer.json").read_text() == "theirs: tokenizer.json"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(CheckpointError, match="absent.txt cannot be copied"):
        write_huggingface(kernels(2), LLAMA, tmp_path / "more", TABLE, beside=[other / "absent.txt"])


def test_overwriting_replaces_a_model_and_nothing_else(tmp_path):
    target = tmp_path / "saved"
    write_huggingface(kernels(4), LLAMA, target, TABLE, max_shard_bytes=48)

    def fails():
        assert len(open_source(target).tensors) == 4  # the old model is whole until the new one is
        raise KeyboardInterrupt

    broken = {"layers/00/kernel": Part((2, 3), np.dtype(np.float32), fails)}
    with pytest.raises(KeyboardInterrupt):
        write_huggingface(broken, LLAMA, target, TABLE, overwrite=True)
    assert len(open_source(target).tensors) == 4
    write_huggingface(kernels(2), LLAMA, target, TABLE, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (target / "config.json").rename(target / "notes.json")
    with pytest.raises(CheckpointError, match="holds something else"):
        write_huggingface(kernels(2), LLAMA, target, TABLE, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["model.safetensors", "notes.json"]


def test_parts_that_cannot_be_written(tmp_path):
    def refused(path, shape, dtype, error, match, values=None):
        with pytest.raises(error, match=match):
            parts = {path: Part(shape, np.dtype(dtype), values or (lambda: pytest.fail("was read")))}
            write_huggingface(parts, LLAMA, tmp_path / "saved", TABLE)

    refused("lost/kernel", (2, 2), np.float32, CheckpointError, "lost/kernel has no name in the Hugging Face layout")
    refused("layers/00/bias", (2,), np.int32, CheckpointError, "layers/00/bias is int32; only float32, float16 and")
    refused("layers/00/kernel", (2,), np.float32, CheckpointError, r"has the shape \[2\], of which 0.weight cannot")
    refused("layers/00/bias", (1 << 60,), np.float16, CheckpointError, r"[\d,]+ bytes are needed .* has [\d,]+ free")
    refused("layers/00/bias", (2,), np.float16, ValueError, "the shape", values=lambda: np.zeros(3, np.float16))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gets_full_is_named(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save.os, "fsync", full)
    with pytest.raises(CheckpointError, match="the disk of .*saved is full"):
        write_huggingface(kernels(2), LLAMA, tmp_path / "saved", TABLE)
    assert list(tmp_path.iterdir()) == []


BLOCKS = """
import sys
import numpy as np
from test_save import LLAMA, TABLE, Part, kernels, write_huggingface

def blocks():
    print("writing", flush=True)
    sys.stdin.read()

parts = kernels(8) | {"layers/05/kernel": Part((2, 3), np.dtype(np.float32), blocks)}
write_huggingface(parts, LLAMA, sys.argv[1], TABLE, max_shard_bytes=48)
"""


def test_a_process_that_is_killed_while_it_writes(tmp_path):
    target = tmp_path / "saved"
    paths = os.pathsep.join([str(Path(save.__file__).parents[2]), str(Path(__file__).parent)])
    command, environment = [sys.executable, "-c", BLOCKS, target], {**os.environ, "PYTHONPATH": paths}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as child:
        try:
            assert child.stdout.readline() == "writing\n"
            with pytest.raises(CheckpointError, match="another process is writing"):
                write_huggingface(kernels(2), LLAMA, target, TABLE)
            assert (tmp_path / ".saved.exporting" / "model-00003-of-00004.safetensors").exists()
        finally:
            child.kill()
    assert not target.exists()
    assert (tmp_path / ".saved.exporting").exists()
    write_huggingface(kernels(2), LLAMA, target, TABLE)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert len(open_source(target).tensors) == 2


@pytest.mark.parity
def test_transformers_loads_the_shards(checkpoints, tmp_path):
    import torch
    import transformers

    config = checkpoints.config("qwen2")
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).eval()
    model.save_pretrained(tmp_path / "torch")
    source = open_source(tmp_path / "torch")
    folder = write_huggingface(
        parts_of(load(checkpoints, tmp_path / "torch")),
        source.config,
        tmp_path / "ours",
        table_for(source.config),
        max_shard_bytes=20_000,
        beside=[tmp_path / "torch" / "generation_config.json"],
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again, report = transformers.Qwen2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.tensor(np.random.default_rng(0).integers(0, 64, (2, 40)))
    with torch.no_grad():
        np.testing.assert_array_equal(again(ids).logits.numpy(), model(ids).logits.numpy())
