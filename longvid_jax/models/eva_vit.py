"""EVA-CLIP's vision transformer (arXiv 2211.07636), as BLIP-2 and InstructBLIP have it: ViT-g/14 at 224 pixels."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from longvid_jax.errors import CheckpointError
from longvid_jax.models.layers import FeedForward, LayerNorm, Linear, exact_gelu, normal, repeat
from longvid_jax.ops.attention import Keys, attend
from longvid_jax.ops.layers import layers, rematerialised

BICUBIC = -0.75  # the kernel's parameter in torch


@dataclasses.dataclass(frozen=True)
class EvaConfig:
    """What fixes the tower; the defaults are InstructBLIP's."""

    depth: int = 39
    width: int = 1408
    heads: int = 16
    ff_width: int = 6144
    patch: int = 14
    image_size: int = 224  # pixels a side, for which there are positions
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    channels: int = 3
    temporal: ClassVar[int] = 1  # frames that become tokens together
    merge: ClassVar[int] = 1  # patches a side that become a token together

    @classmethod
    def from_huggingface(cls, config: dict) -> "EvaConfig":
        """Reads the vision_config of an InstructBLIP's or BLIP-2's config.json, or the tower's own."""
        if (activation := config.get("hidden_act", "gelu")) != "gelu":
            raise CheckpointError(f"config.json: hidden_act of the vision tower is '{activation}', not 'gelu'.")
        names = {
            "num_hidden_layers": "depth",
            "hidden_size": "width",
            "num_attention_heads": "heads",
            "intermediate_size": "ff_width",
            "patch_size": "patch",
            "image_size": "image_size",
            "layer_norm_eps": "norm_eps",
            "qkv_bias": "qkv_bias",
        }
        return cls(**{ours: config[theirs] for theirs, ours in names.items() if theirs in config})

    @property
    def side(self) -> int:
        """Patches a side of the frames that there are positions for."""
        return self.image_size // self.patch


class EvaAttention(nnx.Module):
    """Full attention within a frame. The checkpoints' bias is (q, 0, v): softmax does not feel one of the keys."""

    def __init__(self, config: EvaConfig, *, dtype, rngs: nnx.Rngs):
        self.qkv = Linear(config.width, 3 * config.width, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(config.width, config.width, bias=True, dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = rearrange(self.qkv(x), "f p (three h d) -> three f h p d", three=3, h=self.heads)
        return self.proj(rearrange(attend(q, Keys(k, v)), "f h p d -> f p (h d)"))


class EvaBlock(nnx.Module):
    """One pre-norm block."""

    def __init__(self, config: EvaConfig, *, dtype, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.width, config.norm_eps, dtype=dtype)
        self.attention = EvaAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.width, config.norm_eps, dtype=dtype)
        self.mlp = FeedForward(config.width, config.ff_width, config.width, exact_gelu, dtype=dtype, rngs=rngs)


class EvaViT(nnx.Module):
    """Frames -> a class token and a token for each patch."""

    def __init__(self, config: EvaConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        inputs = config.channels * config.patch**2
        self.patch_embed = Linear(inputs, config.width, bias=True, dtype=dtype, rngs=rngs)
        self.class_embedding = nnx.Param(normal(rngs.params(), (1, config.width), dtype))
        self.position_embedding = nnx.Param(normal(rngs.params(), (config.side**2 + 1, config.width), dtype))
        self.blocks = repeat(lambda rngs: EvaBlock(config, dtype=dtype, rngs=rngs), config.depth, rngs, stacked=stacked)
        self.norm = LayerNorm(config.width, config.norm_eps, dtype=dtype)

    @jax.named_scope("vision")
    def __call__(self, pixels: jax.Array, *, remat: bool | str = False) -> jax.Array:
        """Tokens [F, P, width] of normalised pixels [F, H, W, 3], P = 1 + rows * columns, the class token first.

        Frames of another size than the config's get interpolated positions (bicubic, as transformers does it).
        """
        patch = self.config.patch
        grid = pixels.shape[1] // patch, pixels.shape[2] // patch
        patches = rearrange(pixels, "f (r p) (c q) x -> f (r c) (x p q)", p=patch, q=patch)
        x = self.patch_embed(patches.astype(self.patch_embed.kernel.dtype))
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + self.positions(grid)

        def block(block: EvaBlock, _, x):
            x = x + block.attention(block.norm1(x))
            return x + block.mlp(block.norm2(x))

        return self.norm(layers(rematerialised(block, remat), self.blocks, x))

    def positions(self, grid: tuple[int, int]) -> jax.Array:
        """Position embeddings [1 + rows * columns, width] for a grid of (rows, columns) patches."""
        table, side = self.position_embedding[...], self.config.side
        if grid == (side, side):
            return table
        rows, columns = (jnp.asarray(bicubic(size, side)) for size in grid)
        square = table[1:].reshape(side, side, -1).astype(jnp.float32)
        wide = jnp.einsum("rs,ct,std->rcd", rows, columns, square, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([table[:1], wide.reshape(-1, table.shape[1]).astype(table.dtype)])


@functools.cache
def bicubic(new: int, old: int) -> np.ndarray:
    """float32 [new, old]: what torch's bicubic interpolation (align_corners=False, not antialiased) does to an axis."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        first = int(np.floor(centre)) - 1
        for j in range(first, first + 4):
            matrix[i, min(max(j, 0), old - 1)] += _cubic(abs(centre - j))
    return matrix.astype(np.float32)


def _cubic(distance: float) -> float:
    """Keys' kernel (IEEE TASSP 1981, eq. 4)."""
    a = BICUBIC
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0
