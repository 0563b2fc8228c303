"""The folder of a training run: whose it is, and what a run that is taken up again finds in it.

config.json, metrics.jsonl, skipped.jsonl, events.out.tfevents.*, checkpoints/STEP/, profile/, and at the end model/
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from longvid_jax.convert.folder import write_json
from longvid_jax.convert.source import read_json
from longvid_jax.convert.target import locked
from longvid_jax.errors import TrainError
from longvid_jax.train.config import as_json, differences

CONFIG, CHECKPOINTS, MODEL, ADAPTERS, PROFILE = "config.json", "checkpoints", "model", "adapters", "profile"
SHOWN = 8  # keys that differ


@contextmanager
def opened(workdir: str | Path, config) -> Iterator[Path]:
    """The absolute path of the folder, which is this run's alone within, with the config in it.

    Raises TrainError if it holds something else, or a run of another config, whose keys that differ are named;
    CheckpointError if another process has it or it cannot be written.
    """
    if jax.process_index():  # the first process has the lock for all
        yield Path(workdir).expanduser().resolve()
        return
    with locked(workdir) as folder:
        file, config = folder / CONFIG, as_json(config)
        if file.is_file():
            if keys := differences(read_json(file), config):
                more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
                raise TrainError(
                    f"{workdir} was made with another config, which differs in {', '.join(keys[:SHOWN])}{more}; "
                    "give another --workdir or the same values."
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise TrainError(f"{workdir} is not empty and no training's folder; give another --workdir.")
        try:
            (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            write_json(file, config)
        except OSError as error:
            raise TrainError(f"{workdir} cannot be written ({error.strerror}); give another --workdir.") from error
        yield folder


def keep_lines(file: Path, wanted: Callable[[dict], bool]) -> list[dict]:
    """Rewrites a .jsonl file with its wanted entries alone, which are returned; a line that is cut off is dropped."""
    if not file.is_file():
        return []
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # the process was killed while it wrote this line
    entries = [entry for entry in entries if wanted(entry)]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return entries
