"""Qwen2-VL (arXiv 2409.12191).

A vision tower with 2-D rotary embedding and a spatial merger, and a Qwen2 decoder with M-RoPE.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from longvid_jax.errors import CheckpointError
from longvid_jax.models.layers import FeedForward, LayerNorm, Linear, exact_gelu, repeat
from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.ops.attention import Keys, Packed, attend
from longvid_jax.ops.layers import layers, rematerialised
from longvid_jax.ops.rope import rotate_half


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What fixes the vision tower; the defaults are those of every released Qwen2-VL."""

    depth: int = 32
    width: int = 1280
    out_width: int = 3584
    heads: int = 16
    mlp_ratio: float = 4
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    channels: int = 3

    @classmethod
    def from_huggingface(cls, config: dict) -> "VisionConfig":
        """Reads the vision_config of a config.json."""
        if (activation := config.get("hidden_act", "quick_gelu")) != "quick_gelu":
            raise CheckpointError(
                f"config.json: hidden_act under vision_config is '{activation}', but this tower has only 'quick_gelu'."
            )
        names = {
            "in_chans": "channels",
            "in_channels": "channels",
            "depth": "depth",
            "embed_dim": "width",
            "hidden_size": "out_width",
            "num_heads": "heads",
            "mlp_ratio": "mlp_ratio",
            "patch_size": "patch",
            "temporal_patch_size": "temporal",
            "spatial_merge_size": "merge",
        }
        return cls(**{ours: config[theirs] for theirs, ours in names.items() if theirs in config})


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """A whole Qwen2-VL."""

    text: DecoderConfig
    vision: VisionConfig

    @classmethod
    def from_huggingface(cls, config: dict) -> "Qwen2VLConfig":
        """Reads a config.json of model_type qwen2_vl, of either generation."""
        return cls(
            text=DecoderConfig.from_huggingface(config),
            vision=VisionConfig.from_huggingface(config.get("vision_config", {})),
        )


class VisionAttention(nnx.Module):
    """Full attention within one temporal patch."""

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        self.qkv = Linear(config.width, 3 * config.width, bias=True, dtype=dtype, rngs=rngs)
        self.proj = Linear(config.width, config.width, bias=True, dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        q, k, v = rearrange(self.qkv(x), "f p (three h d) -> three f h p d", three=3, h=self.heads)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        context = attend(rotate_half(q, cos, sin), Keys(rotate_half(k, cos, sin), v))
        return self.proj(rearrange(context, "f h p d -> f p (h d)"))


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), as in CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


class VisionBlock(nnx.Module):
    """One pre-norm block."""

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.width, 1e-6, dtype=dtype)
        self.attention = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.width, 1e-6, dtype=dtype)
        hidden = int(config.width * config.mlp_ratio)
        self.mlp = FeedForward(config.width, hidden, config.width, quick_gelu, dtype=dtype, rngs=rngs)


class Merger(nnx.Module):
    """Joins merge x merge neighbouring patches into one token of the decoder's width."""

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        joined = config.width * config.merge**2
        self.norm = LayerNorm(config.width, 1e-6, dtype=dtype)
        self.fc1 = Linear(joined, joined, bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(joined, config.out_width, bias=True, dtype=dtype, rngs=rngs)
        self.merge = config.merge

    def __call__(self, x: jax.Array) -> jax.Array:
        x = rearrange(self.norm(x), "f (n m) d -> f n (m d)", m=self.merge**2)
        return self.fc2(exact_gelu(self.fc1(x)))


class VisionTower(nnx.Module):
    """Patches of temporal patches of frames -> tokens for the decoder."""

    def __init__(self, config: VisionConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        inputs = config.channels * config.temporal * config.patch**2
        self.patch_embed = Linear(inputs, config.width, bias=False, dtype=dtype, rngs=rngs)
        self.blocks = repeat(
            lambda rngs: VisionBlock(config, dtype=dtype, rngs=rngs), config.depth, rngs, stacked=stacked
        )
        self.merger = Merger(config, dtype=dtype, rngs=rngs)

    @jax.named_scope("vision")
    def __call__(self, patches: jax.Array, grid: tuple[int, int], *, remat: bool | str = False) -> jax.Array:
        """Tokens [F, N, out_width] of patches [F, P, channels * temporal * patch^2] of F temporal patches.

        grid is (rows, columns) of patches, P = rows * columns, in merge blocks as the processors lay them out;
        N = P / merge^2. remat: as for the decoder.
        """
        x = self.patch_embed(patches.astype(self.patch_embed.kernel.dtype))
        angles = vision_angles(self.config, grid)

        def block(block: VisionBlock, _, x):
            x = x + block.attention(block.norm1(x), angles)
            return x + block.mlp(block.norm2(x))

        return self.merger(layers(rematerialised(block, remat), self.blocks, x))


def vision_angles(config: VisionConfig, grid: tuple[int, int]) -> np.ndarray:
    """Angles float32 [P, head_dim / 2] of the 2-D rotary embedding.

    A quarter of a head turns with the row, one with the column.
    """
    quarter = config.width // config.heads // 4
    frequencies = 1.0 / (10000.0 ** (np.arange(quarter, dtype=np.float32) / quarter))
    rows_columns = np.stack(np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij"), axis=-1)
    order = rearrange(rows_columns, "(r m) (c n) two -> (r c m n) two", m=config.merge, n=config.merge)
    return rearrange(order[..., None] * frequencies, "p two q -> p (two q)").astype(np.float32)


class Qwen2VL(nnx.Module):
    """Vision tower and decoder."""

    def __init__(self, config: Qwen2VLConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTower(config.vision, dtype=dtype, stacked=stacked, rngs=rngs)
        self.text = Decoder(config.text, dtype=dtype, stacked=stacked, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        groups: jax.Array,
        video_index: jax.Array,
        patches: jax.Array,
        grid: tuple[int, int],
        *,
        packed: Packed | None = None,
        remat: bool | str = False,
    ) -> jax.Array:
        """Hidden states [B, N, width] of whole sequences with a video in each: the forward pass of training.

        tokens int32 [B, N] at positions int32 [B, N, 3]; groups int32 [B, N] and packed as for the decoder;
        video_index int32 [B, N]: which of the video's tokens stands here, -1 for text; patches [B, T, P, inputs] of
        T temporal patches on a grid of (rows, columns) of patches.
        """
        features = self.vision(patches.reshape(-1, *patches.shape[2:]), grid, remat=remat)
        features = features.reshape(patches.shape[0], -1, features.shape[-1])  # [B, T * tokens, width]
        text = self.text.embed(tokens)
        video = jnp.take_along_axis(features, jnp.maximum(video_index, 0)[..., None], axis=1)
        x = jnp.where(video_index[..., None] >= 0, video.astype(text.dtype), text)
        return self.text(x, positions, groups >= 0, groups=groups, packed=packed, remat=remat)[0]
