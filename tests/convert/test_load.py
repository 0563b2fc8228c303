"""Filling modules: every value in its place, strictly, from slices."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from longvid_jax.convert.load import check_finite, fill, plan
from longvid_jax.convert.source import Source, open_source
from longvid_jax.convert.tables import table_for
from longvid_jax.errors import CheckpointError
from longvid_jax.models.paths import leaves


def load(checkpoints, folder, *, stacked=False, **how):
    source = open_source(folder)
    return fill(source, checkpoints.abstract(source.config, stacked=stacked), table_for(source.config), **how)


def values(module) -> dict[str, np.ndarray]:
    """Every array of a module by its canonical path."""
    return {
        path: np.asarray(leaf.value)[n] if leaf.stacked else np.asarray(leaf.value)
        for leaf in leaves(module)
        for n, path in enumerate(leaf.part_paths)
    }


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen2_vl"])
def test_every_value_in_its_place(checkpoints, model, tied, stacked):
    tensors = checkpoints.tensors(model, tied=tied)
    found = values(load(checkpoints, checkpoints.make(model, tied=tied), stacked=stacked))
    assert sum(array.size for array in found.values()) == sum(t.size for t in tensors.values())
    text = "text/" if model == "qwen2_vl" else ""
    expected = {
        f"{text}embed/embedding": tensors["model.embed_tokens.weight"],
        f"{text}norm/scale": tensors["model.norm.weight"],
    }
    if not tied:
        expected[f"{text}lm_head/kernel"] = tensors["lm_head.weight"].T
    for n in range(4):
        ours, theirs = f"{text}layers/{n:02d}", f"model.layers.{n}"
        expected[f"{ours}/attention_norm/scale"] = tensors[f"{theirs}.input_layernorm.weight"]
        expected[f"{ours}/mlp_norm/scale"] = tensors[f"{theirs}.post_attention_layernorm.weight"]
        for name in "qkvo":
            expected[f"{ours}/attention/{name}/kernel"] = tensors[f"{theirs}.self_attn.{name}_proj.weight"].T
            if model != "llama" and name != "o":
                expected[f"{ours}/attention/{name}/bias"] = tensors[f"{theirs}.self_attn.{name}_proj.bias"]
        for name in ("gate", "up", "down"):
            expected[f"{ours}/mlp/{name}/kernel"] = tensors[f"{theirs}.mlp.{name}_proj.weight"].T
    if model == "qwen2_vl":
        expected["vision/patch_embed/kernel"] = tensors["visual.patch_embed.proj.weight"].reshape(16, -1).T
        pairs = {"vision/merger/fc1": "visual.merger.mlp.0", "vision/merger/fc2": "visual.merger.mlp.2"}
        norms = {"vision/merger/norm": "visual.merger.ln_q"}
        for n in range(2):
            ours, theirs = f"vision/blocks/{n:02d}", f"visual.blocks.{n}"
            pairs |= {f"{ours}/attention/{name}": f"{theirs}.attn.{name}" for name in ("qkv", "proj")}
            pairs |= {f"{ours}/mlp/{name}": f"{theirs}.mlp.{name}" for name in ("fc1", "fc2")}
            norms |= {f"{ours}/{name}": f"{theirs}.{name}" for name in ("norm1", "norm2")}
        expected |= {f"{ours}/kernel": tensors[f"{theirs}.weight"].T for ours, theirs in pairs.items()}
        expected |= {f"{ours}/scale": tensors[f"{theirs}.weight"] for ours, theirs in norms.items()}
        expected |= {f"{ours}/bias": tensors[f"{theirs}.bias"] for ours, theirs in {**pairs, **norms}.items()}
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize("tied", [False, True])
def test_the_newer_prefixes_are_the_same_model(checkpoints, tied):
    older = values(load(checkpoints, checkpoints.make("qwen2_vl", tied=tied)))
    newer = values(load(checkpoints, checkpoints.make("qwen2_vl", tied=tied, change=checkpoints.newer_prefixes)))
    jax.tree.map(np.testing.assert_array_equal, older, newer)


def test_shards_are_the_same_model(checkpoints):
    one = values(load(checkpoints, checkpoints.make("qwen2")))
    (checkpoints.folder / "checkpoint" / "model.safetensors").unlink()
    many = values(load(checkpoints, checkpoints.make("qwen2", shards=3)))
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.parametrize("stacked", [False, True])
def test_dtypes(checkpoints, stacked):
    folder = checkpoints.make("qwen2_vl", dtype=ml_dtypes.bfloat16)
    tensors = checkpoints.tensors("qwen2_vl", dtype=ml_dtypes.bfloat16)
    stored = load(checkpoints, folder, stacked=stacked)
    assert {leaf.value.dtype for leaf in leaves(stored)} == {jnp.dtype(jnp.bfloat16)}
    wide = values(load(checkpoints, folder, stacked=stacked, dtype=jnp.float32))
    np.testing.assert_array_equal(
        wide["text/layers/03/mlp/gate/kernel"], tensors["model.layers.3.mlp.gate_proj.weight"].T.astype(np.float32)
    )
    np.testing.assert_array_equal(values(stored)["text/norm/scale"], tensors["model.norm.weight"])


def test_float64_becomes_what_jax_has(checkpoints):
    assert {leaf.value.dtype for leaf in leaves(load(checkpoints, checkpoints.make(dtype=np.float64)))} == {
        jnp.dtype(jnp.float32)
    }


def test_ignored_buffers(checkpoints):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    load(checkpoints, checkpoints.make("llama", change=change))


# Strictness


def report(checkpoints, folder) -> list[str]:
    source = open_source(folder)
    with pytest.raises(CheckpointError) as caught:
        plan(source, checkpoints.abstract(source.config), table_for(source.config))
    lead, *faults = str(caught.value).splitlines()
    assert lead == f"{folder} does not fit its config.json, {len(faults)} fault(s):"
    return [fault.strip() for fault in faults]


def test_one_report_of_all_faults(checkpoints):
    def change(tensors):
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        tensors["model.layers.1.mlp.gate_prj.weight"] = tensors.pop("model.layers.1.mlp.gate_proj.weight")
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
        tensors["model.layers.4.input_layernorm.weight"] = np.zeros(32, np.float32)
        tensors["score.weight"] = np.zeros((2, 32), np.float32)
        tensors["model.norm.weight"] = np.zeros(32, np.int8)

    faults = report(checkpoints, checkpoints.make(change=change))
    gate = "model.layers.1.mlp.gate_proj.weight"
    assert sorted(faults) == sorted(
        [
            "model.layers.0.self_attn.k_proj.weight: missing; layers/00/attention/k/kernel needs it",
            f"model.layers.1.mlp.gate_prj.weight: no parameter has this name; did you mean {gate}?",
            f"{gate}: missing; layers/01/mlp/gate/kernel needs it",
            "model.layers.2.mlp.up_proj.weight: has the shape [32, 48], the config needs [48, 32]",
            "model.layers.4.input_layernorm.weight: would be layers/04/attention_norm/scale, "
            "which the model of this config does not have",
            "score.weight: no parameter has this name",
            "model.norm.weight: is stored as I8; only F64, F32, F16, BF16 are read",
        ]
    )


def test_missing_tensors_are_named_in_the_spelling_of_the_checkpoint(checkpoints):
    def change(tensors):
        del tensors["visual.patch_embed.proj.weight"], tensors["model.norm.weight"]
        return checkpoints.newer_prefixes(tensors)

    faults = report(checkpoints, checkpoints.make("qwen2_vl", change=change))
    assert set(faults) == {
        "model.visual.patch_embed.proj.weight: missing; vision/patch_embed/kernel needs it",
        "model.language_model.norm.weight: missing; text/norm/scale needs it",
    }


def test_both_spellings_of_one_tensor(checkpoints):
    def change(tensors):
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"]

    (fault,) = report(checkpoints, checkpoints.make("qwen2_vl", change=change))
    assert "would fill text/norm/scale again" in fault


def test_a_patch_kernel_of_another_size(checkpoints):
    def change(tensors):
        tensors["visual.patch_embed.proj.weight"] = np.zeros((16, 3, 1, 4, 4), np.float32)

    (fault,) = report(checkpoints, checkpoints.make("qwen2_vl", change=change))
    assert fault == "visual.patch_embed.proj.weight: has the shape [16, 3, 1, 4, 4], the config needs [16, 3, 2, 4, 4]"


def test_untied_without_an_output_layer(checkpoints):
    def change(tensors):
        del tensors["lm_head.weight"]

    (fault,) = report(checkpoints, checkpoints.make(change=change))
    assert fault == "lm_head.weight: missing; lm_head/kernel needs it"


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_with_an_output_layer_of_its_own(checkpoints, same):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 0 if same else 1

    folder = checkpoints.make(tied=True, change=change)
    if same:
        assert "lm_head/kernel" not in values(load(checkpoints, folder))
    else:
        with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
            load(checkpoints, folder)


# Sharding and memory


def by_size(mesh):
    """All axes of a parameter split as far as they can be, a stack's layers not."""

    def sharding(path, shape):
        stack = ("layers" in path or "blocks" in path) and not any(s.isdigit() for s in path.split("/"))
        names = [None] * stack + ["fsdp", "tensor"][: len(shape) - stack]
        return NamedSharding(mesh, PartitionSpec(*names))

    return sharding


