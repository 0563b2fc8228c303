"""Memories on disk: what comes back is what was saved, and goes on like it."""

import json

import jax
import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax.evaluate import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def frames(count: int, seed: int) -> lv.Frames:
    pixels = np.random.default_rng(seed).integers(0, 255, (1, count, 56, 56, 3), dtype=np.uint8)
    return lv.Frames(pixels, np.arange(count)[None] / 2.0, np.ones((1, count), bool))


def load(folder, mesh=None):
    return lv.load(folder, method=lv.ReTaKe(keep_ratio=0.5, chunk_frames=8), mesh=mesh)


def assert_same(memory, again):
    ours, theirs = jax.tree.flatten(memory), jax.tree.flatten(again)
    assert ours[1] == theirs[1]
    for x, y in zip(ours[0], theirs[0], strict=True):
        assert type(x) is type(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_a_memory_comes_back_and_goes_on(folder, tmp_path, axes):
    mesh = axes and lv.make_mesh(**axes)
    model = load(folder, mesh)
    memory = model.begin("Why?")
    assert_same(memory, lv.restore(lv.save(memory, tmp_path / "begun"), mesh=mesh))
    memory = model.watch(memory, frames(19, 0))  # two chunks, one of them pending, and frames that wait
    again = lv.restore(lv.save(memory, tmp_path / "watched"), mesh=mesh)
    assert_same(memory, again)
    for x, y in zip(jax.tree.leaves(memory), jax.tree.leaves(again), strict=True):
        if isinstance(x, jax.Array):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    more = frames(9, 1)
    ours, theirs = (model.answer(model.watch(m, more), max_new_tokens=6) for m in (lv.fork(memory), again))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_a_memory_from_a_mesh_on_one_device(folder, tmp_path):
    mesh = lv.make_mesh(fsdp=4, tensor=2)
    memory = load(folder, mesh).begin("Why?")
    again = lv.restore(lv.save(memory, tmp_path / "memory"))
    assert_same(memory, again)
    assert {x.sharding.num_devices for x in jax.tree.leaves(again) if isinstance(x, jax.Array)} == {1}


@pytest.fixture
def saved(folder, tmp_path):
    return lv.save(load(folder).begin("Why?"), tmp_path / "memory")


def test_overwriting(folder, saved, tmp_path):
    memory = load(folder).begin("And who?")
    with pytest.raises(lv.CheckpointError, match="already exists"):
        lv.save(memory, saved)
    assert_same(memory, lv.restore(lv.save(memory, saved, overwrite=True)))
    with pytest.raises(lv.CheckpointError, match="something else"):
        lv.save(memory, folder, overwrite=True)


def test_what_is_no_memory(folder, tmp_path):
    for place in (folder, tmp_path / "absent"):
        with pytest.raises(lv.CheckpointError, match="holds no memory.json"):
            lv.restore(place)


def test_a_structure_names_no_other_classes(saved):
    structure = json.loads((saved / "memory.json").read_text())
    for name in ("os.path", "subprocess.Popen", "longvid_jax.memory.state.fork", "longvid_jax.memory.state.jax"):
        structure["memory"]["class"] = name
        (saved / "memory.json").write_text(json.dumps(structure))
        with pytest.raises(lv.CheckpointError, match=f"damaged memory .*{name} is no class of a memory"):
            lv.restore(saved)


def test_damage(saved):
    structure = saved / "memory.json"
    whole = structure.read_text()
    structure.write_text(whole[:-9])
    with pytest.raises(lv.CheckpointError, match="damaged memory"):
        lv.restore(saved)
    content = json.loads(whole)
    content["memory"]["fields"]["expected"] = None
    structure.write_text(json.dumps(content))
    with pytest.raises(lv.CheckpointError, match="name different arrays"):
        lv.restore(saved)
    structure.write_text(json.dumps(json.loads(whole) | {"format": 1}))
    with pytest.raises(lv.CheckpointError, match="in format 1, but this version reads format 2; watch the video again"):
        lv.restore(saved)
    structure.write_text(whole)
    data = max((file for file in (saved / "arrays").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(lv.CheckpointError, match="damaged memory"):
        lv.restore(saved)
