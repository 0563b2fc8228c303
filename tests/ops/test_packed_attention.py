"""Attention of conversations packed behind what they share, against plain attention with the same mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.ops import attention
from longvid_jax.ops.attention import Keys, Packed, attend, attend_packed


def packed_case(prefix, lengths, total, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for sizes in lengths:
        groups = np.repeat(np.arange(len(sizes) + 1), [prefix, *sizes])
        rows.append(np.pad(groups, (0, total - len(groups)), constant_values=-1))
    groups = np.array(rows, np.int32)
    q, k, v = (rng.normal(size=(len(rows), heads, total, 8)).astype(np.float32) for heads in (4, 2, 2))
    return q, Keys(k, v, groups >= 0, causal=True, groups=jnp.asarray(groups))


@pytest.mark.parametrize(
    ("prefix", "lengths", "total"),
    [
        (20, [[30, 5, 64, 1, 17], [3] * 10], 150),
        (1, [[64, 64, 40], [2, 2, 64]], 200),
        (90, [[33, 31], [10, 60]], 161),
        (16, [[12]], 40),
    ],
)
@pytest.mark.parametrize("slack", [0, 7])
def test_packed_conversations_as_all_at_once(prefix, lengths, total, slack):
    """Values and gradients are those of plain attention with the same mask; a prefix may be told too long."""
    q, keys = packed_case(prefix, lengths, total)
    packed, real = Packed(prefix + slack, 64), keys.valid[:, None, :, None]

    def plain(q, k, v):
        out = attend(q, keys._replace(k=k, v=v), groups=keys.groups)
        return (jnp.where(real, out, 0) ** 2).sum(), out

    def fast(q, k, v):
        out = attend_packed(q, keys._replace(k=k, v=v), packed)
        return (jnp.where(real, out, 0) ** 2).sum(), out

    results = [jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(q, keys.k, keys.v) for f in (plain, fast)]
    ((_, one), moves), ((_, other), others) = results
    np.testing.assert_allclose(jnp.where(real, one, 0), jnp.where(real, other, 0), atol=2e-6)
    for a, b in zip(moves, others, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_packed_attention_in_blocks_of_queries(monkeypatch):
    q, keys = packed_case(40, [[30] * 12], 400)
    whole = attend_packed(q, keys, Packed(40, 32))
    monkeypatch.setattr(attention, "BLOCK_BYTES", 4 * 4 * 40 * 64)
    np.testing.assert_allclose(attend_packed(q, keys, Packed(40, 32)), whole, atol=1e-6)


def test_work_of_packed_conversations_grows_with_their_number():
    def largest(count):
        q, keys = packed_case(32, [[32] * count], 32 * (count + 1))
        jaxpr = jax.make_jaxpr(lambda q: attend_packed(q, keys, Packed(32, 32)))(q)
        return max(np.prod(v.aval.shape) for e in jaxpr.jaxpr.eqns for v in e.outvars)

    assert largest(64) < 2.2 * largest(32)
