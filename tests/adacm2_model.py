"""A small InstructBLIP with random weights, as `longvid train --config configs/adacm2.py:smoke` begins with it."""

from pathlib import Path

from longvid_jax.train import config, models
from longvid_jax.train.export import export

SMOKE = f"{Path(__file__).parents[1] / 'configs' / 'adacm2.py'}:smoke"
LAYERS, TOKENS, SIZE = 2, 5, 28  # that cross-attend, of a frame, and pixels of its side
ONE = "--config.model.{}_config.num_hidden_layers=1"


def write(folder: Path) -> Path:
    """Writes it into a folder of a folder, with both tokenizers, and returns that."""
    layers = ["--config.model.qformer_config.num_hidden_layers=3", ONE.format("vision"), ONE.format("text")]
    wanted = config.load(SMOKE, layers)
    model, module = models.build(wanted)
    return export(module, model, wanted, folder)
