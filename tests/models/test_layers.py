"""Attention with its maps, folded where one side is few, against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longvid_jax.models import lora
from longvid_jax.models.layers import MultiHeadAttention
from longvid_jax.train import flops
from tests.models.rewind_oracle import randomised

WIDTH, KV_WIDTH, HEADS = 24, 10, 3
# Neither side is few; the queries are; the others are; both are, as those of a clip's few frames.
SIZES = [(11, 13), (2, 30), (50, 2), (4, 4)]


def expected(module, x, others, valid):
    """A loop over rows and heads."""
    maps = {}
    for name in "qkvo":
        linear = getattr(module, name)
        kernel, bias = np.float64(linear.kernel[...]), np.float64(linear.bias[...])
        if linear.lora_a is not None:
            kernel = kernel + np.float64(linear.lora_a[...]) @ np.float64(linear.lora_b[...]) * linear.lora_scale
        maps[name] = lambda y, kernel=kernel, bias=bias: np.float64(y) @ kernel + bias
    rows, size = [], WIDTH // HEADS
    for row, seen in enumerate(valid):
        q, k, v = maps["q"](x[row % len(x)]), maps["k"](others[row, seen]), maps["v"](others[row, seen])
        context = []
        for part in (slice(head * size, (head + 1) * size) for head in range(HEADS)):
            weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
            context.append(weights @ v[:, part] / weights.sum(1, keepdims=True))
        rows.append(maps["o"](np.concatenate(context, axis=1)))
    return np.stack(rows)


@pytest.fixture(scope="module")
def module():
    sizes = {"width": WIDTH, "heads": HEADS, "kv_width": KV_WIDTH}
    return randomised(lambda: MultiHeadAttention(**sizes, dtype=jnp.float32, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("n", "s"), SIZES)
def test_attention(module, rng, n, s, shared, adapters):
    """With keys that do not count, with the same x for all rows, and with adapters on all maps."""
    if adapters:
        module = lora.add(module, ".*", 2, 4.0, key=jax.random.key(0))
        values = {path: rng.normal(size=x.shape) * 0.3 for path, x in lora.adapters(module).items()}
        module = lora.with_adapters(module, jax.tree.map(np.float32, values))
    x = rng.normal(size=(1 if shared else 3, n, WIDTH)).astype(np.float32)
    others = rng.normal(size=(3, s, KV_WIDTH)).astype(np.float32)
    valid = np.arange(s) < np.array([[s], [1], [2]])
    got = jax.jit(MultiHeadAttention.__call__)(module, x, others, valid)
    np.testing.assert_allclose(got, expected(module, x, others, valid), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("n", "s"), SIZES)
def test_folding_takes_fewer_products(module, n, s):
    """Than keys and values of all others do with the queries and what comes out; without it there are as many."""
    x, others = jnp.zeros((1, n, WIDTH)), jnp.zeros((1, s, KV_WIDTH))
    usual = 2 * WIDTH * (2 * n * WIDTH + 2 * s * KV_WIDTH + 2 * n * s)
    took = flops.count(jax.make_jaxpr(lambda *given: module(*given))(x, others).jaxpr)
    assert took < 0.75 * usual if (n, s) in ((2, 30), (50, 2)) else took == usual


@pytest.mark.parametrize(("n", "s"), SIZES)
def test_gradients(module, rng, n, s):
    """Of every map, against those of the attention written out."""
    x, others = (rng.normal(size=size).astype(np.float32) for size in ((2, n, WIDTH), (2, s, KV_WIDTH)))

    def written_out(module, x, others):
        q, k, v = (y.reshape(*y.shape[:2], HEADS, -1) for y in (module.q(x), module.k(others), module.v(others)))
        weights = jax.nn.softmax(jnp.einsum("bnhd,bshd->bhns", q, k) / np.sqrt(WIDTH // HEADS))
        return module.o(jnp.einsum("bhns,bshd->bnhd", weights, v).reshape(x.shape))

    def gradients(function):
        return jax.jit(jax.grad(lambda *given: jnp.square(function(*given)).sum(), (0, 1, 2)))(module, x, others)

    ours, theirs = (jax.tree.leaves(gradients(f)) for f in (MultiHeadAttention.__call__, written_out))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1, np.abs(other).max()), rtol=0)
