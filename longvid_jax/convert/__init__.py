"""Hugging Face checkpoints into modules and back: one table a model, both directions, streamed and strict."""

from longvid_jax.convert.inspect import describe, render
from longvid_jax.convert.load import check_finite, fill, plan
from longvid_jax.convert.save import save_huggingface
from longvid_jax.convert.source import Source, TensorInfo, open_source
from longvid_jax.convert.tables import Table, architecture, table_for

__all__ = [
    "Source",
    "Table",
    "TensorInfo",
    "architecture",
    "check_finite",
    "describe",
    "fill",
    "open_source",
    "plan",
    "render",
    "save_huggingface",
    "table_for",
]
