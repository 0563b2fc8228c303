"""Tiny random checkpoints in the Hugging Face layout, written with NumPy alone; test_parity compares the layout."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from longvid_jax import convert
from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
from tests.convert import resuming

WIDTH, HIDDEN, VOCAB, KV, LAYERS = 32, 48, 64, 16, 4
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 2,
    "embed_dim": 16,
    "hidden_size": WIDTH,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen2_vl": "Qwen2VLForConditionalGeneration"}
MODELS = list(CLASSES)


def config_of(model: str, *, tied: bool = False) -> dict:
    config = {**CONFIG, "model_type": model, "architectures": [CLASSES[model]], "tie_word_embeddings": tied}
    if model == "qwen2_vl":
        config["vision_config"] = dict(VISION)
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    return config


def shapes_of(model: str, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint and its shape, as torch has it."""
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (WIDTH if p in "qo" else KV, WIDTH) for p in "qkvo"}
        if model != "llama":
            shapes |= {f"{layer}.self_attn.{p}_proj.bias": (WIDTH if p == "q" else KV,) for p in "qkv"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (HIDDEN, WIDTH) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
    if model == "qwen2_vl":
        width = VISION["embed_dim"]
        shapes["visual.patch_embed.proj.weight"] = (width, 3, 2, 4, 4)
        linears = {"visual.merger.mlp.0": (64, 64), "visual.merger.mlp.2": (WIDTH, 64)}
        norms = ["visual.merger.ln_q"]
        for n in range(VISION["depth"]):
            block = f"visual.blocks.{n}"
            norms += [f"{block}.norm1", f"{block}.norm2"]
            linears |= {f"{block}.attn.qkv": (48, width), f"{block}.attn.proj": (width, width)}
            linears |= {f"{block}.mlp.fc1": (32, width), f"{block}.mlp.fc2": (width, 32)}
        shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
        shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    return shapes


def tensors_of(model: str, *, tied: bool = False, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes_of(model, tied=tied).items()}


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    keys, where = sorted(tensors), {}
    for n in range(shards):
        name = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        save_file({key: tensors[key] for key in keys[n::shards]}, folder / name, {"format": "pt"})
        where |= dict.fromkeys(keys[n::shards], name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def abstract(config: dict, *, stacked: bool = False):
    """The module of a config, without arrays."""
    if config["model_type"] == "qwen2_vl":
        made, settings = Qwen2VL, Qwen2VLConfig.from_huggingface(config)
    else:
        made, settings = Decoder, DecoderConfig.from_huggingface(config)
    return jax.eval_shape(lambda: made(settings, stacked=stacked, rngs=nnx.Rngs(0)))


def newer_prefixes(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The key prefixes that Qwen2-VL has inside transformers since 4.52."""

    def renamed(key: str) -> str:
        if key.startswith("visual."):
            return f"model.{key}"
        return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key

    return {renamed(key): tensor for key, tensor in tensors.items()}


class Checkpoints:
    """What tests make checkpoints with."""

    models = MODELS
    config, tensors, shapes = staticmethod(config_of), staticmethod(tensors_of), staticmethod(shapes_of)
    write, abstract, newer_prefixes = staticmethod(write), staticmethod(abstract), staticmethod(newer_prefixes)

    def __init__(self, folder: Path):
        self.folder = folder

    def make(
        self, model: str = "llama", *, tied: bool = False, dtype=np.float32, change: Callable | None = None, **how
    ):
        """A folder with a whole checkpoint; `change` may edit its tensors before they are written."""
        tensors = tensors_of(model, tied=tied, dtype=dtype)
        if change is not None:
            tensors = change(tensors) or tensors
        return write(self.folder / "checkpoint", config_of(model, tied=tied), tensors, **how)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """(model, tied=False) -> its Hugging Face folder and what `to_orbax` made of it, once: they stay as they are."""

    @cache
    def make(model: str = "llama", *, tied: bool = False) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(model)
        source = write(folder / "source", config_of(model, tied=tied), tensors_of(model, tied=tied), shards=2)
        return source, convert.to_orbax(source, folder / "converted")

    return make


@pytest.fixture(scope="session")
def resumable(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint that makes some parts, and an uninterrupted conversion of it; they stay as they are."""
    folder = tmp_path_factory.mktemp("resumable")
    source = resuming.write_source(folder / "source")
    return source, resuming.to_orbax(source, folder / "whole")
