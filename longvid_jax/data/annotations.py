"""Files of annotations: JSON objects with an entry for each id, and CSV files; faults name the file and the entry."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longvid_jax.errors import DataError

KINDS = {str: "a string", (int, float): "a number", (str, int): "a string or a whole number"}


def read_json(file: Path) -> dict:
    """The object in a .json file; DataError if there is none."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give a file of annotations.") from error
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}); give a file of annotations.") from error
    return _object(held, f"{file} holds")


def table(file: Path, under: str = "") -> Iterator[tuple[str, dict, str]]:
    """(id, entry, how to name it) of each entry of a JSON object, or of the one that it has as `under`."""
    held = read_json(file)
    if under in held:
        held = _object(held[under], f"{file}: {under} is")
    for id, entry in held.items():
        where = f"{file}: entry {id!r}"
        yield id, _object(entry, f"{where} is"), where


def items(held: Mapping, name: str, file: Path) -> Sequence[dict]:
    """The objects in a list of COCO's layout; none if there is no such list."""
    found = held.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise DataError(f"{file}: {name} is not a list of objects; expected COCO's layout.")
    return found


def rows(file: Path, delimiter: str, columns: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    """(row, how to name it) of each row of a CSV file that has such columns."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give a CSV file.") from error
    except ValueError as error:
        raise DataError(f"{file} is no text ({error}); give a CSV file.") from error
    reader = csv.DictReader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    if absent := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise DataError(f"{file} has no column {absent[0]}; its first line must name {', '.join(columns)}.")
    for row in reader:
        where = f"{file}: line {reader.line_num}"
        if None in row or None in row.values():
            raise DataError(f"{where} does not have the {len(reader.fieldnames)} columns that the first line names.")
        yield row, where


def field(entry: Mapping, name: str, kind, where: str) -> Any:
    """An entry's value of a name, which must be of that kind."""
    if name not in entry:
        raise DataError(f"{where} has no {name}; it has {', '.join(map(str, entry)) or 'nothing'}.")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where} has the {name} {value!r}; expected {KINDS[kind]}.")
    return value


def whole(value: Any, name: str, where: str) -> int:
    """A number, or the text of one, rounded down; it must be at least 1."""
    try:
        number = int(float(value))
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1:
        raise DataError(f"{where} has the {name} {value!r}; expected a number of at least 1.")
    return number


def length(entry: Mapping, name: str, where: str) -> int | None:
    """How many frames a video has by its annotation; None if that does not say."""
    return whole(entry[name], name, where) if name in entry else None


def _object(held: Any, what: str) -> dict:
    if not isinstance(held, dict):
        raise DataError(f"{what} a JSON {type(held).__name__}; expected an object.")
    return held
