"""From a module back to a Hugging Face folder."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from longvid_jax.convert.paths import leaves
from longvid_jax.convert.source import WEIGHTS
from longvid_jax.convert.tables import Table, class_name
from longvid_jax.errors import CheckpointError

NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(jnp.bfloat16): "BF16"}


def save_huggingface(module, config: dict, folder: str | Path, table: Table, dtype=None) -> Path:
    """Writes `config` and the parameters of `module` as a folder that transformers loads; returns the folder.

    dtype: of all tensors; None keeps that of each parameter. The folder must be absent or empty (else CheckpointError)
    and gets its name once it is whole. Host memory: one parameter of one layer at a time.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} already exists and is not empty; remove it or give another target.")
    tensors = _tensors(module, table, dtype)
    config = {**config, "architectures": [class_name(config)]}
    dtypes = {entry[1].name for entry in tensors.values()}
    if len(dtypes) == 1:
        config["torch_dtype"] = config["dtype"] = dtypes.pop()  # the names before and after transformers 4.56
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        os.chmod(unfinished, 0o777 & ~_umask())  # mkdtemp makes it private
        _write(unfinished / WEIGHTS, tensors)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


Tensor = tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def _tensors(module, table: Table, dtype) -> dict[str, Tensor]:
    """Of each source key its shape, its dtype, and how to get its values."""
    tensors = {}
    for leaf in leaves(module):
        for n, path in enumerate(leaf.part_paths):
            found = table.source(path)
            if found is None:
                raise CheckpointError(f"the parameter {path} has no name in the Hugging Face layout.")
            key, op = found
            kept = np.dtype(leaf.value.dtype if dtype is None else dtype)
            if kept not in NAMES:
                raise CheckpointError(f"{path} is {kept.name}; only float32, float16 and bfloat16 are written.")

            def values(value=leaf.value, n=n if leaf.stacked else None, op=op, kept=kept):
                array = np.asarray(jax.device_get(value if n is None else value[n]))
                return op.invert(array).astype(kept, copy=False)

            tensors[key] = (op.source_shape(leaf.part_shape), kept, values)
    return tensors


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """The safetensors format, tensor after tensor: the library's own writer wants them all in memory at once."""
    # Wide types first keeps every tensor aligned.
    order = sorted(tensors, key=lambda key: (-tensors[key][1].itemsize, key))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        shape, dtype, _ = tensors[key]
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for key in order:
            stream.write(np.ascontiguousarray(tensors[key][2]()).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
