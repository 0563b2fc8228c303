"""A scanned stack and a loop over a tuple are the same."""

import jax
import jax.numpy as jnp
import numpy as np

from longvid_jax.ops.layers import depth, layers

RNG = np.random.default_rng(0)
TUPLE = tuple({"w": jnp.asarray(RNG.normal(size=(5, 5)), jnp.float32)} for _ in range(4))
STACK = jax.tree.map(lambda *xs: jnp.stack(xs), *TUPLE)


def fn(layer, index, carry):
    x, log = carry
    x = jnp.tanh(x @ layer["w"]) + index
    return x, log.at[index].set(x.sum())


def test_scan_equals_loop_equals_numpy():
    x = RNG.normal(size=(2, 5)).astype(np.float32)
    start = (jnp.asarray(x), jnp.zeros(4))
    scanned, looped = layers(fn, STACK, start), layers(fn, TUPLE, start)
    sums = []
    for index, layer in enumerate(TUPLE):
        x = np.tanh(x @ np.asarray(layer["w"])) + index
        sums.append(x.sum())
    for got in (scanned, looped):
        np.testing.assert_allclose(got[0], x, rtol=1e-5)
        np.testing.assert_allclose(got[1], sums, rtol=1e-5)


def test_a_loop_gives_python_integers():
    indices = []
    layers(lambda layer, index, carry: indices.append(index), TUPLE, None)
    assert indices == [0, 1, 2, 3]
    assert all(type(index) is int for index in indices)


def test_depth():
    assert depth(STACK) == depth(TUPLE) == 4