@pytest.mark.parametrize("stacked", [False, True])
def test_sharded_equals_unsharded_and_reads_each_byte_once(checkpoints, stacked, monkeypatch):
    folder = checkpoints.make("qwen2_vl")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    read = []
    original = Source.read
    monkeypatch.setattr(Source, "read", lambda *a: read.append(original(*a)) or read[-1])
    module = load(checkpoints, folder, stacked=stacked, shardings=by_size(mesh))
    # a kernel's patch axis is cut only after reading, so patch_embed is read once for each of the four on that axis
    patch_bytes = checkpoints.tensors("qwen2_vl")["visual.patch_embed.proj.weight"].nbytes
    total = sum(tensor.nbytes for tensor in checkpoints.tensors("qwen2_vl").values())
    assert sum(part.nbytes for part in read) == total + 3 * patch_bytes
    for leaf in leaves(module):
        assert leaf.value.sharding == by_size(mesh)(leaf.path, leaf.value.shape)
    jax.tree.map(np.testing.assert_array_equal, values(module), values(load(checkpoints, folder)))


def test_a_stack_split_over_its_layers(checkpoints):
    folder = checkpoints.make()
    mesh = jax.make_mesh((4, 2), ("stage", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(path, shape):
        return NamedSharding(mesh, PartitionSpec("stage") if path.startswith("layers") else PartitionSpec())

    module = load(checkpoints, folder, stacked=True, shardings=sharding)
    assert module.layers.mlp.up.kernel.get_value().addressable_shards[0].data.shape == (1, 32, 48)
    jax.tree.map(np.testing.assert_array_equal, values(module), values(load(checkpoints, folder)))


def test_one_device_by_default(checkpoints):
    module = load(checkpoints, checkpoints.make(), stacked=True)
    assert {leaf.value.sharding for leaf in leaves(module)} == {SingleDeviceSharding(jax.devices()[0])}


def test_the_host_holds_a_few_layers_of_a_leaf_at_most(checkpoints):
    """A stack of 32 layers of 1 MB each, read to bfloat16, needs less than four of them on the way."""
    depth, width = 32, 512
    config = {**checkpoints.config("llama", tied=True), "num_hidden_layers": depth, "hidden_size": width}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": width}
    layer = {f"self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
    layer |= {f"mlp.{p}_proj.weight": (width, width) for p in ("gate", "up", "down")}
    layer |= {f"{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
    tensors = {
        f"model.layers.{n}.{key}": np.ones(shape, np.float32) for n in range(depth) for key, shape in layer.items()
    }
    tensors |= {
        "model.embed_tokens.weight": np.ones((64, width), np.float32),
        "model.norm.weight": np.ones(width, np.float32),
    }
    source = open_source(checkpoints.write(checkpoints.folder / "deep", config, tensors))
    del tensors
    module = checkpoints.abstract(config, stacked=True)
    fill(source, module, table_for(config), dtype=jnp.bfloat16)  # compiles
    tracemalloc.start()
    try:
        fill(source, module, table_for(config), dtype=jnp.bfloat16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * width * width * 4, peak


@pytest.mark.parametrize("stacked", [False, True])
def test_check_finite_names_the_parameter(checkpoints, stacked):
    def change(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
        tensors["model.norm.weight"][0] = np.inf

    check_finite(load(checkpoints, checkpoints.make(), stacked=stacked))
    with pytest.raises(CheckpointError, match=r"in layers/02/mlp/up/kernel, norm/scale; the checkpoint is damaged"):
        check_finite(load(checkpoints, checkpoints.make(change=change), stacked=stacked))
