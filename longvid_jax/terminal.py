"""What sub-commands print with: results on standard output, lines and progress for people on standard error."""

import contextlib
import json
import os
import sys
from pathlib import Path


def printable(text: str) -> str:
    """The text without control characters, which could do things to a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def print_json(result: dict) -> None:
    print(json.dumps(result, allow_nan=False))


def say(line: str) -> None:
    print(f"longvid: {line}", file=sys.stderr)


@contextlib.contextmanager
def progress(in_bytes: bool = False):
    """A progress bar on standard error: alive on a terminal, its last state elsewhere, and nothing after an error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn()
    console = Console(stderr=True)
    bars = Progress(*columns, TimeRemainingColumn(), console=console)
    if not console.is_terminal:
        yield bars
        console.print(bars.get_renderable())
        return
    with bars:
        try:
            yield bars
        except BaseException:
            bars.live.transient = True
            raise


def keep_compiled() -> None:
    """Keeps compiled programs for the next run, in the user's cache; LONGVID_COMPILATION_CACHE=0 turns it off."""
    if os.environ.get("LONGVID_COMPILATION_CACHE") == "0" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "longvid_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)  # the default, 1 s, leaves most out on CPUs
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
