"""Attention and its column sums against a float64 softmax, whole and in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.ops import attention
from longvid_jax.ops.attention import Keys

RNG = np.random.default_rng(0)


# Compiled anew for each test: how queries are walked is not among the arguments.
def attend(q, *runs, **how):
    return jax.jit(
        lambda q, arrays: attention.attend(q, *[Keys(*a, r.causal) for a, r in zip(arrays, runs, strict=True)], **how)
    )(q, [run[:3] for run in runs])


def column_sums(*args, **how):
    return jax.jit(lambda *args: attention.column_sums(*args, **how))(*args)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def weights_of(q, runs, scale):
    """softmax(q k^T) float64 [B, H, N, all keys], written out head by head; runs are (k, valid, causal)."""
    batch, heads, length, _ = q.shape
    parts = []
    for k, valid, causal in runs:
        shared = np.repeat(k.astype(np.float64), heads // k.shape[1], axis=1)  # head h reads kv head h // (H / K)
        logits = np.einsum("bhnd,bhsd->bhns", q.astype(np.float64), shared) * scale
        seen = np.ones((batch, 1, length, k.shape[2]), bool)
        if valid is not None:
            seen &= valid[:, None, None]
        if causal:
            seen &= np.arange(k.shape[2]) <= np.arange(length)[:, None]
        parts.append(np.where(seen, logits, -np.inf))
    logits = np.concatenate(parts, axis=-1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def expected_attention(q, runs, scale):
    weights = weights_of(q, [(k, valid, causal) for k, _, valid, causal in runs], scale)
    v = np.concatenate(
        [np.repeat(v.astype(np.float64), q.shape[1] // v.shape[1], axis=1) for _, v, _, _ in runs], axis=2
    )
    return np.einsum("bhns,bhsd->bhnd", weights, v)


@pytest.fixture(params=[None, 1], ids=["whole", "blocks"])
def walk(request, monkeypatch):
    """All queries at once, or in the smallest blocks there are (64 queries)."""
    if request.param is not None:
        monkeypatch.setattr(attention, "BLOCK_BYTES", request.param)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 150])
def test_causal_attention_over_past_and_own_keys(walk, heads, kv_heads, length):
    q = normal(2, heads, length, 8)
    past = (normal(2, kv_heads, 37, 8), normal(2, kv_heads, 37, 8), RNG.random((2, 37)) < 0.5, False)
    own = (
        normal(2, kv_heads, length, 8),
        normal(2, kv_heads, length, 8),
        np.arange(length) < [[length], [1 + length // 2]],
        True,
    )
    got = attend(q, Keys(*past), Keys(*own))
    assert got.shape == q.shape
    np.testing.assert_allclose(got, expected_attention(q, [past, own], 8**-0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_runs_come_under_one_softmax_in_any_order(walk, order):
    q = normal(1, 2, 130, 4)
    runs = [
        (normal(1, 2, size, 4), normal(1, 2, size, 4), valid, False)
        for size, valid in ((5, None), (70, None), (3, None))
    ]
    got = attend(q, *[Keys(*runs[i]) for i in order], scale=0.7)
    np.testing.assert_allclose(got, expected_attention(q, runs, 0.7), atol=1e-5, rtol=0)


def test_groups_see_themselves_and_what_all_share(walk):
    """Two conversations behind one prefix, and padding: each row of queries as if the other were not there."""
    q, k, v = normal(1, 4, 140, 8), normal(1, 2, 140, 8), normal(1, 2, 140, 8)
    groups = np.repeat([0, 1, 2, -1], [70, 30, 32, 8])[None]
    got = jax.jit(lambda q, k, v: attention.attend(q, Keys(k, v, groups >= 0, True, groups), groups=groups))(q, k, v)
    for group in (1, 2):
        alone = np.flatnonzero((groups[0] == 0) | (groups[0] == group))
        q1, k1, v1 = (x[:, :, alone] for x in (q, k, v))
        expected = expected_attention(q1, [(k1, v1, None, True)], 8**-0.5)
        np.testing.assert_allclose(got[:, :, alone], expected, atol=1e-5, rtol=0)


def test_masked_keys_have_no_influence_at_all(walk):
    q, k, v = normal(1, 2, 130, 4), normal(1, 2, 20, 4), normal(1, 2, 20, 4)
    valid = np.arange(20)[None] < 12
    loud_k, loud_v = k.copy(), v.copy()
    loud_k[:, :, 12:], loud_v[:, :, 12:] = 1e4, 1e4
    np.testing.assert_array_equal(attend(q, Keys(k, v, valid)), attend(q, Keys(loud_k, loud_v, valid)))


def test_a_query_that_sees_nothing_is_finite(walk):
    q, k = normal(1, 2, 70, 4), normal(1, 2, 9, 4)
    assert np.isfinite(attend(q, Keys(k, k, np.zeros((1, 9), bool)))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_comes_back_in_its_own_dtype_with_a_float32_softmax(dtype):
    q, k, v = (jnp.asarray(normal(1, 2, 40, 16), dtype) for _ in range(3))
    got = attend(q, Keys(k, v, causal=True))
    as_numpy = [np.asarray(x.astype(jnp.float32)) for x in (q, k, v)]
    expected = expected_attention(as_numpy[0], [(*as_numpy[1:], None, True)], 0.25)
    assert got.dtype == dtype
    # Two roundings remain: of the weights and of the result.
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=2 * float(jnp.finfo(dtype).eps) * 4)


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 4, 150), (6, 2, 128), (6, 2, 1)])
def test_column_sums(walk, heads, kv_heads, length):
    q, k = normal(2, heads, length, 8), normal(2, kv_heads, length, 8)
    valid = np.arange(length) < [[length], [1 + length // 2]]
    weights = weights_of(q, [(k, valid, False)], 8**-0.5)
    everyone = column_sums(q, k, valid)
    np.testing.assert_allclose(everyone, weights.sum(2).mean(1), atol=1e-5 * length, rtol=0)
    assert everyone.dtype == jnp.float32
    assert everyone.shape == (2, length)
    own = column_sums(q, k, valid, valid)
    np.testing.assert_allclose(own, (weights * valid[:, None, :, None]).sum(2).mean(1), atol=1e-5 * length, rtol=0)
    np.testing.assert_allclose(own.sum(-1), valid.sum(-1), rtol=1e-5)  # every query gives one in all
    np.testing.assert_array_equal(own[~valid], 0)


def test_column_sums_of_other_queries_than_keys(walk):
    q, k = normal(2, 4, 100, 8), normal(2, 2, 30, 8)
    valid, counted = RNG.random((2, 30)) < 0.7, RNG.random((2, 100)) < 0.3
    weights = weights_of(q, [(k, valid, False)], 0.3)
    expected = (weights * counted[:, None, :, None]).sum(2).mean(1)
    np.testing.assert_allclose(column_sums(q, k, valid, counted, scale=0.3), expected, atol=1e-5, rtol=0)


def test_column_sums_do_not_depend_on_padding(walk):
    q, k = normal(1, 4, 90, 8), normal(1, 2, 90, 8)
    valid = np.ones((1, 90), bool)
    loud = [np.pad(x, ((0, 0), (0, 0), (0, 60), (0, 0)), constant_values=50.0) for x in (q, k)]
    padded_valid = np.pad(valid, ((0, 0), (0, 60)))
    padded = column_sums(*loud, padded_valid, padded_valid)
    np.testing.assert_allclose(padded[:, :90], column_sums(q, k, valid, valid), rtol=1e-5)
    np.testing.assert_array_equal(padded[:, 90:], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_do_not_hold_a_square_of_the_chunk(dtype):
    """At the shapes of Qwen2-VL-7B's chunk of 2304 tokens, [28, 2304, 2304] float32 would be 595 MB."""
    heads, kv_heads, chunk, width = 28, 4, 2304, 128
    square = heads * chunk * chunk * 4
    q = jax.ShapeDtypeStruct((1, heads, chunk, width), dtype)
    k = jax.ShapeDtypeStruct((1, kv_heads, chunk, width), dtype)
    valid = jax.ShapeDtypeStruct((1, chunk), bool)
    sums = jax.jit(attention.column_sums).lower(q, k, valid, valid).compile().memory_analysis().temp_size_in_bytes
    attended = jax.jit(lambda q, k, valid: attention.attend(q, Keys(k, k, valid, causal=True))).lower(q, k, valid)
    attended = attended.compile().memory_analysis().temp_size_in_bytes
    arrays = (heads + kv_heads) * chunk * width * 4  # q and k once more, as float32
    for temporaries in (sums, attended):
        assert temporaries < 3 * attention.BLOCK_BYTES + 2 * arrays
        assert temporaries < square / 2
