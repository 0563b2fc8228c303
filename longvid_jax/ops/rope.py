"""Rotary position embedding: plain, linear and YaRN scaling, one axis or three (M-RoPE), on paired halves of a head."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """What fixes a rotary embedding.

    `sections` are M-RoPE's, in frequencies: how many of the head_dim / 2 frequencies turn with time, height and width
    (Qwen2-VL, section 2.1); None is one axis. `scaling` is None, "linear" or "yarn" (arXiv 2309.00071).
    """

    head_dim: int
    theta: float = 10000.0
    sections: tuple[int, ...] | None = None
    scaling: str | None = None
    factor: float = 1.0
    original_length: int = 32768
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def axes(self) -> int:
        """How many position axes a token has: 3 with M-RoPE, else 1."""
        return len(self.sections) if self.sections else 1

    def frequencies(self) -> tuple[np.ndarray, float]:
        """The float32 frequencies [head_dim / 2] and the factor on cosine and sine (1 but for YaRN)."""
        return _frequencies(self)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Turns x [B, H, N, head_dim] by positions [B, N, axes]; computed in float32, returned in x's dtype."""
        frequencies, magnitude = self.frequencies()
        axis = np.repeat(np.arange(self.axes), self.sections or (self.head_dim // 2,))
        angles = positions.astype(jnp.float32)[..., axis] * frequencies  # [B, N, head_dim / 2]
        return rotate_half(x, jnp.cos(angles)[:, None] * magnitude, jnp.sin(angles)[:, None] * magnitude)


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + D / 2]) of x [..., D] by angles given as cos, sin [..., D / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@functools.cache
def _frequencies(rope: Rope) -> tuple[np.ndarray, float]:
    half = rope.head_dim // 2
    powers = np.float32(rope.theta) ** (np.arange(half, dtype=np.float32) / np.float32(half))
    plain = (1.0 / powers).astype(np.float32)
    if rope.scaling is None:
        return plain, 1.0
    if rope.scaling == "linear":
        return plain / np.float32(rope.factor), 1.0
    # YaRN: frequencies that turn often within the trained length stay, slow ones are interpolated, with a ramp between.
    low, high = (
        rope.head_dim * math.log(rope.original_length / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
        for beta in (rope.beta_fast, rope.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), rope.head_dim - 1)
    ramp = np.clip((np.arange(half, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1).astype(np.float32)
    mixed = plain / np.float32(rope.factor) * ramp + plain * (1 - ramp)
    magnitude = rope.attention_factor or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)
    return mixed.astype(np.float32), magnitude
