"""Linear maps and norms that the networks are made of."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from longvid_jax.ops.attention import Keys, attend, attend_few


def normal(key: jax.Array, shape: tuple[int, ...], dtype, scale: float = 0.02) -> jax.Array:
    """A random initial value."""
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


class Linear(nnx.Module):
    """x [..., in] @ kernel [in, out] (+ bias [out]), and what low-rank adapters add (see models.lora)."""

    def __init__(self, width_in: int, width_out: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs.params(), (width_in, width_out), dtype))
        self.bias = nnx.Param(jnp.zeros((width_out,), dtype)) if bias else None
        self.lora_a = nnx.data(None)  # [in, rank]
        self.lora_b = nnx.data(None)  # [rank, out]
        self.lora_scale = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        return self.adapted(x, y if self.bias is None else y + self.bias[...])

    def matrix(self) -> jax.Array:
        """[in, out], adapters and all: a kernel made anew where there are some, so for small maps only."""
        if self.lora_a is None:
            return self.kernel[...]
        return adapted_kernel(self.kernel[...], self.lora_a[...], self.lora_b[...], self.lora_scale)

    def adapted(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """y [..., out], in its dtype, and what the adapters add to it for x [..., in]; y itself without adapters."""
        if self.lora_a is None:
            return y
        a, b = self.lora_a[...], self.lora_b[...]
        update = jnp.matmul(x @ a, b, preferred_element_type=jnp.result_type(y, b))  # never a @ b, which is a kernel
        return y + (update * self.lora_scale).astype(y.dtype)


def adapted_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel + scale a b, added in float32: [..., in, out] of a [..., in, rank] and b [..., rank, out]."""
    update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest") * scale
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, *, dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm in float32 with scale and bias."""

    def __init__(self, width: int, eps: float, *, dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Embed(nnx.Module):
    """A table of embeddings [V, width]."""

    def __init__(self, vocab_size: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(rngs.params(), (vocab_size, width), dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]


class FeedForward(nnx.Module):
    """Two linear maps with a given activation between."""

    def __init__(self, width_in: int, hidden: int, width_out: int, activation, *, dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(width_in, hidden, bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width_out, bias=True, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU with the error function."""
    return jax.nn.gelu(x, approximate=False)


class MultiHeadAttention(nnx.Module):
    """The maps around an attention of `heads` heads: from x [B, N, width] and from keys' inputs [B, S, kv_width]."""

    def __init__(self, width: int, heads: int, *, kv_width: int | None = None, dtype, rngs: nnx.Rngs):
        kv_width = width if kv_width is None else kv_width
        self.q = Linear(width, width, bias=True, dtype=dtype, rngs=rngs)
        self.k = Linear(kv_width, width, bias=True, dtype=dtype, rngs=rngs)
        self.v = Linear(kv_width, width, bias=True, dtype=dtype, rngs=rngs)
        self.o = Linear(width, width, bias=True, dtype=dtype, rngs=rngs)
        self.heads = heads

    def queries(self, x: jax.Array) -> jax.Array:
        """[B, H, N, D] of x [B, N, width]."""
        return split_heads(self.q(x), self.heads)

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, H, S, D] of x [B, S, kv_width]."""
        return split_heads(self.k(x), self.heads), split_heads(self.v(x), self.heads)

    def output(self, context: jax.Array) -> jax.Array:
        """[B, N, width] of the heads' contexts [B, H, N, D]."""
        return self.o(rearrange(context, "b h n d -> b n (h d)"))

    def __call__(self, x: jax.Array, others: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """What x [B or 1, N, ·] finds in others [B, S, ·], those valid bool [B, S]: [B, N, ·].

        Where one of the sides is few, the maps commute with the attention and what a large side would be multiplied by
        is folded into the small one: queries that look at the others as they are, or keys and values for x as it is.
        """
        n, s, heads, wide = x.shape[1], others.shape[1], self.heads, self.q.kernel.shape[-1]
        scale = (wide // heads) ** -0.5
        folded = heads * min(n, s) <= min(max(n, s), wide // 2)  # one for each head are few as well, beside the others
        if folded and s <= n:
            k, v = self.keys_values(others)
            bias = self.q.bias[...].reshape(heads, -1)
            offsets = jnp.einsum("bhsd,hd->bhs", k, bias, preferred_element_type=jnp.float32)
            k = jnp.einsum("bhsd,whd->bhsw", k, _by_head(self.q.matrix(), heads))
            v = jnp.einsum("bhsd,whd->bhsw", v, _by_head(self.o.matrix().T, heads))
            return attend_few(x, k, v, offsets, valid, scale) + self.o.bias[...]
        q = self.queries(x)
        if folded:  # a key's bias adds the same to all logits of a query, and the weights of values sum to 1
            q, shown = jnp.einsum("bhnd,whd->bhnw", q, _by_head(self.k.matrix(), heads)), others[:, None]
            context = attend(_rows(q, others), Keys(shown, shown, valid), scale=scale)
            context = jnp.einsum("bhnw,whd->bhnd", context, _by_head(self.v.matrix(), heads))
            return self.output(context + self.v.bias[...].reshape(heads, 1, -1))
        return self.output(attend(_rows(q, others), Keys(*self.keys_values(others), valid), scale=scale))


def _rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [B or 1, ...] with as many rows as the other."""
    return jnp.broadcast_to(x, (like.shape[0], *x.shape[1:]))


def _by_head(matrix: jax.Array, heads: int) -> jax.Array:
    """[W, H, D] of a matrix [W, H * D]."""
    return rearrange(matrix, "w (h d) -> w h d", h=heads)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, H, N, D] of x [B, N, H * D]."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def repeat(make, depth: int, rngs: nnx.Rngs, *, stacked: bool):
    """`depth` modules made by make(rngs): one module with stacked leaves, or a tuple."""
    if stacked:
        return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), depth))
    return nnx.data(tuple(make(rngs) for _ in range(depth)))
