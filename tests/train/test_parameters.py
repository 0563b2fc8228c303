"""A module apart and together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from longvid_jax.errors import OptionError
from longvid_jax.models import lora
from longvid_jax.models.llama import DecoderConfig
from longvid_jax.models.paths import leaves, without_layers
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig, VisionConfig
from longvid_jax.ops.rope import Rope
from longvid_jax.train.parameters import decay_mask, split

TEXT = DecoderConfig(
    vocab_size=40, width=16, depth=3, heads=2, kv_heads=1, ff_width=24, norm_eps=1e-6, qkv_bias=True, o_bias=False,
    tied=False, rope=Rope(head_dim=8, sections=(2, 1, 1)),
)  # fmt: skip
CONFIG = Qwen2VLConfig(TEXT, VisionConfig(depth=2, width=16, out_width=16, heads=1, patch=2))
LAYOUTS = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stack"])


def model(stacked=False, dtype=jnp.float32):
    return Qwen2VL(CONFIG, dtype=dtype, stacked=stacked, rngs=nnx.Rngs(0))


@LAYOUTS
def test_apart_and_together(stacked):
    module = model(stacked)
    structure, trainable, frozen = split(module, frozen="vision/.*")
    assert list(structure.paths) == [leaf.path for leaf in leaves(module)]
    assert set(frozen) == {path for path in structure.paths if path.startswith("vision/")}
    assert set(trainable) == set(structure.paths) - set(frozen)
    again = structure.module({**frozen, **trainable})
    assert jax.tree.structure(again) == jax.tree.structure(module)
    jax.tree.map(np.testing.assert_array_equal, again, module)


@LAYOUTS
def test_dtypes(stacked):
    """float32 masters of what is trained, the compute dtype for what is not, and nothing copied without need."""
    module = model(stacked, jnp.bfloat16)
    structure, trainable, frozen = split(module, "text/layers/mlp/.*", dtype=jnp.bfloat16)
    assert {without_layers(path) for path in trainable} == {
        f"text/layers/mlp/{x}/kernel" for x in ("gate", "up", "down")
    }
    assert {value.dtype for value in trainable.values()} == {jnp.dtype(jnp.float32)}
    assert {value.dtype for value in frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    values = {leaf.path: leaf.value for leaf in leaves(module)}
    assert all(value is values[path] for path, value in frozen.items())
    for path, value in trainable.items():
        np.testing.assert_array_equal(value.astype(jnp.bfloat16), values[path])


@LAYOUTS
def test_adapters_alone_are_trained(stacked):
    module = lora.add(jax.eval_shape(lambda: model(stacked)), "text/layers/.*", 2, 4, key=jax.random.key(0))
    structure, trainable, frozen = split(module, ".*/lora_[ab]", dtype=jnp.bfloat16)
    assert len(trainable) == 2 * 7 * (1 if stacked else 3)
    assert all(isinstance(value, jax.ShapeDtypeStruct) and value.dtype == jnp.float32 for value in trainable.values())
    assert {value.dtype for value in frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(structure.module(trainable | frozen)) == jax.tree.structure(module)


def test_a_structure_is_static():
    """Equal modules have equal structures, which jit takes as one static argument; others do not."""
    calls = []

    @jax.jit
    def total(params):
        return sum(leaf.value.sum() for leaf in leaves(structure.module(params)))

    def static(structure, params):
        calls.append(structure)
        return structure.module(params).text.norm.scale[...]

    structure, params, _ = split(model())
    static = jax.jit(static, static_argnums=0)
    static(structure, params)
    static(split(model())[0], params)
    assert len(calls) == 1
    assert split(model(True))[0] != structure
    assert split(lora.add(model(), "text/lm_head", 2, 4, key=jax.random.key(0)))[0] != structure
    np.testing.assert_allclose(total(params), sum(np.asarray(x, np.float64).sum() for x in params.values()), rtol=1e-5)


def test_gradients_come_by_path():
    structure, trainable, frozen = split(model(), "text/norm/scale")
    x = jnp.arange(16.0)[None]
    grads = jax.grad(lambda params: (structure.module({**params, **frozen}).text.norm(x) * x).sum())(trainable)
    assert set(grads) == {"text/norm/scale"}
    np.testing.assert_allclose(grads["text/norm/scale"], x[0] ** 2 / np.sqrt((x**2).mean()), rtol=1e-5)


def test_params_of_another_module():
    structure, params, _ = split(model())
    scale = params.pop("text/norm/scale")
    with pytest.raises(KeyError, match=r"missing are \['text/norm/scale'\], not its own are \['norm'\]"):
        structure.module({**params, "norm": scale})


@pytest.mark.parametrize(
    ("trainable", "frozen", "said"),
    [
        (["text/.*", "visoin/.*"], (), "trainable has 'visoin/.*', .* such as .*vision/"),
        (None, ["text/layers/00/.*"], "frozen has 'text/layers/00/.*'"),
        (None, "vision", "frozen has 'vision'"),
        (None, "(", "frozen has '\\(', which is no regular expression"),
        (None, 3, "frozen is 3"),
        ([None], (), "trainable has None"),
        ("vision/.*", ".*", "nothing to train"),
    ],
)
def test_bad_patterns(trainable, frozen, said):
    with pytest.raises(OptionError, match=said) as caught:
        split(jax.eval_shape(model), trainable, frozen)
    assert str(caught.value).endswith(".")


def test_patterns_from_a_config():
    config = ConfigDict({"trainable": ("text/.*",), "frozen": ["text/embed/.*"]})
    _, trainable, _ = split(jax.eval_shape(model), config.trainable, config.frozen)
    assert "text/norm/scale" in trainable and "text/embed/embedding" not in trainable


@LAYOUTS
def test_what_decays(stacked):
    """Kernels and embeddings, by name and (as a check) by rank: norms and biases have one axis less."""
    module = jax.eval_shape(lambda: model(stacked))
    structure, params, _ = split(lora.add(module, "text/layers/.*", 2, 4, key=jax.random.key(0)))
    mask = decay_mask(structure.paths)
    for leaf in leaves(module):
        assert mask[leaf.path] == (len(leaf.part_shape) == 2), leaf.path
    assert {path for path in structure.paths if "lora" in path and mask[path]} == set()
    with_adapters = decay_mask(params, [".*/kernel", ".*/lora_[ab]"])
    assert with_adapters["text/lm_head/kernel"] and not with_adapters["text/embed/embedding"]
    assert all(with_adapters[path] for path in params if "lora" in path)
    with pytest.raises(OptionError, match="decay has '.*/weight'"):
        decay_mask(params, ".*/weight")
