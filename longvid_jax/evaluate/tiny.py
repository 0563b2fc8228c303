"""A tiny, randomly initialised Qwen2-VL as a Hugging Face folder with a tokenizer: to try things without a download."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from longvid_jax import convert
from longvid_jax.data.tokenizer import SPECIAL, byte_tokenizer, save_tokenizer
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig


def write_checkpoint(
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    vision_width: int = 64,
    vision_depth: int = 2,
    max_length: int = 32768,
) -> Path:
    """Writes the checkpoint and returns its folder, which must be absent or empty (else CheckpointError).

    Args:
      seed: of the weights.
      width, depth, heads, kv_heads: of the decoder.
      vision_width, vision_depth: of the vision tower, which has a head for every 16 of its width.
      max_length: positions that its config.json says it was trained for.

    Its patches are Qwen2-VL's own (14 pixels, 2 frames, merged 2 x 2), its tokens are bytes, and it says printable
    ASCII only.
    """
    tokenizer = byte_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    half = width // heads // 2
    section = 3 * half // 8  # Qwen2-VL's shares of time, height and width: 2 to 3 to 3
    config = {
        "model_type": "qwen2_vl",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": max_length,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * section, section, section]},
        "tie_word_embeddings": False,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": vision_depth,
            "embed_dim": vision_width,
            "num_heads": vision_width // 16,
            "hidden_size": width,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    model = Qwen2VL(Qwen2VLConfig.from_huggingface(config), rngs=nnx.Rngs(seed))
    _see_contrast(model, seed)
    _listen(model)
    _say_printable_only(model, tokenizer)
    folder = convert.save_huggingface(model, config, folder, convert.table_for(config))
    save_tokenizer(tokenizer, folder, max_length=max_length)
    return folder


def _see_contrast(model: Qwen2VL, seed: int) -> None:
    """Gives the vision tower biases, as a trained one has: without them its norms blow up the noise of grey patches."""
    key = jax.random.key(seed)
    for block in model.vision.blocks:
        for linear in (block.attention.proj, block.mlp.fc2):
            key, now = jax.random.split(key)
            linear.bias.set_value(0.3 * jax.random.normal(now, linear.bias.shape))


def _listen(model: Qwen2VL) -> None:
    """Scales the decoder's maps up to keep variance, so that answers hang on more than the last token."""
    linears = [model.text.lm_head]
    for layer in model.text.layers:
        linears += [getattr(layer.attention, name) for name in "qkvo"]
        linears += [getattr(layer.mlp, name) for name in ("gate", "up", "down")]
    for linear in linears:
        kernel = linear.kernel[...]
        linear.kernel.set_value(kernel / (jnp.std(kernel) * kernel.shape[0] ** 0.5))


def _say_printable_only(model: Qwen2VL, tokenizer: Tokenizer) -> None:
    """Sets the output columns of all other tokens to zero: their logits stay 0, below the best of the random ones."""
    printable = [tokenizer.encode(chr(code)).ids[0] for code in range(32, 127)]
    kernel = model.text.lm_head.kernel
    keep = jnp.zeros(kernel.shape[1], bool).at[jnp.array(printable)].set(True)
    kernel.set_value(jnp.where(keep, kernel[...], 0))
