"""The Q-Former of BLIP-2 (arXiv 2301.12597) and InstructBLIP (2305.06500): learned queries that look at frames.

A BERT in which the queries, and only they, cross-attend to what is seen in every `cross_every`-th layer. Words of the
instruction, if it takes any, stand behind the queries and reach them by self-attention.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longvid_jax.models.bert import bert_fields, self_attend
from longvid_jax.models.layers import Embed, FeedForward, LayerNorm, MultiHeadAttention, exact_gelu
from longvid_jax.ops.attention import Keys, attend

# How a cross-attention layer looks: look(index, q [B, H, Q, D], carry) -> (context [B, H, Q, D], carry), with the
# number of the layer among those that cross-attend. What it looks at, and what it remembers, is its own business.
Look = Callable[[int, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """What fixes the Q-Former; the defaults are InstructBLIP's."""

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    ff_width: int = 3072
    max_length: int = 512
    norm_eps: float = 1e-12
    cross_every: int = 2
    video_width: int = 1408
    words: bool = True  # whether it takes an instruction; BLIP-2's does not

    @classmethod
    def from_huggingface(cls, config: dict, video_width: int, *, words: bool = True) -> "QFormerConfig":
        """Reads the qformer_config of a config.json."""
        return cls(
            **bert_fields(config),
            cross_every=config.get("cross_attention_frequency", 2),
            video_width=video_width,
            words=words,
        )

    @property
    def cross_layers(self) -> int:
        """How many layers cross-attend: the first and every `cross_every`-th after it."""
        return -(-self.depth // self.cross_every)


class QFormerLayer(nnx.Module):
    """A BERT layer with a second feed-forward network for the queries, and cross-attention in some."""

    def __init__(self, config: QFormerConfig, cross: bool, *, dtype, rngs: nnx.Rngs):
        width, eps = config.width, config.norm_eps

        def feed_forward():
            return FeedForward(width, config.ff_width, width, exact_gelu, dtype=dtype, rngs=rngs)

        self.attention = MultiHeadAttention(width, config.heads, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(width, eps, dtype=dtype)
        self.cross = (
            MultiHeadAttention(width, config.heads, kv_width=config.video_width, dtype=dtype, rngs=rngs)
            if cross
            else None
        )
        self.cross_norm = LayerNorm(width, eps, dtype=dtype) if cross else None
        self.mlp = feed_forward() if config.words else None
        self.mlp_norm = LayerNorm(width, eps, dtype=dtype) if config.words else None
        self.query_mlp = feed_forward()
        self.query_mlp_norm = LayerNorm(width, eps, dtype=dtype)


class QFormer(nnx.Module):
    """Queries and an instruction's words -> what the queries have seen. Its layers differ, so they are a tuple."""

    def __init__(self, config: QFormerConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        words = config.words
        self.words = Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs) if words else None
        self.positions = Embed(config.max_length, config.width, dtype=dtype, rngs=rngs) if words else None
        self.embed_norm = LayerNorm(config.width, config.norm_eps, dtype=dtype)
        self.layers = nnx.data(
            tuple(
                QFormerLayer(config, n % config.cross_every == 0, dtype=dtype, rngs=rngs) for n in range(config.depth)
            )
        )

    def embed(self, ids: jax.Array | None) -> jax.Array | None:
        """Embeddings [B, S, width] of an instruction int32 [B, S]; None where there is none or it takes none."""
        if ids is None or self.words is None:
            return None
        return self.embed_norm(self.words(ids) + self.positions.embedding[...][: ids.shape[1]])

    def keys_values(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [L, ..., width] of features [..., video_width], for each of the L cross-attention layers."""
        crossing = [layer.cross for layer in self.layers if layer.cross is not None]
        return jnp.stack([cross.k(features) for cross in crossing]), jnp.stack([c.v(features) for c in crossing])

    @jax.named_scope("qformer")
    def __call__(
        self, queries: jax.Array, text: jax.Array | None, text_valid: jax.Array | None, look: Look, carry: Any
    ) -> tuple[jax.Array, Any]:
        """Outputs [B, Q, width] of queries [B, Q, width] beside text [B, S, width] (see embed; valid bool [B, S]).

        look and carry: see Look; without anything to remember, `looking_at` makes one.
        """
        x, carry = self.look(queries, text, text_valid, look, carry)
        return self.conclude(x, queries.shape[1], text_valid), carry

    def look(
        self, queries: jax.Array, text: jax.Array | None, text_valid: jax.Array | None, look: Look, carry: Any
    ) -> tuple[jax.Array, Any]:
        """The first part, up to the last look: queries and text [B, Q + S, width], from which `conclude` goes on."""
        count, x = queries.shape[1], self.embed_norm(queries)
        if text is not None:
            x = jnp.concatenate([x, text], axis=1)
        crossed = 0
        for n, layer in enumerate(self.layers[: self._last + 1]):
            x = self_attend(layer, x if n == 0 else _fed(self.layers[n - 1], x, count), _valid(x, count, text_valid))
            if layer.cross is not None:
                q = x[:, :count]
                context, carry = look(crossed, layer.cross.queries(q), carry)
                q = layer.cross_norm(q + layer.cross.output(context))
                x = jnp.concatenate([q, x[:, count:]], axis=1)
                crossed += 1
        return x, carry

    def conclude(self, x: jax.Array, count: int, text_valid: jax.Array | None) -> jax.Array:
        """The second part: outputs [B, Q, width] of what `look` gave for Q queries and the text."""
        x = _fed(self.layers[self._last], x, count)
        for layer in self.layers[self._last + 1 :]:
            x = _fed(layer, self_attend(layer, x, _valid(x, count, text_valid)), count)
        return x[:, :count]

    @property
    def _last(self) -> int:
        """The layer that looks last."""
        return (self.config.cross_layers - 1) * self.config.cross_every


def _valid(x: jax.Array, count: int, text_valid: jax.Array | None) -> jax.Array:
    """bool [B, Q + S]: the queries, and the text that is some, if there is text."""
    valid = jnp.ones((len(x), count), bool)
    return valid if x.shape[1] == count else jnp.concatenate([valid, text_valid], axis=1)


def _fed(layer: QFormerLayer, x: jax.Array, count: int) -> jax.Array:
    """Queries and text [B, Q + S, width] through a layer's feed-forward networks."""
    q, words = x[:, :count], x[:, count:]
    q = layer.query_mlp_norm(q + layer.query_mlp(q))
    return jnp.concatenate([q, layer.mlp_norm(words + layer.mlp(words))], axis=1) if words.shape[1] else q


def looking_at(keys: jax.Array, values: jax.Array, valid: jax.Array | None = None) -> Look:
    """A look at keys and values [L, B, S, width] as they are, the valid [B, S] of them."""

    def look(index, q, carry):
        heads = q.shape[1]
        k, v = (x[index].reshape(*x.shape[1:3], heads, -1).swapaxes(1, 2) for x in (keys, values))
        return attend(q, Keys(k, v, valid)), carry

    return look
