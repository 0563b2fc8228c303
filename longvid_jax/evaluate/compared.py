"""Models that differ from another in a few tensors, kept as those tensors alone."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
from safetensors.flax import load_file, save_file

from longvid_jax.errors import CheckpointError

WEIGHTS = "model.safetensors"


def keep(base: Path, other: Path, file: Path) -> list[str]:
    """Writes the tensors of `other` that differ from `base`, both Hugging Face folders of one file; gives their names.

    Raises CheckpointError if their tensors are not of the same names.
    """
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (base, other))
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise CheckpointError(f"{other} and {base} cannot be compared: only one of them has {odd[0]}.")
    differ = {name: x for name, x in theirs.items() if not jnp.array_equal(ours[name], x)}
    save_file(differ, file)
    return sorted(differ)


@contextmanager
def folders(base: Path, kept: Path) -> Iterator[dict[str, Path]]:
    """By name the models that `keep` wrote as kept/NAME.safetensors: Hugging Face folders, while the context lasts."""
    ours = load_file(base / WEIGHTS)
    with tempfile.TemporaryDirectory() as home:
        found = {}
        for file in sorted(kept.glob("*.safetensors")):
            found[file.stem] = folder = Path(home) / file.stem
            shutil.copytree(base, folder, ignore=shutil.ignore_patterns(WEIGHTS))
            save_file(ours | load_file(file), folder / WEIGHTS, metadata={"format": "pt"})
        yield found
