"""ReWind's own networks (arXiv 2411.15556, section 3.2): what reads its memory, perceives a clip, and writes.

Few learned queries stand between the video and the memory: they read the memory, look at each frame of a clip on their
own and at each other along time, and of what they have become a few tokens a frame are written. So the video's tokens
attend neither to each other nor to the memory. memory.rewind makes a cycle of it.

Letters: B batch, F frames of a clip, P patches, W their width, S words, Q queries, N tokens written, R capacity of the
memory in tokens, D width. What the paper leaves open is pre-norm, with residuals and GELU.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from longvid_jax.errors import CheckpointError
from longvid_jax.models import layers as parts
from longvid_jax.models.layers import Embed, FeedForward, LayerNorm, Linear, MultiHeadAttention, exact_gelu, normal
from longvid_jax.ops.attention import Keys, attend
from longvid_jax.ops.layers import layers, rematerialised

# How patches come to know the instruction: by a gated cross-attention in each layer, or by one for all of them; or not
# at all, while queries look at the words beside the patches, or at the patches only.
CONDITIONING = ("gated", "shared", "concat", "none")
WAVELENGTH = 10000.0  # the longest of a sinusoidal position, over 2 pi (arXiv 1706.03762, section 3.5)


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """What fixes the networks; the defaults are the paper's, and the Q-Former's where it names none."""

    width: int = 768
    depth: int = 8
    heads: int = 12
    ff_width: int = 3072
    num_queries: int = 32
    num_write: int = 2
    video_width: int = 1408
    text_width: int = 768
    num_frames: int = 0  # frame numbers that have a learned embedding; 0: sinusoidal ones, of which there is no last
    text_conditioning: str = "gated"
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.text_conditioning not in CONDITIONING:
            raise CheckpointError(
                f"config.json: text_conditioning is {self.text_conditioning!r}, but must be one of "
                f"{', '.join(CONDITIONING)}."
            )
        if self.width % self.heads:
            raise CheckpointError(
                f"config.json: width is {self.width}, which must be divisible by {self.heads}, the number of heads."
            )


class Instruction(NamedTuple):
    """What the networks know of the question."""

    tokens: jax.Array  # [B, S, D]
    valid: jax.Array  # bool [B, S]
    pooled: jax.Array  # [B, D], the mean of the valid tokens


def sinusoids(numbers: jax.Array, width: int) -> jax.Array:
    """float32 [..., width]: sines, then cosines, of numbers [...] at wavelengths from 2 pi to WAVELENGTH * 2 pi."""
    half = -(-width // 2)
    rates = jnp.exp(jnp.arange(half) * (-math.log(WAVELENGTH) / half))
    angles = numbers[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


class FramePositions(nnx.Module):
    """An embedding of a frame's number in its video."""

    def __init__(self, count: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.frames = Embed(count, width, dtype=dtype, rngs=rngs) if count else None
        self.width = width

    def __call__(self, numbers: jax.Array) -> jax.Array:
        """[..., width] of numbers int32 [...]; one beyond the last that has a learned embedding takes that one's."""
        if self.frames is None:
            return sinusoids(numbers, self.width)
        return self.frames(jnp.minimum(numbers, self.frames.embedding.shape[0] - 1))


class TextConditioning(MultiHeadAttention):
    """x + tanh(gate) * (attention of x to the instruction); nothing changes at first, when the gate is 0."""

    def __init__(self, config: PerceiverConfig, *, dtype, rngs: nnx.Rngs):
        width, video = config.width, config.video_width
        super().__init__(width, config.heads, dtype=dtype, rngs=rngs)
        self.q = Linear(video, width, bias=True, dtype=dtype, rngs=rngs)
        self.o = Linear(width, video, bias=True, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(video, config.norm_eps, dtype=dtype)
        self.gate = nnx.Param(jnp.zeros((1,), dtype))

    def __call__(self, x: jax.Array, instruction: Instruction | None) -> jax.Array:
        """[B, F, P, W], like x; x itself where there is no instruction."""
        if instruction is None:
            return x
        normed = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        found = super().__call__(normed, instruction.tokens, instruction.valid)
        return x + jnp.tanh(self.gate[...]) * found.reshape(x.shape)


class PerceiverLayer(nnx.Module):
    """Queries look at patches, at their like in the clip's other frames, and think about it."""

    def __init__(self, config: PerceiverConfig, *, dtype, rngs: nnx.Rngs):
        width, video, eps = config.width, config.video_width, config.norm_eps
        gated = config.text_conditioning == "gated"
        self.condition = TextConditioning(config, dtype=dtype, rngs=rngs) if gated else None
        self.video_norm = LayerNorm(video, eps, dtype=dtype)
        self.cross_norm = LayerNorm(width, eps, dtype=dtype)
        self.cross = MultiHeadAttention(width, config.heads, kv_width=video, dtype=dtype, rngs=rngs)
        self.temporal_norm = LayerNorm(width, eps, dtype=dtype)
        self.temporal = MultiHeadAttention(width, config.heads, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(width, eps, dtype=dtype)
        self.mlp = FeedForward(width, config.ff_width, width, exact_gelu, dtype=dtype, rngs=rngs)


class Perceiver(nnx.Module):
    """Learned queries, the instruction beside them, and the layers in which they perceive a clip."""

    def __init__(self, config: PerceiverConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        width, video, how = config.width, config.video_width, config.text_conditioning
        # As large as what a layer adds: smaller ones would all be alike once they have read the memory.
        self.query_tokens = nnx.Param(normal(rngs.params(), (config.num_queries, width), dtype, scale=1.0))
        self.instruction = Linear(config.text_width, width, bias=True, dtype=dtype, rngs=rngs)
        self.positions = FramePositions(config.num_frames, video, dtype=dtype, rngs=rngs)
        self.condition = TextConditioning(config, dtype=dtype, rngs=rngs) if how == "shared" else None
        self.beside = Linear(width, video, bias=True, dtype=dtype, rngs=rngs) if how == "concat" else None
        self.layers = parts.repeat(
            lambda rngs: PerceiverLayer(config, dtype=dtype, rngs=rngs), config.depth, rngs, stacked=stacked
        )
        self.norm = LayerNorm(width, config.norm_eps, dtype=dtype)

    def instruct(self, words: jax.Array, valid: jax.Array) -> Instruction:
        """Of BERT's outputs [B, S, text_width] for the instruction's words, those that are valid bool [B, S]."""
        tokens = jnp.where(valid[..., None], self.instruction(words), 0)
        count = jnp.maximum(valid.sum(-1, keepdims=True), 1)
        pooled = tokens.astype(jnp.float32).sum(1) / count
        return Instruction(tokens, valid, pooled.astype(tokens.dtype))

    def queries(self, batch: int, instruction: Instruction | None = None) -> jax.Array:
        """The learned queries and behind them the pooled instruction, [B, Q + 1, D]; [B, Q, D] without one.

        As one of the queries that read, perceive and are written, the instruction trains READ's maps to find what it
        asks for, and frame selection asks with the same maps.
        """
        learned = jnp.broadcast_to(self.query_tokens[...], (batch, *self.query_tokens.shape))
        if instruction is None:
            return learned
        return jnp.concatenate([learned, instruction.pooled[:, None].astype(learned.dtype)], axis=1)

    @jax.named_scope("perceive")
    def __call__(
        self,
        queries: jax.Array,
        features: jax.Array,
        numbers: jax.Array,
        valid: jax.Array,
        instruction: Instruction | None = None,
        *,
        remat: bool | str = False,
    ) -> jax.Array:
        """What queries [B, Q, D] become in each frame of a clip: [B, F, Q, D].

        features [B, F, P, W] of the frames with these numbers in their video, int32 [B, F]; only the valid [B, F] are
        looked at from others, and what comes out for the rest is of no account.
        """
        batch, frames, patches, _ = features.shape
        x = features + self.positions(numbers)[:, :, None].astype(features.dtype)
        x = x if self.condition is None else self.condition(x, instruction)
        seen = None
        if self.beside is not None and instruction is not None:
            words = repeat(self.beside(instruction.tokens), "b s w -> b f s w", f=frames)
            x = jnp.concatenate([x, words], axis=2)
            seen = jnp.pad(instruction.valid, [(0, 0), (patches, 0)], constant_values=True)
            seen = jnp.repeat(seen, frames, axis=0)
        together = jnp.repeat(valid, queries.shape[1], axis=0)  # [B * Q, F]

        def layer(layer: PerceiverLayer, _, q):  # [B * F, Q, D]
            shown = layer.video_norm(x if layer.condition is None else layer.condition(x, instruction))
            q = q + layer.cross(layer.cross_norm(q), rearrange(shown, "b f p w -> (b f) p w"), seen)
            q = rearrange(q, "(b f) q d -> (b q) f d", b=batch)
            normed = layer.temporal_norm(q)
            q = q + layer.temporal(normed, normed, together)
            q = rearrange(q, "(b q) f d -> (b f) q d", b=batch)
            return q + layer.mlp(layer.mlp_norm(q))

        q = repeat(queries, "b q d -> (b f) q d", f=frames)
        q = self.norm(layers(rematerialised(layer, remat), self.layers, q))
        return rearrange(q, "(b f) q d -> b f q d", b=batch)


class ReadWrite(nnx.Module):
    """How queries read the memory, and how it is written."""

    def __init__(self, config: PerceiverConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        width, eps = config.width, config.norm_eps
        self.read_norm = LayerNorm(width, eps, dtype=dtype)
        self.reading = MultiHeadAttention(width, config.heads, dtype=dtype, rngs=rngs)
        self.write_tokens = nnx.Param(normal(rngs.params(), (config.num_write, width), dtype, scale=1.0))
        self.write_norm = LayerNorm(width, eps, dtype=dtype)
        self.writing = MultiHeadAttention(width, config.heads, dtype=dtype, rngs=rngs)
        self.token_norm = LayerNorm(width, eps, dtype=dtype)
        self.positions = FramePositions(config.num_frames, width, dtype=dtype, rngs=rngs)

    def queries(self, x: jax.Array) -> jax.Array:
        """READ's projected queries [B, H, Q, D / H] of x [B, Q, D]."""
        return self.reading.queries(self.read_norm(x))

    @jax.named_scope("read")
    def read(self, queries: jax.Array, keys: jax.Array, values: jax.Array, valid: jax.Array) -> jax.Array:
        """Queries [B, Q, D] and what they find in the memory's keys and values [B, H, R, D / H], those valid [B, R].

        The queries themselves where the memory is empty.
        """
        found = self.reading.output(attend(self.queries(queries), Keys(keys, values, valid)))
        return jnp.where(valid.any(-1)[:, None, None], queries + found, queries)

    @jax.named_scope("write")
    def write(self, perceived: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of perceived [B, F, Q, D], frames of these numbers: tokens [B, F, N, D], keys and values [B, H, F, N, D / H].

        m = CrossAttn(q=Q_W, kv=perceived), without a residual. The frame's number int32 [B, F] is added to keys only.
        """
        asking = self.write_norm(self.write_tokens[...])[None]
        tokens = self.writing(asking, rearrange(perceived, "b f q d -> (b f) q d"))
        tokens = rearrange(tokens, "(b f) n d -> b f n d", b=perceived.shape[0])
        normed = self.token_norm(tokens)
        placed = normed + self.positions(numbers)[:, :, None].astype(normed.dtype)
        keys, values = self.reading.k(placed), self.reading.v(normed)
        by_head = (rearrange(x, "b f n (h d) -> b h f n d", h=self.reading.heads) for x in (keys, values))
        return tokens, *by_head


def cycle(
    perceiver: Perceiver, memory: ReadWrite, instruction: Instruction | None = None, *, remat: bool | str = False
) -> tuple[Callable, Callable, Callable]:
    """read, perceive and write for memory.rewind.watch, with this instruction in mind."""

    def read(keys, values, valid):
        return memory.read(perceiver.queries(keys.shape[0], instruction), keys, values, valid)

    def perceive(queries, features, numbers, valid):
        return perceiver(queries, features, numbers, valid, instruction, remat=remat)

    return read, perceive, memory.write


class Contrast(nnx.Module):
    """What pre-training compares videos with captions by, in SigLIP's way (arXiv 2303.15343)."""

    def __init__(self, config: PerceiverConfig, width: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.video = Linear(config.width, width, bias=True, dtype=dtype, rngs=rngs)
        self.caption = Linear(config.text_width, width, bias=True, dtype=dtype, rngs=rngs)
        self.temperature = nnx.Param(jnp.full((1,), math.log(10.0), dtype))  # its logarithm, t'
        self.offset = nnx.Param(jnp.full((1,), -10.0, dtype))  # b0

    def of_video(self, perceived: jax.Array, valid: jax.Array) -> jax.Array:
        """float32 [B, E] of length 1: the mean of perceived [B, F, Q, D] over the valid [B, F] frames' queries."""
        mean = perceived.astype(jnp.float32).mean(2)
        mean = jnp.where(valid[..., None], mean, 0).sum(1) / jnp.maximum(valid.sum(-1, keepdims=True), 1)
        return _unit(self.video(mean.astype(perceived.dtype)))

    def of_caption(self, first: jax.Array) -> jax.Array:
        """float32 [B, E] of length 1, of BERT's output [B, text_width] for a caption's first token."""
        return _unit(self.caption(first))


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
