"""The library's own checkpoint folder: `params/`, written by Orbax, and beside it what a model needs besides.

config.json, tokenizer files, chat template, ...   as they were in the Hugging Face folder, InstructBLIP's
                                                   second tokenizer in its qformer_tokenizer/
provenance.json                                    where the parameters came from, a checksum of each, and file sizes
params/                                            plain nested dicts, each layer its own: layers/03/mlp/up/kernel
"""

import json
import math
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from longvid_jax import checkpoint
from longvid_jax.convert.source import BESIDE, TOKENIZER_FOLDER, read_json
from longvid_jax.errors import CheckpointError

PARAMS, PROVENANCE, CONFIG = "params", "provenance.json", "config.json"
SIZES = "params_bytes"  # in the provenance
FORMAT = 1


class Checkpoint:
    """A converted checkpoint whose metadata have been read.

    `.name` as it was asked for, its folder `.path`, its `.config`, its `.provenance`, and `.arrays`: shape and dtype
    by canonical path. CheckpointError if the folder is none, or is not whole.
    """

    def __init__(self, folder: str | Path):
        self.name, self.path = str(folder), Path(folder).expanduser().absolute()
        if not is_checkpoint(self.path):
            raise CheckpointError(
                f"{folder} holds no whole {PARAMS} folder of Orbax; give a folder that `longvid convert` has made."
            )
        self.config = read_json(self.path / CONFIG)
        self.provenance = read_json(self.path / PROVENANCE) if (self.path / PROVENANCE).exists() else {}
        if (made := self.provenance.get("format", FORMAT)) != FORMAT:
            raise CheckpointError(
                f"{folder} has the format {made}, but this version reads {FORMAT}; use the longvid_jax that made it."
            )
        _check_sizes(self.path / PARAMS, self.provenance.pop(SIZES, {}))
        try:
            self.arrays = checkpoint.contents(self.path / PARAMS)
        except Exception as error:  # Orbax has no common base for what a damaged folder makes it raise
            raise CheckpointError(
                f"{self.path / PARAMS} cannot be read ({first_line(error)}); convert again."
            ) from error

    def nbytes(self, dtype=None) -> int:
        """Of all arrays, in the dtype if one is given."""
        return sum(math.prod(array.shape) * np.dtype(dtype or array.dtype).itemsize for array in self.arrays.values())

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array | np.ndarray]:
        """The wanted arrays in the wanted dtypes and shardings; NumPy arrays where no sharding is given."""
        try:
            return checkpoint.restore(self.path / PARAMS, wanted)
        except Exception as error:
            names = list(wanted)
            which = names[0] if len(names) == 1 else f"one of {names[0]} to {names[-1]}"
            raise CheckpointError(
                f"{self.path / PARAMS}: {which} cannot be read ({first_line(error)}); convert again."
            ) from error


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a folder of the library's own kind, and whole."""
    return checkpoint.is_checkpoint(folder / PARAMS)


def is_converted(folder: Path) -> bool:
    """Whether `to_orbax` made the folder, and not somebody else who keeps parameters in one of the name."""
    return is_checkpoint(folder) and (folder / PROVENANCE).is_file()


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _check_sizes(folder: Path, expected: Mapping[str, int]) -> None:
    """Names the file that is missing or cut off, which Orbax cannot: it finds out late, and speaks of array indices."""
    for name, size in expected.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; copy the folder again or convert again.")
        if (found := file.stat().st_size) != size:
            raise CheckpointError(
                f"{file} has {found:,} bytes, but must have {size:,}; copy the folder again or convert again."
            )


def files_beside(folder: Path) -> list[Path]:
    """What belongs to a model besides its weights and its config: tokenizer, chat template, generation config, ..."""
    patterns = [f"{below}{pattern}" for below in ("", f"{TOKENIZER_FOLDER}/") for pattern in BESIDE]
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(
        file for file in found if file.name not in (CONFIG, PROVENANCE) and not file.name.endswith(".index.json")
    )


def copy_beside(file: Path, folder: Path) -> None:
    """Copies a file that files_beside gave into another model's folder, to where it was in its own."""
    below = folder / TOKENIZER_FOLDER if file.parent.name == TOKENIZER_FOLDER else folder
    below.mkdir(exist_ok=True)
    shutil.copyfile(file, below / file.name)


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order: it finds damage, not malice."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def first_line(error: Exception) -> str:
    """What an error of another library says, or the one that was its cause, short enough for one sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).partition(" [tensorstore_spec=")[0].strip().splitlines()
    return lines[0][:500].rstrip(".") if lines else type(error).__name__
