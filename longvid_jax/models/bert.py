"""BERT (arXiv 1810.04805): a post-norm encoder over words, and the parts of it that the Q-Former is made of."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from longvid_jax.errors import CheckpointError
from longvid_jax.models.layers import Embed, FeedForward, LayerNorm, Linear, MultiHeadAttention, exact_gelu, repeat
from longvid_jax.ops.layers import layers, rematerialised


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """What fixes the encoder; the defaults are those of BERT-base."""

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    ff_width: int = 3072
    max_length: int = 512
    types: int = 2
    norm_eps: float = 1e-12
    pooler: bool = True

    @classmethod
    def from_huggingface(cls, config: dict) -> "BertConfig":
        """Reads a config.json of model_type bert."""
        return cls(
            **bert_fields(config), types=config.get("type_vocab_size", 2), pooler=config.get("add_pooling_layer", True)
        )


def bert_fields(config: dict) -> dict:
    """What BERT and the Q-Former have in common of a config.json."""
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"config.json: hidden_act is '{activation}', but this encoder has only 'gelu'.")
    if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
        raise CheckpointError(f"config.json: position_embedding_type is '{kind}', but only 'absolute' is known.")
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "ff_width",
        "max_position_embeddings": "max_length",
        "layer_norm_eps": "norm_eps",
    }
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


class BertLayer(nnx.Module):
    """One post-norm layer."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.attention = MultiHeadAttention(config.width, config.heads, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(config.width, config.norm_eps, dtype=dtype)
        self.mlp = FeedForward(config.width, config.ff_width, config.width, exact_gelu, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps, dtype=dtype)


def self_attend(layer, x: jax.Array, valid: jax.Array) -> jax.Array:
    """The first half of a layer: x [B, N, D] after its attention over the valid [B, N] tokens."""
    return layer.attention_norm(x + layer.attention(x, x, valid))


class Bert(nnx.Module):
    """Token ids -> a vector for each token, and one for all of them."""

    def __init__(self, config: BertConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.words = Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.positions = Embed(config.max_length, width, dtype=dtype, rngs=rngs)
        self.types = Embed(config.types, width, dtype=dtype, rngs=rngs)
        self.embed_norm = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.layers = repeat(
            lambda rngs: BertLayer(config, dtype=dtype, rngs=rngs), config.depth, rngs, stacked=stacked
        )
        self.pooler = Linear(width, width, bias=True, dtype=dtype, rngs=rngs) if config.pooler else None

    @jax.named_scope("bert")
    def __call__(self, ids: jax.Array, valid: jax.Array, *, remat: bool | str = False) -> tuple[jax.Array, jax.Array]:
        """Token outputs [B, N, width] and the pooled output [B, width] of ids int32 [B, N], bool valid [B, N].

        The pooled one is the pooler's, tanh of a map of the first token; without a pooler it is the first token's.
        """
        x = self.words(ids) + self.types.embedding[...][0] + self.positions.embedding[...][: ids.shape[1]]

        def layer(layer: BertLayer, _, x):
            x = self_attend(layer, x, valid)
            return layer.mlp_norm(x + layer.mlp(x))

        x = layers(rematerialised(layer, remat), self.layers, self.embed_norm(x))
        return x, x[:, 0] if self.pooler is None else jnp.tanh(self.pooler(x[:, 0]))
