"""Rotary embedding against transformers' functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, apply_rotary_pos_emb_vision

from longvid_jax.errors import CheckpointError
from longvid_jax.models.llama import DecoderConfig
from longvid_jax.ops.rope import Rope, rotate_half

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
BASE = {
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}


def ours(config: dict, model_type: str = "llama") -> Rope:
    return DecoderConfig.from_huggingface({**BASE, **config, "model_type": model_type}).rope


YARN = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 32, "beta_slow": 1},
    {"factor": 1.0, "original_max_position_embeddings": 4096},
    {"factor": 2.5, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
    {"factor": 32.0, "original_max_position_embeddings": 128, "beta_fast": 64.0, "beta_slow": 0.5},
    {"factor": 8.0, "original_max_position_embeddings": 2048, "attention_factor": 1.0},
    {"factor": 8.0, "original_max_position_embeddings": 2048, "attention_factor": 1.7},
    {"factor": 8.0, "original_max_position_embeddings": 2048, "beta_fast": None, "beta_slow": None},
    {"factor": 4.0},  # then the original length is max_position_embeddings
]


@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("yarn", YARN, ids=lambda yarn: "-".join(map(str, yarn.values())))
def test_yarn_frequencies(yarn, head_dim, theta):
    parameters = {"rope_type": "yarn", "rope_theta": theta, **yarn}
    theirs = LlamaConfig(**BASE, head_dim=head_dim, rope_parameters=dict(parameters))
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    older = {"rope_theta": theta, "rope_scaling": {"type": "yarn", **yarn}}
    for config in ({"rope_parameters": parameters}, older):
        got, factor = ours({"head_dim": head_dim, **config}).frequencies()
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected.numpy(), rtol=3e-7, atol=0)  # a few units in the last place
        assert factor == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize(
    ("field", "value"), [("truncate", False), ("mscale", 0.7), ("mscale_all_dim", 1.3), ("partial_rotary_factor", 0.5)]
)
def test_what_would_change_the_frequencies_and_is_not_read_is_an_error(field, value):
    with pytest.raises(CheckpointError, match=field):
        ours({"rope_scaling": {"type": "yarn", "factor": 4.0, field: value}})


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("factor", [None, 1.0, 4.0, 2.5])
def test_plain_and_linear_frequencies(head_dim, theta, factor):
    scaling = {"rope_type": "default"} if factor is None else {"rope_type": "linear", "factor": factor}
    parameters = {"rope_theta": theta, **scaling}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**BASE, head_dim=head_dim, rope_parameters=dict(parameters)))
    older = {"rope_theta": theta, "rope_scaling": None if factor is None else {"type": "linear", "factor": factor}}
    for config in ({"rope_parameters": parameters}, older):
        got, magnitude = ours({"head_dim": head_dim, **config}).frequencies()
        np.testing.assert_allclose(got, theirs.inv_freq.numpy(), rtol=3e-7, atol=0)
        assert magnitude == theirs.attention_scaling == 1.0


SCALINGS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256},
]


@pytest.mark.parametrize("parameters", SCALINGS, ids=lambda p: p["rope_type"])
def test_one_axis(parameters):
    q, k = (RNG.normal(size=(2, heads, 600, 16)).astype(np.float32) for heads in (4, 2))
    positions = np.stack([np.arange(600), np.arange(600)[::-1] + 900])
    theirs = LlamaRotaryEmbedding(LlamaConfig(**BASE, rope_parameters=dict(parameters)))
    cos, sin = theirs(torch.tensor(q), torch.tensor(positions))
    rope = jax.jit(ours({"rope_parameters": parameters}).__call__)
    for x, expected in zip((q, k), apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), cos, sin), strict=True):
        # Positions up to 1500 in float32: a unit in the last place of an angle is 1e-4.
        np.testing.assert_allclose(rope(x, positions[..., None]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("parameters", SCALINGS, ids=lambda p: p["rope_type"])
@pytest.mark.parametrize("sections", [(2, 3, 3), (4, 2, 2)])
def test_three_axes(parameters, sections):
    parameters = {**parameters, "mrope_section": list(sections)}
    q, k = (RNG.normal(size=(2, heads, 200, 16)).astype(np.float32) for heads in (4, 2))
    positions = RNG.integers(0, 1500, (2, 200, 3))
    theirs = Qwen2VLRotaryEmbedding(Qwen2VLTextConfig(**BASE, rope_parameters=dict(parameters)))
    cos, sin = theirs(torch.tensor(q), torch.tensor(positions).permute(2, 0, 1))
    rope = jax.jit(ours({"rope_parameters": parameters}, "qwen2_vl").__call__)
    for x, expected in zip((q, k), apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), cos, sin), strict=True):
        np.testing.assert_allclose(rope(x, positions), expected, atol=1e-4, rtol=0)


def test_equal_positions_on_three_axes_are_one_axis():
    x = RNG.normal(size=(1, 2, 50, 16)).astype(np.float32)
    positions = RNG.integers(0, 500, (1, 50, 1))
    np.testing.assert_array_equal(Rope(16, sections=(2, 3, 3))(x, positions.repeat(3, -1)), Rope(16)(x, positions))


def test_rotate_half_as_in_the_vision_tower():
    q, k = (RNG.normal(size=(30, 4, 16)).astype(np.float32) for _ in range(2))
    angles = RNG.normal(size=(30, 8)).astype(np.float32) * 5
    both = torch.tensor(np.concatenate([angles, angles], axis=-1))
    expected = apply_rotary_pos_emb_vision(torch.tensor(q), torch.tensor(k), both.cos(), both.sin())
    for x, theirs in zip((q, k), expected, strict=True):
        got = rotate_half(jnp.swapaxes(x, 0, 1), np.cos(angles), np.sin(angles))
        np.testing.assert_allclose(jnp.swapaxes(got, 0, 1), theirs, atol=1e-5, rtol=0)


def test_low_precision_is_turned_in_float32():
    x = jnp.asarray(RNG.normal(size=(1, 1, 20, 16)), jnp.bfloat16)
    positions = np.arange(20)[None, :, None] + 5000
    got = Rope(16)(x, positions)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, Rope(16)(x.astype(jnp.float32), positions).astype(jnp.bfloat16))
