"""From the library's own folder back to a Hugging Face folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from longvid_jax.convert.folder import PARAMS, Checkpoint, checksum, files_beside
from longvid_jax.convert.save import Part, write_huggingface
from longvid_jax.convert.tables import table_for
from longvid_jax.convert.target import check_apart
from longvid_jax.errors import CheckpointError


def to_huggingface(
    checkpoint: Checkpoint | str | Path,
    target: str | Path,
    *,
    dtype=None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes a converted checkpoint as a folder that transformers loads; returns the folder.

    Without a dtype its tensors are bit for bit what was converted. Tokenizer, chat template and the like go with it.
    Arguments and errors otherwise as of write_huggingface; CheckpointError if `checkpoint` is no converted one, or if a
    parameter of it has changed since it was made.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    check_apart(checkpoint.path, target)
    parts = {
        path: Part(spec.shape, np.dtype(spec.dtype), partial(_read, checkpoint, path, spec))
        for path, spec in checkpoint.arrays.items()
    }
    return write_huggingface(
        parts,
        checkpoint.config,
        target,
        table_for(checkpoint.config),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        beside=files_beside(checkpoint.path),
        overwrite=overwrite,
        progress=progress,
    )


def verify(checkpoint: Checkpoint, progress: Callable[[int], None] | None = None) -> None:
    """Reads every parameter; CheckpointError for the first whose checksum is not that of the provenance.

    progress: called with the bytes that have just been read.
    """
    if "parameters_crc32" not in checkpoint.provenance:
        raise CheckpointError(f"{checkpoint.name} has no checksums in its provenance.json; convert again.")
    for path, spec in checkpoint.arrays.items():
        size = _read(checkpoint, path, spec).nbytes
        if progress:
            progress(size)


def _read(checkpoint: Checkpoint, path: str, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    """One parameter, after its checksum has been compared."""
    array = checkpoint.read({path: spec})[path]
    made = checkpoint.provenance.get("parameters_crc32", {}).get(path)
    if made is not None and checksum(array) != made:
        raise CheckpointError(
            f"{checkpoint.path / PARAMS}: {path} is damaged, its checksum is not that of the provenance; convert again."
        )
    return array
