"""LoRA against the same arithmetic in PyTorch, and its ways between modules, dicts and disk."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec

from longvid_jax import checkpoint, convert
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models import lora
from longvid_jax.models.layers import Linear
from longvid_jax.models.llama import Decoder, DecoderConfig, forward
from longvid_jax.models.paths import leaves
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig, VisionConfig
from longvid_jax.models.sharding import parameter_spec
from longvid_jax.ops.rope import Rope

RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 110, (2, 24))
RANK, ALPHA, KEY = 3, 12.0, jax.random.key(7)
CONFIG = DecoderConfig(
    vocab_size=40, width=16, depth=3, heads=2, kv_heads=1, ff_width=24, norm_eps=1e-6, qkv_bias=True, o_bias=False,
    tied=False, rope=Rope(head_dim=8),
)  # fmt: skip
PATTERNS = ("layers/attention/(q|v)", "layers/mlp/down", "lm_head")
DECODER = Decoder(CONFIG, rngs=nnx.Rngs(0))
LAYOUTS = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stack"])


def decoder(stacked=False, dtype=jnp.float32) -> Decoder:
    """Of the same parameters in either layout."""
    made = DECODER if dtype == jnp.float32 else jax.tree.map(lambda x: x.astype(dtype), DECODER)
    if not stacked:
        return made
    values = {leaf.path: leaf.value for leaf in leaves(made)}
    stack = jax.eval_shape(lambda: Decoder(CONFIG, stacked=True, rngs=nnx.Rngs(0)))
    parts = [[values[path] for path in leaf.part_paths] for leaf in leaves(stack)]
    whole = [jnp.stack(part) if len(part) > 1 else part[0] for part in parts]
    return jax.tree.unflatten(jax.tree.structure(stack), whole)


def random(adapters) -> dict[str, np.ndarray]:
    """Adapters of these shapes, none of them zero."""
    rng = np.random.default_rng(1)
    return {path: (0.3 * rng.normal(size=adapters[path].shape)).astype(np.float32) for path in sorted(adapters)}


def trained(stacked=False, dtype=jnp.float32) -> Decoder:
    module = lora.add(decoder(stacked, dtype), PATTERNS, RANK, ALPHA, key=KEY)
    return lora.with_adapters(module, random(lora.adapters(module)))


def arrays(module) -> dict[str, jax.Array]:
    return {leaf.path: leaf.value for leaf in leaves(module)}


logits = jax.jit(forward)


def same(module, other) -> None:
    assert jax.tree.structure(module) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, module, other)


@LAYOUTS
def test_new_adapters_change_nothing(stacked):
    plain = decoder(stacked)
    before, structure = arrays(plain), jax.tree.structure(plain)
    module = lora.add(plain, PATTERNS, RANK, ALPHA, key=KEY)
    np.testing.assert_array_equal(logits(module, IDS % 40), logits(plain, IDS % 40))
    assert jax.tree.structure(plain) == structure
    new = arrays(module)
    assert all(new[path] is value for path, value in before.items())
    added = {path: value.shape for path, value in new.items() if path not in before}
    layers = ["layers"] if stacked else ["layers/00", "layers/01", "layers/02"]
    depth = (3,) if stacked else ()
    assert added == {"lm_head/lora_a": (16, 3), "lm_head/lora_b": (3, 40)} | {
        f"{layer}/{name}/lora_{which}": (*depth, *shape)
        for layer in layers
        for name, (size_in, size_out) in {"attention/q": (16, 16), "attention/v": (16, 8), "mlp/down": (24, 16)}.items()
        for which, shape in {"a": (size_in, RANK), "b": (RANK, size_out)}.items()
    }


def test_first_values_are_those_of_the_reference():
    """torch's kaiming_uniform_(A, a=sqrt(5)) is uniform within 1 / sqrt(in); B is zero."""
    module = lora.add(Linear(400, 30, bias=False, dtype=jnp.float32, rngs=nnx.Rngs(0)), "", 64, 1, key=KEY)
    a = np.asarray(module.lora_a[...])
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(64, 400), a=5**0.5).numpy()
    assert np.abs(a).max() <= 1 / 20
    for statistic in (np.std, np.max, np.min):
        assert statistic(a) == pytest.approx(statistic(theirs), rel=0.02)
    assert abs(a.mean()) < 1e-3
    assert not np.asarray(module.lora_b[...]).any()
    assert module.lora_scale == 1 / 64


