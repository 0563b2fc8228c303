"""A small random ReWind."""

from pathlib import Path

from longvid_jax.train import config, models
from longvid_jax.train.export import export
from tests.systems.small_adacm2 import with_random


def described(width: int, ff_width: int, layers: int, *, size: int, patch: int, words: int, queries: int) -> dict:
    """The config.json of one whose networks are all as wide, for frames of `size` pixels and questions of `words`."""
    sizes = {"hidden_size": width, "intermediate_size": ff_width, "num_hidden_layers": layers, "num_attention_heads": 2}
    return {
        "model_type": "rewind",
        "vision_config": sizes | {"image_size": size, "patch_size": patch},
        "bert_config": sizes | {"max_position_embeddings": words},
        "text_config": sizes | {"model_type": "llama", "rms_norm_eps": 1e-6},
        "width": width,
        "perceiver_layers": layers,
        "heads": 2,
        "num_queries": queries,
        "detail_tokens": 4,
    }


MODEL = described(16, 24, 1, size=28, patch=7, words=24, queries=3)
CHOICES = {"clip_frames": 4, "num_candidates": 6, "num_selected": 3, "num_neighbors": 2}


def make(folder: Path) -> Path:
    """A random model with both tokenizers, as training writes it."""
    return written(folder, MODEL, change=with_random)


def written(folder: Path, described: dict, *, seed: int = 0, change=lambda module: module) -> Path:
    """A model of a config.json as its networks begin, and then changed."""
    wanted = config.resolve({"model": described, "seed": seed, "stages": ({"steps": 1},)})
    model, module = models.build(wanted)
    return export(change(module), model, wanted, folder)
