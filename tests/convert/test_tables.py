"""The tables, in both directions."""

import numpy as np
import pytest

from longvid_jax.convert.ops import Keep, PatchKernel, Transpose
from longvid_jax.convert.tables import architecture, table_for
from longvid_jax.errors import CheckpointError


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen2_vl"])
def test_every_tensor_has_a_place_and_the_way_back(checkpoints, model):
    table = table_for(checkpoints.config(model))
    targets = set()
    for key in checkpoints.shapes(model):
        path, op = table.target(key)
        assert table.source(path) == (key, op)
        targets.add(path)
    assert len(targets) == len(checkpoints.shapes(model))


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("model.layers.7.mlp.gate_proj.weight", "text/layers/07/mlp/gate/kernel"),
        ("model.language_model.layers.7.mlp.gate_proj.weight", "text/layers/07/mlp/gate/kernel"),
        ("model.layers.123.self_attn.k_proj.bias", "text/layers/123/attention/k/bias"),
        ("visual.merger.mlp.2.bias", "vision/merger/fc2/bias"),
        ("model.visual.blocks.31.norm1.weight", "vision/blocks/31/norm1/scale"),
        ("lm_head.weight", "text/lm_head/kernel"),
    ],
)
def test_paths(checkpoints, key, path):
    assert table_for(checkpoints.config("qwen2_vl")).target(key)[0] == path


def test_buffers_of_old_checkpoints_are_ignored_and_nothing_else(checkpoints):
    table = table_for(checkpoints.config("llama"))
    assert table.is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not any(table.is_ignored(key) for key in checkpoints.shapes("qwen2_vl"))
    assert table.target("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert table.target("model.layers.0.mlp.gate_proj.weightx") is None


@pytest.mark.parametrize(
    ("op", "shape"), [(Keep(), (6,)), (Transpose(), (6, 10)), (PatchKernel(3, 2, 4), (10, 3, 2, 4, 4))]
)
def test_operations_invert_and_read_parts(op, shape):
    tensor = np.random.default_rng(0).normal(size=shape)
    whole = op.read(lambda index: tensor[index], (slice(None),) * (1 if len(shape) == 1 else 2))
    assert op.source_shape(whole.shape) == shape
    np.testing.assert_array_equal(op.invert(whole), tensor)
    part = tuple(slice(2, 5) for _ in whole.shape)
    np.testing.assert_array_equal(op.read(lambda index: tensor[index], part), whole[part])


def test_patch_kernel_is_a_convolution_over_whole_patches():
    """Against the sum that defines a Conv3d whose stride is its size."""
    rng = np.random.default_rng(0)
    weight, patch = rng.normal(size=(5, 3, 2, 4, 4)), rng.normal(size=(3, 2, 4, 4))
    kernel = PatchKernel(3, 2, 4).read(lambda index: weight[index], (slice(None), slice(None)))
    np.testing.assert_allclose(patch.reshape(-1) @ kernel, np.einsum("dctij,ctij->d", weight, patch), rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "qwen2"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "qwen2_vl"),
    ],
)
def test_architecture(config, model):
    assert architecture(config) == model


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "model_type 'mistral'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures ['GPT2LMHeadModel'] and no model_type"),
        ({}, "architectures [] and no model_type"),
    ],
)
def test_unknown_architecture_lists_what_is_supported(config, named):
    with pytest.raises(CheckpointError) as caught:
        architecture(config)
    assert named in str(caught.value)
    assert "llama, qwen2, qwen2_vl" in str(caught.value)