def test_values_hang_on_key_and_path_alone():
    one, other = (lora.adapters(lora.add(decoder(), PATTERNS[:n], RANK, ALPHA, key=KEY)) for n in (1, 3))
    stack = lora.adapters(lora.add(decoder(True), PATTERNS, RANK, ALPHA, key=KEY))
    assert one.keys() < other.keys() == stack.keys()
    for path, value in other.items():
        np.testing.assert_array_equal(value, stack[path])
        np.testing.assert_array_equal(value, one.get(path, value))
    a = [value for path, value in other.items() if path.endswith(("q/lora_a", "v/lora_a"))]
    assert all(not np.array_equal(x, y) for n, x in enumerate(a) for y in a[:n])
    again = lora.adapters(lora.add(decoder(), PATTERNS, RANK, ALPHA, key=jax.random.key(8)))
    assert not np.array_equal(again["lm_head/lora_a"], other["lm_head/lora_a"])


class TheirLinear(torch.nn.Module):
    """A linear map with LoRA, as peft computes it."""

    def __init__(self, base, a, b):
        super().__init__()
        self.base = base
        self.a, self.b = (torch.nn.Parameter(torch.tensor(x.T)) for x in (a, b))

    def forward(self, x):
        linear = torch.nn.functional.linear
        return self.base(x) + linear(linear(x, self.a), self.b) * (ALPHA / RANK)


@pytest.mark.parity
@LAYOUTS
def test_logits_and_gradients_are_pytorchs(tiny, stacked):
    model = tiny("Qwen2ForCausalLM")
    module = lora.add(model.ours(stacked=stacked), PATTERNS, RANK, ALPHA, key=KEY)
    given = random(lora.adapters(module))
    theirs = copy.deepcopy(model.torch).requires_grad_(False)
    wrapped = {}
    for path in {path.rsplit("/", 1)[0] for path in given}:
        *above, last = path.replace("attention/", "self_attn/").split("/")
        name = "lm_head" if last == "lm_head" else f"{'.'.join(['model', *above[:1], str(int(above[1])), *above[2:]])}"
        name, last = ("", last) if last == "lm_head" else (name, f"{last}_proj")
        parent = theirs.get_submodule(name)
        wrapped[path] = TheirLinear(getattr(parent, last), given[f"{path}/lora_a"], given[f"{path}/lora_b"])
        setattr(parent, last, wrapped[path])
    weights = RNG.normal(size=(*IDS.shape, 120)).astype(np.float32)
    expected = theirs(torch.tensor(IDS)).logits
    (expected * torch.tensor(weights)).sum().backward()

    @jax.jit
    def run(given):
        out, pull = jax.vjp(lambda given: forward(lora.with_adapters(module, given), IDS), given)
        return out, pull(weights)[0]

    out, gradients = run(given)
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-4, rtol=0)
    assert np.abs(out - logits(module, IDS)).max() > 0.1  # the adapters do something
    for path, linear in wrapped.items():
        for name, parameter in (("lora_a", linear.a), ("lora_b", linear.b)):
            truth, got = parameter.grad.numpy().T, gradients[f"{path}/{name}"]
            np.testing.assert_allclose(got, truth, atol=1e-4 * np.abs(truth).max(), rtol=0, err_msg=path)


@LAYOUTS
def test_merge_and_unmerge(stacked):
    plain, module = decoder(stacked), trained(stacked)
    merged = lora.merge(module)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    np.testing.assert_allclose(logits(merged, IDS % 40), logits(module, IDS % 40), atol=1e-4, rtol=0)
    name = "layers/attention/q" if stacked else "layers/01/attention/q"
    kernel, a, b = (np.asarray(arrays(module)[f"{name}/{leaf}"], np.float64) for leaf in ("kernel", "lora_a", "lora_b"))
    np.testing.assert_allclose(arrays(merged)[f"{name}/kernel"], kernel + a @ b * 4, atol=1e-6, rtol=0)
    back = lora.unmerge(merged, lora.adapters(module), ALPHA)
    assert jax.tree.structure(back) == jax.tree.structure(module)
    for path, value in arrays(module).items():
        np.testing.assert_allclose(arrays(back)[path], value, atol=2e-7, rtol=0, err_msg=path)
    same(lora.merge(plain), plain)


