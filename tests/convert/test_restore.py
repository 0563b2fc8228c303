"""From the library's own folder into modules: on any devices what was converted, and never anything else."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax import checkpoint as trees
from longvid_jax import convert
from longvid_jax.convert import load
from longvid_jax.errors import CheckpointError
from longvid_jax.models.paths import leaves
from longvid_jax.models.sharding import parameter_sharding
from tests.systems import golden

MESHES = {  # by the number of devices
    1: {},
    4: {"fsdp": 2, "tensor": 2},
    8: {"data": 2, "fsdp": 2, "tensor": 2},
}


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    return lv.make_mesh(**axes, devices=jax.devices()[:count])


def assert_same(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for our, their in zip(leaves(ours), leaves(theirs), strict=True):
        assert our.value.dtype == their.value.dtype, our.path
        np.testing.assert_array_equal(np.asarray(our.value), np.asarray(their.value), our.path)


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    """Of a converted Llama, to be damaged."""
    return shutil.copytree(converted("llama")[1], tmp_path / "copy")


@pytest.fixture(scope="module")
def rewritten(converted, tmp_path_factory):
    """A copy of a converted Llama with other arrays in it: changed by a function from paths to arrays."""

    def make(change) -> Path:
        folder = shutil.copytree(converted("llama")[1], tmp_path_factory.mktemp("rewritten") / "folder")
        arrays = trees.restore(folder / "params", trees.contents(folder / "params"))
        change(arrays)
        shutil.rmtree(folder / "params")
        trees.save(folder / "params", arrays)
        (folder / "provenance.json").unlink()
        return folder

    return make


# --- on any devices what was converted --------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "stacked"), [(False, True), (True, False)])
@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen2_vl"])
def test_the_same_as_from_the_source(converted, model, tied, stacked):
    source, target = converted(model, tied=tied)
    ours = convert.from_huggingface(target, stacked=stacked)
    assert_same(ours, convert.from_huggingface(source, stacked=stacked))
    assert {device for leaf in jax.tree.leaves(ours) for device in leaf.devices()} == {jax.local_devices()[0]}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("count", MESHES)
def test_sharded(converted, count, stacked):
    """Each device holds its shard and no more; together they are the source."""
    (source, target), mesh = converted("qwen2_vl"), mesh_of(**MESHES[count])
    shardings = partial(parameter_sharding, mesh)
    module = convert.from_huggingface(target, stacked=stacked, shardings=shardings)
    for leaf in leaves(module):
        array, sharding = leaf.value, shardings(leaf.path, leaf.value.shape)
        assert array.sharding == sharding, leaf.path
        assert [shard.device for shard in array.addressable_shards] == list(mesh.devices.flat)
        assert {shard.data.shape for shard in array.addressable_shards} == {sharding.shard_shape(array.shape)}, (
            leaf.path
        )
    kernel = (module.text.layers if stacked else module.text.layers[0]).mlp.gate.kernel.get_value()
    ways = mesh.shape["fsdp"], mesh.shape["tensor"]
    assert kernel.addressable_shards[0].data.shape[-2:] == (32 // ways[0], 48 // ways[1])
    assert_same(module, convert.from_huggingface(source, stacked=stacked))


def test_onto_another_mesh_in_another_type(converted):
    (source, target), dtype = converted("qwen2"), jnp.bfloat16
    first, second = (partial(parameter_sharding, mesh_of(**axes)) for axes in ({"fsdp": 8}, {"data": 2, "tensor": 2}))
    theirs = convert.from_huggingface(source, dtype=dtype, shardings=first)
    ours = convert.from_huggingface(target, dtype=dtype, shardings=second)
    assert_same(ours, theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(dtype)}
    values = {leaf.path: np.asarray(leaf.value) for leaf in leaves(convert.from_huggingface(source))}
    for leaf in leaves(ours):
        assert np.asarray(leaf.value).tobytes() == values[leaf.path].astype(dtype).tobytes(), leaf.path


def test_a_part_alone_is_read(converted, monkeypatch):
    source, target = converted("qwen2_vl")
    restore, asked = trees.restore, []
    monkeypatch.setattr(trees, "restore", lambda folder, wanted: asked.extend(wanted) or restore(folder, wanted))
    vision = convert.from_huggingface(target, part="vision", stacked=True)
    assert asked and all(path.startswith("vision/") for path in asked) and len(asked) == len(set(asked))
    assert_same(vision, convert.from_huggingface(source, part="vision", stacked=True))
    assert {leaf.path for leaf in leaves(vision, "vision/")} >= {"vision/patch_embed/kernel", "vision/merger/fc1/bias"}
    for part in ("audio", "config"):
        with pytest.raises(CheckpointError, match=f"has no part '{part}'"):
            convert.from_huggingface(target, part=part)


def test_a_few_at_a_time(converted, monkeypatch):
    source, target = converted("llama")
    restore, groups = trees.restore, []
    monkeypatch.setattr(trees, "restore", lambda folder, wanted: groups.append(wanted) or restore(folder, wanted))
    monkeypatch.setattr(load, "RESTORED_BYTES", 20_000)
    assert_same(convert.from_huggingface(target), convert.from_huggingface(source))
    assert len(groups) > 5
    assert max(sum(load.nbytes(spec) for spec in group.values()) for group in groups) <= 20_000


def test_the_same_answers(tmp_path):
    """lv.load of what was converted says what the Hugging Face folder says; a case that tests/systems compiles, too."""
    case = "pivotkv_r50_dpselect_frame"
    vectors, method = golden.vectors(case), golden.method(case)
    target = convert.to_orbax(golden.FOLDER / case, tmp_path / "converted")
    theirs, ours = (
        lv.load(folder, method=method, stacked=True).generate(
            **golden.inputs(vectors), max_new_tokens=6, return_cache=True
        )
        for folder in (golden.FOLDER / case, target)
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.tokens[0], vectors["new_tokens"])
    np.testing.assert_array_equal(ours.logits, theirs.logits)
    assert_same(lv.load(target, part="vision"), lv.load(golden.FOLDER / case, part="vision"))


# --- and never anything else ------------------------------------------------------------------------------------------


def fault(folder: Path, **how) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert.from_huggingface(folder, **how)
    return str(caught.value)


def test_all_faults_in_one_report(rewritten):
    def change(arrays):
        del arrays["norm/scale"]
        arrays["layers/01/mlp/upp/kernel"] = arrays.pop("layers/01/mlp/up/kernel")
        arrays["surplus"] = np.zeros(3, np.float32)
        arrays["lm_head/kernel"] = arrays["lm_head/kernel"][:-1]

    folder = rewritten(change)
    head, *faults = fault(folder).splitlines()
    assert head == f"{folder} does not fit its config.json, 5 fault(s):"
    assert sorted(line.strip() for line in faults) == [
        "layers/01/mlp/up/kernel: missing",
        "layers/01/mlp/upp/kernel: no parameter has this name; did you mean layers/01/mlp/up/kernel?",
        "lm_head/kernel: has the shape [31, 64], the config needs [32, 64]",
        "norm/scale: missing",
        "surplus: no parameter has this name",
    ]


@pytest.mark.parametrize("stacked", [False, True])
def test_a_config_of_another_model(copy, stacked):
    def with_config(**changes):
        content = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(content | changes))
        return fault(copy, stacked=stacked)

    assert "layers/04/attention/q/kernel: missing" in with_config(num_hidden_layers=5)
    assert "layers/03/attention/q/kernel: no parameter has this name" in with_config(num_hidden_layers=3)
    head, only = with_config(num_hidden_layers=4, tie_word_embeddings=True).splitlines()
    assert only == "  lm_head/kernel: no parameter has this name"
    assert "embed/embedding: has the shape [64, 32], the config needs [65, 32]" in with_config(vocab_size=65)
    assert "'hidden_size'" in with_config(hidden_size="32") or "wrong kind" in with_config(hidden_size="32")
    assert "mamba" in with_config(model_type="mamba")


def damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file of the parameters, and what is the matter with it: one at a time, and whole again afterwards."""
    files = [file for file in (folder / "params").rglob("*") if file.is_file()]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        if file.name != "orbax.checkpoint":  # which makes the folder a checkpoint
            file.unlink()
            yield file, "is missing"
            file.write_bytes(content[: len(content) // 2])
            yield file, f"has {len(content) // 2:,} bytes, but must have {len(content):,}"
        file.write_bytes(content)


def test_every_file_is_missed_by_name(copy):
    for file, matter in damaged(copy):
        assert fault(copy) == f"{file} {matter}; copy the folder again or convert again."
    convert.from_huggingface(copy)


def test_no_file_is_read_as_zeros(converted, copy):
    """Without the list of the files it is Orbax that finds out; what it does not need may be missing."""
    whole = convert.from_huggingface(converted("llama")[1])
    (copy / "provenance.json").unlink()
    told = 0
    for _, matter in damaged(copy):
        if "missing" not in matter:
            continue
        try:
            assert_same(convert.from_huggingface(copy), whole)
        except CheckpointError as error:
            told += 1
            assert str(error).startswith(f"{copy}/params") and str(error).endswith("; convert again.")
            assert "\n" not in str(error)
    assert told > 4


def test_what_is_beside(copy):
    provenance = (copy / "provenance.json").read_text()
    (copy / "provenance.json").write_text(provenance[:100])
    assert "provenance.json cannot be read as JSON" in fault(copy)
    (copy / "provenance.json").unlink()
    convert.from_huggingface(copy)
    assert convert.Checkpoint(copy).provenance == {}
    (copy / "config.json").unlink()
    assert f"{copy} holds no config.json" in fault(copy)


def test_a_folder_that_is_not_whole(copy):
    (copy / "params" / "orbax.checkpoint").unlink()
    assert (
        fault(copy) == f"{copy} holds no whole params folder of Orbax; give a folder that `longvid convert` has made."
    )
    shutil.rmtree(copy / "params")
    assert "holds no whole params folder" in fault(copy)
    assert "has no revision 'main'" in fault(copy, revision="main")


def test_reading_what_is_not_there(converted):
    checkpoint = convert.Checkpoint(converted("llama")[1])
    for path, shape, text in (
        ("norm/shift", (32,), "is not in it"),
        ("norm/scale", (31,), r"shape \[32\], not \[31\]"),
    ):
        with pytest.raises(CheckpointError, match=rf"params: {path} cannot be read \(.*{text}\); convert again\.$"):
            checkpoint.read({path: jax.ShapeDtypeStruct(shape, np.float32)})
