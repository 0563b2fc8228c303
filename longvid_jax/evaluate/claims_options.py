"""What the systems' `longvid bench claims` have in common: options that are read alike, and results written alike."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from longvid_jax.errors import OptionError
from longvid_jax.evaluate.results import Results, fingerprint
from longvid_jax.evaluate.world import Setup, check_size


def given(arguments: argparse.Namespace, names: Sequence[str], quick: Mapping) -> dict:
    """Of these options those that are given, and with --quick that one's values for others."""
    found = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return ({**quick} if arguments.quick else {}) | found


def check_counts(values: Mapping, names: Sequence[str]) -> None:
    """OptionError where one of these options, a number or several, is below 1."""
    for name in names:
        value, flag = values.get(name, 1), f"--{name.replace('_', '-')}"
        if isinstance(value, Sequence):
            for one in value:
                if one < 1:
                    raise OptionError(f"{flag} has {one}, but each must be at least 1.")
        elif value < 1:
            raise OptionError(f"{flag} is {value}, but must be at least 1.")


def setup(arguments: argparse.Namespace, examples: int | None, families: Sequence[str] | None = None) -> Setup:
    """The worlds that are asked for."""
    found = Setup(
        examples=Setup.examples if examples is None else examples,
        level=arguments.level,
        seconds=arguments.seconds,
        fps=arguments.fps,
        size=(arguments.size, arguments.size),
        families=families,
    )
    found.world(0)
    return found


def parts(wanted: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """--parts: all of what is known where none are given."""
    for one in wanted or ():
        if one not in known:
            raise OptionError(f"--parts has {one!r}, but each must be one of {', '.join(known)}.")
    return tuple(wanted or known)


def own(texts: Sequence[str] | None, ways: Sequence[str]) -> dict[str, str]:
    """--own WAY=PATH: paths of models by the way that they were trained with."""
    found = {}
    for text in texts or ():
        way, _, where = text.partition("=")
        if way not in ways or not where:
            raise OptionError(f"--own is {text!r}, but must be WAY=PATH with a way of {', '.join(ways)}.")
        if way in found:
            raise OptionError(f"--own gives {way} twice; give each way one model.")
        found[way] = where
    return found


def load(path, own: Mapping[str, str], check: Callable, size: tuple[int, int], **options) -> dict:
    """The model that stands for the others at "", and by way those of --own; all of them are checked.

    check: raises OptionError for a model, and its path, of which there is nothing to claim. size: of frames. options:
    of `longvid_jax.load`.
    """
    from longvid_jax.systems import loading

    found = {}
    for way, where in {"": path, **own}.items():
        found[way] = loading.load(where, **options)
        check(found[way], where)
        check_size(found[way], size)
    return found


def results(arguments: argparse.Namespace, model, setup: Setup) -> tuple[Results, dict]:
    """What --out has of earlier runs with these weights, and the setup in plain values."""
    plain = json.loads(json.dumps(dataclasses.asdict(setup)))
    return Results(arguments.out, {"weights": fingerprint(model.model), "setup": plain}), plain


def write(folder: Path, name: str, found: Mapping, tables: Mapping[str, Sequence[Mapping]]) -> None:
    """The result as JSON, and those tables of it that have rows as CSV files."""
    (folder / name).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for table, rows in tables.items():
        if rows:
            with open(folder / table, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list({name: None for row in rows for name in row}))
                writer.writeheader()
                writer.writerows(rows)
