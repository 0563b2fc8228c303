"""Options of `longvid bench claims` that several systems have, each with values of its own."""

from __future__ import annotations

from collections.abc import Sequence

from longvid_jax.errors import OptionError


def parts(given: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """--parts: all of what is known where none are given."""
    for one in given or ():
        if one not in known:
            raise OptionError(f"--parts has {one!r}, but each must be one of {', '.join(known)}.")
    return tuple(given or known)


def own(given: Sequence[str] | None, ways: Sequence[str]) -> dict[str, str]:
    """--own WAY=PATH: paths of models by the way that they were trained with."""
    found = {}
    for text in given or ():
        way, _, where = text.partition("=")
        if way not in ways or not where:
            raise OptionError(f"--own is {text!r}, but must be WAY=PATH with a way of {', '.join(ways)}.")
        if way in found:
            raise OptionError(f"--own gives {way} twice; give each way one model.")
        found[way] = where
    return found
