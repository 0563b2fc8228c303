"""Names for the parameters of a module: `layers/03/mlp/gate/kernel`, whether its layers are a tuple or one stack.

A canonical path has every layer apart, its number with at least two digits; tables, reports and checkpoints on disk
speak of parameters by it. Patterns that choose parameters are matched against the path without layer numbers,
`layers/mlp/gate/kernel`, so that one pattern serves both layouts.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
from flax import nnx

from longvid_jax.errors import OptionError

STACKS = ("layers", "blocks")  # repeated layers have these names, and nothing else has
_NUMBER = re.compile(rf"((?:^|/)(?:{'|'.join(STACKS)}))/\d+(?=/|$)")


@dataclass(frozen=True)
class Leaf:
    """One array (or jax.ShapeDtypeStruct) of a module.

    In a tuple of layers its path is `layers/03/norm/scale` and it has one part; in a stack its path is
    `layers/norm/scale` and its leading axis counts the layers, each a part.
    """

    path: str
    value: jax.Array | jax.ShapeDtypeStruct
    stacked: bool

    @property
    def part_paths(self) -> list[str]:
        """The canonical path of each part, in order: one a layer in a stack, else one."""
        return part_paths(self.path, self.value.shape[0]) if self.stacked else [self.path]

    @property
    def part_shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape[1:]) if self.stacked else tuple(self.value.shape)


def leaves(module, within: str = "") -> list[Leaf]:
    """The arrays of a module (or of its jax.eval_shape), in the order of jax.tree.leaves.

    within: what its paths begin with, `vision/` for a model's vision tower alone.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda node: isinstance(node, nnx.Param))
    named = []
    for keys, value in found:
        path = path_of(keys)
        value = value.get_value() if isinstance(value, nnx.Param) else value
        named.append(Leaf(within + path, value, is_stacked(path)))
    return named


def path_of(keys) -> str:
    """The path of a key path, as jax.tree_util gives it."""
    return "/".join(map(_segment, keys))


def is_stacked(path: str) -> bool:
    """Whether what has this path lies in a stack of layers."""
    segments = path.split("/")
    return any(name in STACKS and not after.isdigit() for name, after in zip(segments, segments[1:], strict=False))


def part_paths(path: str, depth: int) -> list[str]:
    """The canonical paths of the layers of a stack."""
    segments = path.split("/")
    at = next(i for i, segment in enumerate(segments) if segment in STACKS) + 1
    return ["/".join([*segments[:at], f"{n:02d}", *segments[at:]]) for n in range(depth)]


def without_layers(path: str) -> str:
    """The path that patterns are matched against: layer numbers are left out."""
    return _NUMBER.sub(r"\1", path)


def select(patterns: str | Sequence[str], paths: Iterable[str], option: str) -> set[str]:
    """The paths that one of the regular expressions matches from end to end, layer numbers left out.

    Raises OptionError, which names the option, for a pattern that is no regular expression or matches nothing.
    """
    if not isinstance(patterns, str | Sequence):
        raise OptionError(f"{option} is {patterns!r}, but must be a regular expression or a list of them.")
    plain = {path: without_layers(path) for path in paths}
    chosen = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            expression = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise OptionError(
                f"{option} has {pattern!r}, which is no regular expression ({error}); mend it."
            ) from error
        found = {path for path, name in plain.items() if expression.fullmatch(name)}
        if not found:
            near = difflib.get_close_matches(pattern, sorted(set(plain.values())), n=3, cutoff=0.0)
            raise OptionError(
                f"{option} has {pattern!r}, which must match a whole path such as {' or '.join(near) or 'none'}, and "
                "matches none; mend it or leave it out."
            )
        chosen |= found
    return chosen


def _segment(key) -> str:
    match key:
        case jax.tree_util.SequenceKey(idx=index):
            return f"{index:02d}"
        case jax.tree_util.GetAttrKey(name=name):
            return str(name)
        case _:
            return str(key.key)  # DictKey, FlattenedIndexKey
