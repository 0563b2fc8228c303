"""Operations counted from a program, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.train import flops


def counted(function, *arguments) -> float:
    return flops.count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert counted(jnp.matmul, a, b) == 2 * 3 * 5 * 7
    q, k = jnp.ones((2, 4, 6, 8)), jnp.ones((2, 4, 9, 8))
    assert counted(lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k), q, k) == 2 * 2 * 4 * 6 * 9 * 8


def test_a_scan_counts_as_often_as_it_runs_and_a_gradient_three_times():
    x, ws = jnp.ones((3, 5)), jnp.ones((4, 5, 5))

    def network(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()

    once = 4 * 2 * 3 * 5 * 5
    assert counted(jax.jit(network), ws, x) == once
    # Backwards: with respect to the weights and to what goes in.
    assert counted(jax.jit(jax.grad(network, (0, 1))), ws, x) == 3 * once


def test_the_costlier_branch_counts():
    a = jnp.ones((4, 4))
    assert counted(lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a @ a, a), a) == 2 * 2 * 4**3


def test_it_is_what_xla_counts():
    a, b = jnp.ones((64, 128)), jnp.ones((128, 32))
    compiled = jax.jit(lambda a, b: a @ b).lower(a, b).compile()
    assert counted(jnp.matmul, a, b) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)


def test_peak():
    assert np.isfinite(flops.peak("float32")) and flops.peak("float32") > 1e8
