"""ReWind (arXiv 2411.15556): an EVA tower, a BERT that reads the question, its own networks, and a Llama with what it
is told by them: the memory's tokens, a separator, and a few frames in detail."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from longvid_jax.errors import CheckpointError
from longvid_jax.models.bert import Bert, BertConfig
from longvid_jax.models.eva_vit import EvaConfig, EvaViT
from longvid_jax.models.instructblip import DECODERS
from longvid_jax.models.layers import Linear, normal
from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.models.perceiver import Contrast, Instruction, Perceiver, PerceiverConfig, ReadWrite, cycle


@dataclasses.dataclass(frozen=True)
class RewindConfig:
    """A whole model."""

    vision: EvaConfig
    bert: BertConfig
    perceiver: PerceiverConfig
    text: DecoderConfig
    clip_frames: int = 8  # frames of a clip in training; a run may choose others
    detail_tokens: int = 32  # tokens of a frame that is looked at in detail
    contrast_width: int = 0  # of what pre-training compares; 0: it is not there

    @classmethod
    def from_huggingface(cls, config: dict) -> "RewindConfig":
        """Reads a config.json of model_type rewind, the library's own: vision_config, bert_config, text_config.

        Its other fields may be left out, and are then the paper's.
        """
        text = config.get("text_config") or {}
        kind = text.get("model_type", "llama")
        if kind not in DECODERS:
            raise CheckpointError(
                f"config.json: model_type of text_config is '{kind}', but must be {' or '.join(DECODERS)}."
            )
        vision = EvaConfig.from_huggingface(config.get("vision_config") or {})
        bert = BertConfig.from_huggingface(config.get("bert_config") or {})
        names = {
            "width": "width",
            "perceiver_layers": "depth",
            "heads": "heads",
            "ff_width": "ff_width",
            "num_queries": "num_queries",
            "num_write": "num_write",
            "num_frame_positions": "num_frames",
            "text_conditioning": "text_conditioning",
            "layer_norm_eps": "norm_eps",
        }
        fields = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
        if "width" in fields:
            fields.setdefault("ff_width", 4 * fields["width"])
        others = ("clip_frames", "detail_tokens", "contrast_width")
        return cls(
            vision=vision,
            bert=bert,
            perceiver=PerceiverConfig(**fields, video_width=vision.width, text_width=bert.width),
            text=DecoderConfig.from_huggingface({**DECODERS[kind], "model_type": kind, **text}),
            **{name: config[name] for name in others if name in config},
        )


class Rewind(nnx.Module):
    """The networks; how frames become a memory and an answer is systems.rewind's business."""

    def __init__(self, config: RewindConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        width, told = config.perceiver.width, config.text.width
        self.vision = EvaViT(config.vision, dtype=dtype, stacked=stacked, rngs=rngs)
        self.bert = Bert(config.bert, dtype=dtype, stacked=stacked, rngs=rngs)
        self.perceiver = Perceiver(config.perceiver, dtype=dtype, stacked=stacked, rngs=rngs)
        self.memory = ReadWrite(config.perceiver, dtype=dtype, rngs=rngs)
        self.memory_projection = Linear(width, told, bias=True, dtype=dtype, rngs=rngs)
        self.detail_projection = Linear(config.vision.width, told, bias=True, dtype=dtype, rngs=rngs)
        self.separator = nnx.Param(normal(rngs.params(), (1, told), dtype))
        size = config.contrast_width
        self.contrast = Contrast(config.perceiver, size, dtype=dtype, rngs=rngs) if size else None
        self.text = Decoder(config.text, dtype=dtype, stacked=stacked, rngs=rngs)

    def features(self, pixels: jax.Array, *, remat: bool | str = False) -> jax.Array:
        """Patches' features [..., P, W] of normalised frames [..., H, W, 3], without the class token."""
        x = self.vision(pixels.reshape(-1, *pixels.shape[-3:]), remat=remat)[:, 1:]
        return x.reshape(*pixels.shape[:-3], *x.shape[1:])

    def instruct(self, ids: jax.Array, valid: jax.Array) -> Instruction:
        """What the networks know of a question int32 [B, S] in BERT's tokens, those that are valid bool [B, S]."""
        words, _ = self.bert(ids, valid)
        return self.perceiver.instruct(words, valid)

    def cycle(
        self, instruction: Instruction | None, *, remat: bool | str = False
    ) -> tuple[Callable, Callable, Callable]:
        """read, perceive and write for memory.rewind.watch."""
        return cycle(self.perceiver, self.memory, instruction, remat=remat)

    def asked(self, instruction: Instruction) -> jax.Array:
        """READ's query [B, H, 1, D / H] of the pooled instruction, for memory.rewind.select."""
        return self.memory.queries(instruction.pooled[:, None])

    def told(
        self, tokens: jax.Array, valid: jax.Array, details: jax.Array, details_valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What stands before the words for the decoder: vectors [B, N, width], and which of them there are [B, N].

        The memory's tokens [B, R, n, D] of the valid [B, R] frames, the separator, and the detail tokens [B, K, m, W]
        (see memory.rewind.pool) of the frames details_valid [B, K]; N = R n + 1 + K m.
        """
        batch, (count, each) = tokens.shape[0], details.shape[1:3]
        seen = self.memory_projection(tokens.reshape(batch, -1, tokens.shape[-1]))
        detail = self.detail_projection(details.reshape(batch, count * each, -1).astype(seen.dtype))
        separator = jnp.broadcast_to(self.separator[...], (batch, *self.separator.shape)).astype(seen.dtype)
        there = [jnp.repeat(valid, tokens.shape[2], axis=1), jnp.ones((batch, 1), bool)]
        there.append(jnp.repeat(details_valid, each, axis=1))
        return jnp.concatenate([seen, separator, detail], axis=1), jnp.concatenate(there, axis=1)
