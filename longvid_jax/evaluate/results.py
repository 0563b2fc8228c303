"""Results in a file that grows line by line, so that what was interrupted goes on and nothing is computed twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from longvid_jax.errors import OptionError

RUN, LINES = "run.json", "answers.jsonl"


class Results:
    """What has been computed, by key; in a folder, or with None in memory alone.

    about: what all of it hangs on, plain values. Raises OptionError for a folder of results about something else, or
    one that cannot be written.
    """

    def __init__(self, folder: str | Path | None, about: dict):
        self.folder = None if folder is None else Path(folder).expanduser()
        self._have: dict[str, dict] = {}
        if self.folder is not None:
            self._open(json.loads(json.dumps(about)))

    def _open(self, about: dict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            run, lines = self.folder / RUN, self.folder / LINES
            if not run.is_file():
                if any(self.folder.iterdir()):
                    raise OptionError(f"{self.folder} holds other things than results; give another --out.")
                run.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            before = json.loads(run.read_text(encoding="utf-8"))
            content = lines.read_bytes() if lines.is_file() else b""
            whole = content[: content.rfind(b"\n") + 1]  # a line that was being written is computed again
            lines.write_bytes(whole)
        except (OSError, ValueError) as error:
            raise OptionError(f"--out {self.folder} cannot be used ({error}); give another folder.") from error
        differ = [name for name in {**before, **about} if before.get(name, ...) != about.get(name, ...)]
        if differ:
            raise OptionError(
                f"{self.folder} holds results of another run, which differs in {', '.join(differ)}; give another --out."
            )
        for line in whole.decode("utf-8").splitlines():
            entry = json.loads(line)
            self._have[_name(entry["key"])] = entry["result"]

    def get(self, key: dict) -> dict | None:
        return self._have.get(_name(key))

    def put(self, key: dict, result: dict) -> dict:
        """Keeps a result, which it returns."""
        self._have[_name(key)] = result
        if self.folder is not None:
            with open(self.folder / LINES, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")
        return result


def _name(key: dict) -> str:
    return json.dumps(key, sort_keys=True)


def fingerprint(module) -> str:
    """A hash of a module's parameters, by which its results are known again."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(module):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
