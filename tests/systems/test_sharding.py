"""A model spread over 8 devices gives what one device gives."""

import jax
import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax.models.paths import leaves
from longvid_jax.models.sharding import parameter_spec
from tests.systems import golden

NAME = "pivotkv_r60_dpselect_patch"


@pytest.fixture(scope="module")
def batch():
    vectors = golden.vectors(NAME)
    given = golden.inputs(vectors)
    return {name: np.concatenate([value] * 4) for name, value in given.items()}


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"tensor": 8}])
def test_sharded_prefill_and_decoding_equal_the_authors(batch, shape):
    """Sharded load and a sharded ReTaKe prefill of a batch: kept indices exactly, logits to 1e-5 of their magnitude."""
    mesh, vectors = lv.make_mesh(**shape), golden.vectors(NAME)
    model = lv.load(golden.FOLDER / NAME, method=golden.method(NAME), mesh=mesh)
    kernel = model.model.text.layers.mlp.up.kernel[...]
    shards = {shard.data.shape for shard in kernel.addressable_shards}
    assert shards == {(3, 64 // shape.get("fsdp", 1), 128 // shape["tensor"])}
    out = model.generate(**batch, max_new_tokens=6, return_cache=True)
    for row in range(4):
        np.testing.assert_allclose(
            out.logits[row], vectors["logits"], rtol=0, atol=1e-5 * np.abs(vectors["logits"]).max()
        )
        for layer, chunks in enumerate(out.trace.kept):
            for chunk, kept in enumerate(chunks):
                np.testing.assert_array_equal(kept[row], vectors[f"kept_l{layer}_c{chunk}"])
    # The cache lies as the batch (data, fsdp) and, where they divide, the kv heads (tensor) do.
    rows, heads = mesh.shape["data"] * mesh.shape["fsdp"], min(2, shape["tensor"]) if shape["tensor"] == 2 else 1
    assert out.cache.keys.addressable_shards[0].data.shape[1:3] == (4 // rows, 2 // heads)


def test_every_parameter_has_its_place():
    """The table knows each parameter of a Qwen2-VL, and splits all kernels (none is replicated)."""
    model = lv.load(golden.FOLDER / NAME).model
    for leaf in leaves(model):
        spec = parameter_spec(leaf.path, leaf.value.ndim)
        assert len(spec) <= leaf.value.ndim
        assert any(spec) == leaf.path.endswith(("kernel", "embedding")) or leaf.path.endswith("bias")
    with pytest.raises(KeyError, match="no sharding"):
        parameter_spec("text/unknown", 2)


@pytest.mark.parametrize("shape", [{"data": -1, "tensor": -1}, {"data": 3}, {"data": 0}])
def test_meshes_that_do_not_fit(shape):
    with pytest.raises(lv.OptionError, match="mesh"):
        lv.make_mesh(**shape)


def test_the_rest_of_the_devices():
    assert dict(lv.make_mesh(data=-1, tensor=2).shape) == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2}
    assert lv.make_mesh(tensor=8).devices.size == len(jax.devices())
