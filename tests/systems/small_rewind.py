"""A small random ReWind."""

from pathlib import Path

from longvid_jax.train import config, models
from longvid_jax.train.export import export
from tests.systems.small_adacm2 import with_random

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL = {
    "model_type": "rewind",
    "vision_config": SIZES | {"image_size": 28, "patch_size": 7},
    "bert_config": SIZES | {"max_position_embeddings": 24},
    "text_config": SIZES | {"model_type": "llama", "rms_norm_eps": 1e-6},
    "width": 16,
    "perceiver_layers": 1,
    "heads": 2,
    "num_queries": 3,
    "detail_tokens": 4,
}
CHOICES = {"clip_frames": 4, "num_candidates": 6, "num_selected": 3, "num_neighbors": 2}


def make(folder: Path) -> Path:
    """A random model with both tokenizers, as training writes it."""
    wanted = config.resolve({"model": MODEL, "stages": ({"steps": 1},)})
    model, module = models.build(wanted)
    return export(with_random(module), model, wanted, folder)
