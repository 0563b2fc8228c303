"""Three towers that learn the made-up world side by side: eyes, a reader of questions, a decoder that is told facts.

AdaCM2 and ReWind put them together, frozen, with what is their own. Facts are told in vectors, as a Q-Former or a
memory will tell them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from longvid_jax.models.bert import Bert, BertConfig
from longvid_jax.models.eva_vit import EvaConfig, EvaViT
from longvid_jax.models.layers import FeedForward, exact_gelu
from longvid_jax.models.llama import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True)
class TowersConfig:
    """The three towers, and the width of a fact's features."""

    vision: EvaConfig
    bert: BertConfig
    text: DecoderConfig
    fact_width: int

    @classmethod
    def from_huggingface(cls, config: dict) -> "TowersConfig":
        """Reads a config.json of model_type world_towers."""
        return cls(
            vision=EvaConfig.from_huggingface(config["vision_config"]),
            bert=BertConfig.from_huggingface(config["bert_config"]),
            text=DecoderConfig.from_huggingface(config["text_config"]),
            fact_width=config["fact_width"],
        )


class Towers(nnx.Module):
    """An EVA tower, a BERT, a Llama, and the map from facts to vectors of the Llama's width."""

    def __init__(self, config: TowersConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.vision = EvaViT(config.vision, dtype=dtype, stacked=stacked, rngs=rngs)
        self.bert = Bert(config.bert, dtype=dtype, stacked=stacked, rngs=rngs)
        self.text = Decoder(config.text, dtype=dtype, stacked=stacked, rngs=rngs)
        width = config.text.width
        self.facts = FeedForward(config.fact_width, 2 * width, width, exact_gelu, dtype=dtype, rngs=rngs)

    def told(self, facts: jax.Array) -> jax.Array:
        """Vectors [B, Q, width] of facts [B, Q, fact_width]."""
        return self.facts(facts.astype(self.facts.fc1.kernel.dtype))
