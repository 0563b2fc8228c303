"""InstructBLIP (arXiv 2305.06500) with a Llama or Vicuna, and BLIP-2 likewise: EVA tower, Q-Former, decoder.

What AdaCM2 (2411.12593) adds to it is an embedding of frame numbers, which a plain InstructBLIP does not have.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from longvid_jax.models.eva_vit import EvaConfig, EvaViT
from longvid_jax.models.layers import Embed, Linear, normal
from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.models.qformer import QFormer, QFormerConfig

DECODERS = {  # what a config of the language model leaves out is as in transformers
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
}


@dataclasses.dataclass(frozen=True)
class InstructBlipConfig:
    """A whole model. What a plain checkpoint does not have is 0 or False."""

    vision: EvaConfig
    qformer: QFormerConfig
    text: DecoderConfig | None  # None: the language model is of another kind, so that only parts can be built
    num_queries: int = 32
    num_frames: int = 0  # frame numbers that have an embedding; 0: none has
    carry_queries: bool = False  # AdaCM2: whether it was trained with queries that go on from frame to frame

    @classmethod
    def from_huggingface(cls, config: dict) -> "InstructBlipConfig":
        """Reads a config.json of model_type instructblip or blip-2.

        AdaCM2's `num_frame_positions` and `carry_queries` are read where a trained checkpoint has them.
        """
        text, kind = config.get("text_config") or {}, language_model(config)
        vision, qformer = tower_configs(config)
        return cls(
            vision=vision,
            qformer=qformer,
            text=DecoderConfig.from_huggingface({**DECODERS[kind], **text}) if kind in DECODERS else None,
            num_queries=config.get("num_query_tokens", 32),
            num_frames=config.get("num_frame_positions", 0),
            carry_queries=config.get("carry_queries", False),
        )


def language_model(config: dict) -> str:
    """The model_type of the language model in a config.json; transformers takes OPT where none is named."""
    return (config.get("text_config") or {}).get("model_type", "opt")


def tower_configs(config: dict) -> tuple[EvaConfig, QFormerConfig]:
    """The tower's and the Q-Former's part of a config.json."""
    vision = EvaConfig.from_huggingface(config.get("vision_config") or {})
    qformer = config.get("qformer_config") or {}
    words = config.get("model_type") != "blip-2" or qformer.get("use_qformer_text_input", False)
    return vision, QFormerConfig.from_huggingface(qformer, vision.width, words=words)


class InstructBlip(nnx.Module):
    """The networks; how frames become a memory and an answer is systems.adacm2's business."""

    def __init__(self, config: InstructBlipConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        width = config.qformer.width
        self.vision = EvaViT(config.vision, dtype=dtype, stacked=stacked, rngs=rngs)
        count = config.num_frames
        self.frames = nnx.data(Embed(count, config.vision.width, dtype=dtype, rngs=rngs) if count else None)
        self.query_tokens = nnx.Param(normal(rngs.params(), (config.num_queries, width), dtype))
        self.qformer = QFormer(config.qformer, dtype=dtype, stacked=stacked, rngs=rngs)
        text = config.text
        self.projection = Linear(width, text.width, bias=True, dtype=dtype, rngs=rngs) if text else None
        self.text = Decoder(text, dtype=dtype, stacked=stacked, rngs=rngs) if text else None

    def placed(self, features: jax.Array, numbers: jax.Array) -> jax.Array:
        """f_t = x_t + E(t): features [..., P, C] of the frames with these numbers int32 [...] (AdaCM2, section 3.2).

        A number beyond the last that has an embedding takes that one's.
        """
        if self.frames is None:
            return features
        return features + self.frames(jnp.minimum(numbers, self.config.num_frames - 1))[..., None, :]

    def queries(self, batch: int) -> jax.Array:
        """The learned queries [B, Q, width]."""
        return jnp.broadcast_to(self.query_tokens[...], (batch, *self.query_tokens.shape))

    def asker(self, text: jax.Array | None) -> tuple[Callable, Callable]:
        """look and conclude for memory.adacm2.Ask: the Q-Former with instructions int32 [B, S] (-1: padding behind)."""
        words = None if text is None else self.qformer.embed(jnp.maximum(text, 0))
        valid = None if words is None else text >= 0

        def look(queries, look, carry):
            return self.qformer.look(queries, words, valid, look, carry)

        return look, lambda seen: self.qformer.conclude(seen, self.config.num_queries, valid)
