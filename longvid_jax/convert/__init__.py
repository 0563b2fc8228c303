"""Hugging Face checkpoints into modules and back: one table a model, both directions, streamed and strict."""

from longvid_jax.convert.export import to_huggingface, verify
from longvid_jax.convert.folder import Checkpoint
from longvid_jax.convert.inspect import describe, render
from longvid_jax.convert.load import check_finite, fill, plan, restore
from longvid_jax.convert.modules import build, from_huggingface, network_config, open_weights
from longvid_jax.convert.save import Part, save_huggingface, write_huggingface
from longvid_jax.convert.source import Source, TensorInfo, open_source
from longvid_jax.convert.tables import Table, architecture, table_for
from longvid_jax.convert.write import Needs, needs, open_to_convert, to_orbax

__all__ = [
    "Checkpoint",
    "Needs",
    "Part",
    "Source",
    "Table",
    "TensorInfo",
    "architecture",
    "build",
    "check_finite",
    "describe",
    "fill",
    "from_huggingface",
    "needs",
    "network_config",
    "open_source",
    "open_to_convert",
    "open_weights",
    "plan",
    "render",
    "restore",
    "save_huggingface",
    "table_for",
    "to_huggingface",
    "to_orbax",
    "verify",
    "write_huggingface",
]
