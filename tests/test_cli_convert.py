"""`longvid convert`, `export` and `inspect` from end to end: the way there and back, and what bad input is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import longvid_jax as lv
from longvid_jax.evaluate import tiny

SIZES = {"width": 64, "depth": 2, "vision_width": 32, "vision_depth": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", **SIZES)


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """Of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_there_and_back(succeeds, checkpoint, tmp_path):
    target, back = tmp_path / "converted", tmp_path / "back"
    out, err = succeeds("convert", checkpoint, target)
    assert out.startswith(f"{target}  ") and "converting" in err
    out, _ = succeeds("export", target, back, "--json")
    size = sum(tensor.nbytes for tensor in load_file(checkpoint / "model.safetensors").values())
    assert json.loads(out) == {"source": str(target), "target": str(back), "bytes": size}
    assert {file.name: file.read_bytes() for file in back.iterdir() if file.name != "config.json"} == {
        file.name: file.read_bytes() for file in checkpoint.iterdir() if file.name != "config.json"
    }
    assert json.loads((back / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "converted"]


def test_inspect_shows_provenance(succeeds, checkpoint, tmp_path):
    target = tmp_path / "converted"
    succeeds("convert", checkpoint, target, "--dtype", "bfloat16")
    out, _ = succeeds("inspect", target)
    assert "provenance" in out and str(checkpoint) in out and "<- model.embed_tokens.weight" in out
    described = json.loads(succeeds("inspect", target, "--json")[0])
    assert described["kind"] == "longvid_jax"
    assert described["provenance"]["source"] == str(checkpoint)
    assert described["provenance"]["dtype"] == "bfloat16"
    assert list(described["dtypes"]) == ["bfloat16"]
    original = json.loads(succeeds("inspect", checkpoint, "--json")[0])
    assert described["parameters"] == original["parameters"] and described["bytes"] * 2 == original["bytes"]
    assert {tensor["key"] for tensor in described["tensors"]} == {tensor["becomes"] for tensor in original["tensors"]}
    assert {tensor["comes_from"] for tensor in described["tensors"]} == {
        tensor["key"] for tensor in original["tensors"]
    }


def test_all_faults_in_one_report(capsys, copy, tmp_path):
    from longvid_jax import cli

    tensors = load_file(copy / "model.safetensors")
    for n in range(2):
        for name in ("gate", "up", "down"):
            key = f"model.layers.{n}.mlp.{name}_proj.weight"
            tensors[key.replace("_proj", "_porj")] = tensors.pop(key)
    save_file(tensors, copy / "model.safetensors")
    assert cli.main(["convert", str(copy), str(tmp_path / "target")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    head, *lines = printed.err.splitlines()
    assert head.startswith("longvid: error: ") and "12 fault(s)" in head
    assert len(lines) == 12
    wrong, right = (f"model.layers.1.mlp.up_{name}.weight" for name in ("porj", "proj"))
    assert f"  {wrong}: no parameter has this name; did you mean {right}?" in lines
    assert not (tmp_path / "target").exists()


def test_verify(succeeds, fails, checkpoint, tmp_path):
    target = tmp_path / "converted"
    succeeds("convert", checkpoint, target)
    assert "every parameter has its checksum" in succeeds("inspect", target, "--verify")[0]
    assert json.loads(succeeds("inspect", target, "--verify", "--json")[0])["verified"]
    data = max(
        (file for file in (target / "params").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    line = fails("inspect", target, "--verify")
    assert "is damaged" in line or "cannot be read" in line


def test_values_too_large_for_float16(fails, succeeds, copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][7] = 1e6
    save_file(tensors, copy / "model.safetensors")
    target = tmp_path / "converted"
    line = fails("convert", copy, target, "--dtype", "float16")
    assert "model.norm.weight has values too large for float16" in line
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    succeeds("convert", copy, target)
    assert "text/norm/scale has values too large" in fails("export", target, tmp_path / "back", "--dtype", "float16")
    for folder in (copy, target):
        with pytest.raises(lv.CheckpointError, match="text/norm/scale; load them in bfloat16 or float32"):
            lv.load(folder, dtype="float16")
        with pytest.raises(lv.OptionError, match="dtype is 'int8'"):
            lv.load(folder, dtype="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "copy"]


def damaged_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"x" + file.read_bytes()[9:])


def truncated_body(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoiled_body(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors")


def other_dtype(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")


def two_copies(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": np.ones(64, np.float32)}, folder / "b.safetensors")


def absent_shard(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (damaged_header, ["model.safetensors", "fetch this file again"]),
        (truncated_body, ["model.safetensors", "truncated at byte", "within the tensor"]),
        (spoiled_body, ["model.safetensors: model.norm.weight has NaN or infinity"]),
        (two_copies, ["b.safetensors: the tensor model.norm.weight is also in a.safetensors"]),
        (absent_shard, ["names files that are absent: model-00001-of-00001.safetensors"]),
    ],
)
def test_damaged_sources(fails, copy, tmp_path, damage, texts):
    damage(copy)
    line = fails("convert", copy, tmp_path / "target")
    assert all(text in line for text in texts), line
    assert not (tmp_path / "target").exists()


def test_a_type_that_is_not_read(capsys, copy, tmp_path):
    from longvid_jax import cli

    other_dtype(copy)
    assert cli.main(["convert", str(copy), str(tmp_path / "target")]) == 2
    assert "model.norm.weight: is stored as I8; only F64, F32, F16, BF16 are read" in capsys.readouterr().err


def test_targets_and_sources_that_do_not_do(fails, succeeds, checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "target"
    assert "TARGET is missing" in fails("convert", checkpoint)
    assert "neither a folder that exists" in fails("convert", tmp_path / "absent", target)
    assert "holds no config.json" in fails("convert", tmp_path, target)
    assert "is a file" in fails("convert", checkpoint / "config.json", target)
    assert "could it be fetched" in fails("convert", "nobody/nothing-of-the-kind", target)
    assert "has no revision 'v1'" in fails("convert", checkpoint, target, "--revision", "v1")
    assert "holds no whole params folder" in fails("export", checkpoint, target)
    succeeds("convert", checkpoint, target)
    assert "is converted already" in fails("convert", target, tmp_path / "again")
    assert "give --overwrite" in fails("convert", checkpoint, target)
    assert "lies within" in fails("convert", checkpoint, checkpoint, "--overwrite")
    assert "lies within" in fails("export", target, tmp_path, "--overwrite")
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    assert "holds something else" in fails("convert", checkpoint, other, "--overwrite")
    (other / "checkpoint-500").mkdir()  # a model with a training's checkpoints in it
    assert "holds something else" in fails("export", target, other, "--overwrite")
    shutil.rmtree(other)
    succeeds("convert", checkpoint, target, "--overwrite")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    line = fails("convert", checkpoint, tmp_path / "more")
    assert "bytes are needed" in line and "has 1,000 free" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


class Code:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parity
def test_code_in_a_pickle_is_refused(fails, copy, tmp_path):
    import torch

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(64), "more": Code(tmp_path / "ran")}, copy / "pytorch_model.bin")
    line = fails("convert", copy, tmp_path / "target")
    assert "pytorch_model.bin" in line and "code" in line
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