def test_merging_rounds_once():
    """In bfloat16: the sum in float32, then rounded; and adapters in float32 leave the output in bfloat16."""
    module = trained(dtype=jnp.bfloat16)
    assert module.lm_head.lora_a.dtype == jnp.float32
    kernel, a, b = (
        x[...].astype(jnp.float32) for x in (module.lm_head.kernel, *[module.lm_head.lora_a, module.lm_head.lora_b])
    )
    np.testing.assert_array_equal(lora.merge(module).lm_head.kernel[...], (kernel + (a @ b) * 4).astype(jnp.bfloat16))
    x = jnp.ones((2, 16), jnp.bfloat16)
    assert module.layers[0].attention.q(x).dtype == jnp.bfloat16
    assert module.logits(x).dtype == jnp.float32


def test_the_product_of_the_adapters_is_never_made():
    """No product in forward or backward has a kernel's shape, other than the kernels' own."""
    linear = lora.add(Linear(50, 70, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0)), "", RANK, ALPHA, key=KEY)

    def loss(adapters):
        return jnp.sum(lora.with_adapters(linear, adapters)(jnp.ones((4, 50))) ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(lora.adapters(linear))
    shapes = [out.aval.shape for line in program.eqns for out in line.outvars if line.primitive.name == "dot_general"]
    assert (4, RANK) in shapes
    assert (50, 70) not in shapes


@LAYOUTS
def test_adapters_alone_on_disk(stacked, tmp_path):
    """Written from one layout, read into the other, on a module that never had any."""
    module = trained(stacked)
    checkpoint.save(tmp_path / "adapters", lora.adapters(module))
    stored = checkpoint.contents(tmp_path / "adapters")
    assert "layers/02/attention/v/lora_b" in stored and not any("kernel" in path for path in stored)
    read = checkpoint.restore(tmp_path / "adapters", stored)
    other = lora.with_adapters(decoder(not stacked), read, ALPHA)
    same(other, trained(not stacked))
    np.testing.assert_allclose(logits(other, IDS % 40), logits(module, IDS % 40), atol=1e-5, rtol=0)


@LAYOUTS
def test_abstract_modules_and_jit(stacked):
    def shapes(module):
        return {path: (value.shape, value.dtype) for path, value in arrays(module).items()}, jax.tree.structure(module)

    plain = jax.eval_shape(lambda: decoder(stacked))
    module = lora.add(plain, PATTERNS, RANK, ALPHA, key=KEY)
    assert shapes(module) == shapes(trained(stacked))
    assert shapes(lora.merge(module)) == shapes(plain)
    assert shapes(lora.with_adapters(plain, lora.adapters(module), ALPHA)) == shapes(module)
    added = jax.jit(lambda module, key: lora.add(module, PATTERNS, RANK, ALPHA, key=key))(decoder(stacked), KEY)
    same(added, lora.add(decoder(stacked), PATTERNS, RANK, ALPHA, key=KEY))
    merged = jax.jit(lora.merge)(trained(stacked))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, lora.merge(trained(stacked)))


@LAYOUTS
def test_a_vision_tower_and_its_decoder(stacked):
    """Other linear maps, two stacks, and leaves that are where they were."""
    config = Qwen2VLConfig(CONFIG, VisionConfig(depth=2, width=16, out_width=16, heads=1, patch=2))
    plain = jax.eval_shape(lambda: Qwen2VL(config, stacked=stacked, rngs=nnx.Rngs(0)))
    module = lora.add(plain, "(vision/blocks|text/layers)/.*", RANK, ALPHA, key=KEY)
    found = {path for path in arrays(module) if path.endswith("lora_a")}
    assert len(found) == (4 + 7 if stacked else 2 * 4 + 3 * 7)
    assert [path for path in arrays(module) if "lora" not in path] == list(arrays(plain))


