"""Names for the parameters of a module: `layers/03/mlp/gate/kernel`, whether its layers are a tuple or one stack.

A canonical path has every layer apart, its number with at least two digits; tables, reports and checkpoints on disk
speak of parameters by it.
"""

from dataclasses import dataclass

import jax
from flax import nnx

STACKS = ("layers", "blocks")  # repeated layers have these names, and nothing else has


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
        if not self.stacked:
            return [self.path]
        segments = self.path.split("/")
        at = next(i for i, segment in enumerate(segments) if segment in STACKS) + 1
        return ["/".join([*segments[:at], f"{n:02d}", *segments[at:]]) for n in range(self.value.shape[0])]

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
        segments = [_segment(key) for key in keys]
        stacked = any(
            name in STACKS and not following.isdigit() for name, following in zip(segments, segments[1:], strict=False)
        )
        value = value.get_value() if isinstance(value, nnx.Param) else value
        named.append(Leaf(within + "/".join(segments), value, stacked))
    return named


def _segment(key) -> str:
    match key:
        case jax.tree_util.SequenceKey(idx=index):
            return f"{index:02d}"
        case jax.tree_util.GetAttrKey(name=name):
            return str(name)
        case _:
            return str(key.key)  # DictKey, FlattenedIndexKey
