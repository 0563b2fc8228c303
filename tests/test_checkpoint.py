"""Trees of arrays on disk: parts that become one, and restoring that gives what was asked for or says why not."""

import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import longvid_jax as lv
from longvid_jax import checkpoint

RNG = np.random.default_rng(0)
ARRAYS = {
    "text/layers/00/kernel": RNG.normal(size=(8, 6)).astype(np.float32),
    "text/layers/01/kernel": RNG.normal(size=(8, 6)).astype(jnp.bfloat16),
    "text/norm/scale": np.zeros(16, np.float16),
    "count": np.array(3, np.int32),
}


def spec(path, **how) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(ARRAYS[path].shape, ARRAYS[path].dtype, **how)


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        np.asarray(found[path]).tobytes() == array.tobytes() and found[path].dtype == array.dtype
        for path, array in expected.items()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of all arrays, which nobody changes."""
    target = tmp_path_factory.mktemp("tree") / "whole"
    checkpoint.save(target, ARRAYS)
    return target


@pytest.fixture
def parts(tmp_path) -> list[str]:
    """The parts of tmp_path / "tree", an array each."""
    return [checkpoint.add_part(tmp_path / "tree", {path: array}) for path, array in ARRAYS.items()]


def test_parts_become_one_checkpoint_and_stay(parts, tmp_path):
    assert checkpoint.parts(tmp_path / "tree") == set(parts) and len(set(parts)) == len(ARRAYS)
    assert not checkpoint.is_checkpoint(tmp_path / "tree")
    before = {file: file.stat().st_mtime_ns for file in checkpoint.parts_folder(tmp_path / "tree").rglob("*")}
    for target in (tmp_path / "first", tmp_path / "second"):
        checkpoint.merge(tmp_path / "tree", parts, target)
        assert checkpoint.is_checkpoint(target)
        assert {path: (a.shape, a.dtype) for path, a in checkpoint.contents(target).items()} == {
            path: (a.shape, a.dtype) for path, a in ARRAYS.items()
        }
        assert same(checkpoint.restore(target, {path: spec(path) for path in ARRAYS}), ARRAYS)
    shutil.rmtree(tmp_path / "first")
    assert same(checkpoint.restore(tmp_path / "second", {path: spec(path) for path in ARRAYS}), ARRAYS)
    assert before == {file: file.stat().st_mtime_ns for file in checkpoint.parts_folder(tmp_path / "tree").rglob("*")}


def test_some_of_the_parts(parts, tmp_path):
    checkpoint.remove_part(tmp_path / "tree", parts[0])
    assert checkpoint.parts(tmp_path / "tree") == set(parts[1:])
    checkpoint.merge(tmp_path / "tree", parts[1:3], tmp_path / "few")
    assert checkpoint.contents(tmp_path / "few").keys() == set(list(ARRAYS)[1:3])


def test_large_files_are_linked(tmp_path, monkeypatch):
    """Merging does not write the data again, where the file system has links; it copies them where it has none."""
    large = {"large": RNG.normal(size=(512, 1024)).astype(np.float32)}
    name = checkpoint.add_part(tmp_path / "tree", large)

    def data(folder):
        (file,) = (file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 2 << 20)
        return file.stat().st_ino

    checkpoint.merge(tmp_path / "tree", [name], tmp_path / "linked")
    part = checkpoint.parts_folder(tmp_path / "tree")
    assert data(tmp_path / "linked") == data(part)

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    checkpoint.merge(tmp_path / "tree", [name], tmp_path / "copied")
    assert data(tmp_path / "copied") != data(part)
    for target in (tmp_path / "linked", tmp_path / "copied"):
        wanted = {"large": jax.ShapeDtypeStruct((512, 1024), np.float32)}
        assert same(checkpoint.restore(target, wanted), large)


def test_a_target_that_is_there_is_left_alone(parts, folder, tmp_path):
    target = shutil.copytree(folder, tmp_path / "there")
    with pytest.raises(FileExistsError):
        checkpoint.merge(tmp_path / "tree", parts[:1], target)
    assert same(checkpoint.restore(target, {path: spec(path) for path in ARRAYS}), ARRAYS)


def test_into_dtypes_and_shardings(folder):
    path = "text/layers/00/kernel"
    (array,) = checkpoint.restore(folder, {path: jax.ShapeDtypeStruct((8, 6), jnp.bfloat16)}).values()
    assert isinstance(array, np.ndarray)
    assert same({path: array}, {path: ARRAYS[path].astype(jnp.bfloat16)})
    mesh = lv.make_mesh(fsdp=4, tensor=2)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    last = SingleDeviceSharding(jax.devices()[-1])
    wanted = {path: spec(path, sharding=sharding), "count": spec("count", sharding=last)}
    found = checkpoint.restore(folder, wanted)
    assert same(found, {name: ARRAYS[name] for name in wanted})
    assert found[path].sharding == sharding and found["count"].sharding == last
    assert {shard.data.shape for shard in found[path].addressable_shards} == {(2, 3)}


@pytest.mark.parametrize("sharding", [None, SingleDeviceSharding(jax.devices()[0])], ids=["numpy", "jax"])
def test_what_is_not_there_is_refused(folder, sharding):
    """Orbax alone would give zeros for an absent path, and any shape as it is stored."""

    def refused(error, path, shape):
        wanted = {"count": spec("count"), path: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)}
        with pytest.raises(error, match=path if error is LookupError else "shape"):
            checkpoint.restore(folder, wanted)

    refused(LookupError, "absent", (2,))
    refused(LookupError, "text/layers/02/kernel", (8, 6))
    refused(ValueError, "text/layers/00/kernel", (8, 7))
    refused(ValueError, "text/layers/00/kernel", (4, 6))
    refused(ValueError, "text/layers/00/kernel", (48,))


def test_what_is_a_checkpoint(folder, tmp_path):
    """Orbax's own test says yes to the second one."""
    (tmp_path / "notes" / "deeper").mkdir(parents=True)
    assert checkpoint.is_checkpoint(folder)
    assert not checkpoint.is_checkpoint(tmp_path / "notes")
    assert not checkpoint.is_checkpoint(tmp_path / "absent")
    assert not checkpoint.is_checkpoint(folder / "orbax.checkpoint")
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "orbax.checkpoint").unlink()
    assert not checkpoint.is_checkpoint(unfinished)


class Late:
    """Fails where nobody can be told."""

    def __init__(self, error: Exception):
        self.error = error

    def __del__(self):
        raise self.error


def test_failures_are_raised_and_not_logged_as_well(folder, tmp_path, caplog, capfd, monkeypatch):
    damaged, unraisable = shutil.copytree(folder, tmp_path / "damaged"), []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    checkpoint._silence_stragglers.cache_clear()
    wanted = {path: spec(path, sharding=SingleDeviceSharding(jax.devices()[0])) for path in ARRAYS}
    for file in damaged.rglob("d/*"):
        file.write_bytes(b"")
    with caplog.at_level(logging.INFO):
        with pytest.raises(ValueError, match="metadata are damaged"):
            checkpoint.contents(damaged)
        with pytest.raises(Exception, match="OUT_OF_RANGE|reading"):
            checkpoint.restore(damaged, wanted)
        logging.getLogger("absl").error("of others")
    for text in ("Event loop is closed", "of others"):
        Late(RuntimeError(text))
    assert [record.getMessage() for record in caplog.records] == ["of others"]
    assert [str(late.exc_value) for late in unraisable] == ["of others"]
    assert "Traceback" not in capfd.readouterr().err
