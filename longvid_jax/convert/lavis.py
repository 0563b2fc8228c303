"""Checkpoints of LAVIS (BLIP-2, InstructBLIP and what is built on them) under the keys of Hugging Face.

Theirs are EVA's, as timm has them (with `visual_encoder.` before them, or without in EVA's own file), and BERT's. The
bias of q, k and v is two tensors there, since k has none.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from longvid_jax.errors import CheckpointError
from longvid_jax.models.eva_vit import EvaConfig

MODELS = ("instructblip", "blip-2")
_EVA, _BLOCK = r"(?:visual_encoder\.)?", r"vision_model.encoder.layers.\1"
RENAMED = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (rf"{_EVA}cls_token", r"vision_model.embeddings.class_embedding"),
        (rf"{_EVA}pos_embed", r"vision_model.embeddings.position_embedding"),
        (rf"{_EVA}patch_embed\.proj\.(.+)", r"vision_model.embeddings.patch_embedding.\1"),
        (rf"{_EVA}blocks\.(\d+)\.norm([12])\.(.+)", rf"{_BLOCK}.layer_norm\2.\3"),
        (rf"{_EVA}blocks\.(\d+)\.attn\.qkv\.(.+)", rf"{_BLOCK}.self_attn.qkv.\2"),
        (rf"{_EVA}blocks\.(\d+)\.attn\.proj\.(.+)", rf"{_BLOCK}.self_attn.projection.\2"),
        (rf"{_EVA}blocks\.(\d+)\.mlp\.(.+)", rf"{_BLOCK}.mlp.\2"),
        (r"ln_vision\.(.+)", r"vision_model.post_layernorm.\1"),
        (r"Qformer\.bert\.(.+)\.self\.(.+)", r"qformer.\1.attention.\2"),
        (r"Qformer\.bert\.(encoder\..+)", r"qformer.\1"),
        (r"(?:llm|opt|t5)_proj\.(.+)", r"language_projection.\1"),
        (r"(?:llm|opt|t5)_model\.(.+)", r"language_model.\1"),
    )
)
EMBEDDINGS = re.compile(r"Qformer\.bert\.embeddings\.(?:LayerNorm\.(.+)|(.+))")
BIASES = ("q_bias", "v_bias")


def names(config: dict, tensors: Mapping) -> dict[str, tuple[str, ...]]:
    """By Hugging Face key the names of the tensors that are it: one, or q's and v's bias.

    tensors: what is said of each, with a shape and a dtype. Keys that LAVIS does not have stay as they are. Raises
    CheckpointError if two tensors would have one key.
    """
    if config.get("model_type") not in MODELS:
        return {key: (key,) for key in tensors}
    found: dict[str, tuple[str, ...]] = {}
    for key in tensors:
        stem, _, last = key.rpartition(".")
        ours, stored = _renamed(key, config), (key,)
        if last in BIASES:
            both, bias = tuple(f"{stem}.{name}" for name in BIASES), f"{stem}.qkv.bias"
            if _renamed(bias, config) != bias and _alike([tensors.get(name) for name in both]):
                if key == both[1]:
                    continue  # it went with the other
                ours, stored = _renamed(bias, config), both
        if ours in found:
            raise CheckpointError(f"{stored[0]} and {found[ours][0]} are both {ours}; keep one.")
        found[ours] = stored
    return found


def joined(infos: list):
    """What is said of the tensor that is made of these: one, or q's and v's bias."""
    first, *more = infos
    if not more:
        return first
    return dataclasses.replace(first, shape=(3 * first.shape[0],), nbytes=3 * first.nbytes, offset=None)


def qkv_bias(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(q, 0, v)."""
    return np.concatenate([q, np.zeros_like(q), v])


def _renamed(key: str, config: dict) -> str:
    if block := re.match(r"blocks\.(\d+)\.", key):
        depth = (config.get("vision_config") or {}).get("num_hidden_layers", EvaConfig.depth)
        if int(block[1]) >= depth:
            return key  # EVA's own file has one more than is used
    if found := EMBEDDINGS.fullmatch(key):
        own, norm = ("", "layernorm.") if config["model_type"] == "blip-2" else ("qformer.", "embeddings.layernorm.")
        return f"qformer.{norm}{found[1]}" if found[1] else f"{own}embeddings.{found[2]}"
    for pattern, ours in RENAMED:
        if found := pattern.fullmatch(key):
            return found.expand(ours)
    return key


def _alike(infos: list) -> bool:
    """Whether these are two biases that can be joined."""
    return None not in infos and len({(info.shape, info.dtype) for info in infos}) == len(infos[0].shape) == 1