def test_export_does_not_lose_adapters(tiny, tmp_path):
    model = tiny("Qwen2ForCausalLM")
    config = convert.open_source(model.folder).config
    module = lora.add(model.ours(), "layers/attention/q", RANK, ALPHA, key=KEY)
    with pytest.raises(CheckpointError, match="layers/00/attention/q/lora_a has no name"):
        convert.save_huggingface(module, config, tmp_path / "out", convert.table_for(config))
    assert not (tmp_path / "out").exists()
    convert.save_huggingface(lora.merge(module), config, tmp_path / "out", convert.table_for(config))


def test_adapters_lie_as_their_kernels_do():
    spec = PartitionSpec
    assert parameter_spec("text/layers/attention/q/lora_a", 3) == spec(None, "fsdp", None)
    assert parameter_spec("text/layers/attention/q/lora_b", 3) == spec(None, None, "tensor")
    assert parameter_spec("text/layers/00/mlp/down/lora_a", 2) == spec("tensor", None)
    assert parameter_spec("text/layers/00/mlp/down/lora_b", 2) == spec(None, "fsdp")
    assert parameter_spec("vision/patch_embed/lora_a", 2) == spec(None, None)
    module = lora.add(jax.eval_shape(decoder), ".*", RANK, ALPHA, key=KEY)
    for leaf in leaves(module):
        assert len(parameter_spec(leaf.path, leaf.value.ndim)) <= leaf.value.ndim


@pytest.mark.parametrize(
    ("patterns", "rank", "alpha", "said"),
    [
        (["layers/attention/query"], 2, 1, "'layers/attention/query', .* such as .*layers/attention/[qkvo]"),
        (["layers/00/attention/q"], 2, 1, "'layers/00/attention/q', .*layers/attention/q"),
        ([*PATTERNS, "embed"], 2, 1, "'embed'"),
        ("norm", 2, 1, "'norm'"),
        ("lm_head/kernel", 2, 1, "'lm_head/kernel', .* such as lm_head"),
        ("layers/(", 2, 1, "no regular expression"),
        (PATTERNS, 0, 1, "rank is 0"),
        (PATTERNS, 2.0, 1, "rank is 2.0"),
        (PATTERNS, 2, 0, "alpha is 0"),
        (PATTERNS, 2, float("nan"), "alpha is nan"),
    ],
)
def test_bad_options(patterns, rank, alpha, said):
    with pytest.raises(OptionError, match=said) as caught:
        lora.add(jax.eval_shape(decoder), patterns, rank, alpha, key=KEY)
    assert str(caught.value).endswith(".")


def test_adapters_that_do_not_fit():
    plain, module = decoder(), trained()
    good = lora.adapters(module)
    with pytest.raises(OptionError, match="lm_head already has adapters"):
        lora.add(module, "lm_head", RANK, ALPHA, key=KEY)
    with pytest.raises(CheckpointError, match="give alpha"):
        lora.with_adapters(plain, good)
    with pytest.raises(CheckpointError, match="leave alpha out"):
        lora.with_adapters(module, good, ALPHA)
    with pytest.raises(CheckpointError, match="lm_head has adapters, but none are given"):
        lora.with_adapters(module, {path: value for path, value in good.items() if "lm_head" not in path})
    with pytest.raises(CheckpointError, match="lm_head/lora_b is missing"):
        lora.with_adapters(module, {path: value for path, value in good.items() if path != "lm_head/lora_b"})
    with pytest.raises(CheckpointError, match="layers/02/mlp/down/lora_a is missing"):
        lora.with_adapters(
            decoder(True), {path: value for path, value in good.items() if path != "layers/02/mlp/down/lora_a"}, ALPHA
        )
    with pytest.raises(CheckpointError, match="norm/lora_a is no adapter"):
        lora.with_adapters(module, {**good, "norm/lora_a": good["lm_head/lora_a"]})
    with pytest.raises(CheckpointError, match=r"shapes \[15, 3\] and \[3, 40\]"):
        lora.with_adapters(module, {**good, "lm_head/lora_a": good["lm_head/lora_a"][1:]})
