"""Linear maps and norms that the networks are made of."""

import jax
import jax.numpy as jnp
from flax import nnx


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

    def adapted(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """y [..., out], in its dtype, and what the adapters add to it for x [..., in]; y itself without adapters."""
        if self.lora_a is None:
            return y
        a, b = self.lora_a[...], self.lora_b[...]
        update = jnp.matmul(x @ a, b, preferred_element_type=jnp.result_type(y, b))  # never a @ b, which is a kernel
        return y + (update * self.lora_scale).astype(y.dtype)


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


def repeat(make, depth: int, rngs: nnx.Rngs, *, stacked: bool):
    """`depth` modules made by make(rngs): one module with stacked leaves, or a tuple."""
    if stacked:
        return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), depth))
    return nnx.data(tuple(make(rngs) for _ in range(depth)))
