"""A module as flat dicts of arrays by path: those that are trained and those that are frozen.

Paths are the module's own, `text/layers/mlp/up/kernel` in a stack and `text/layers/03/mlp/up/kernel` in a tuple of
layers; patterns are regular expressions for whole paths without layer numbers (see models.paths.select).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from longvid_jax.errors import OptionError
from longvid_jax.models.paths import leaves, select

Params = dict[str, jax.Array]
DECAYED = ("kernel", "embedding")  # the last names of what weight decay pulls at: no norms, biases or adapters


@dataclass(frozen=True)
class Structure:
    """All of a module but its arrays; hashable, so that it can be a static argument."""

    paths: tuple[str, ...]
    tree: jax.tree_util.PyTreeDef

    def module(self, params: Mapping[str, jax.Array]):
        """The module of these arrays, one for each of `paths`."""
        if params.keys() != set(self.paths):
            missing, foreign = sorted(set(self.paths) - params.keys()), sorted(params.keys() - set(self.paths))
            raise KeyError(f"parameters of another module: missing are {missing[:3]}, not its own are {foreign[:3]}")
        return jax.tree.unflatten(self.tree, [params[path] for path in self.paths])


def split(
    module, trainable: str | Sequence[str] | None = None, frozen: str | Sequence[str] = (), *, dtype=jnp.float32
) -> tuple[Structure, Params, Params]:
    """The structure of a module, its trainable parameters as float32 and its frozen ones in the compute dtype.

    trainable: patterns; None: all parameters. frozen: patterns of what is not trained after all.
    The module may be abstract (jax.eval_shape). Arrays that have their dtype already are not copied.

    Raises OptionError for a pattern that matches no parameter, and if nothing is left to train.
    """
    found = leaves(module)
    paths = [leaf.path for leaf in found]
    chosen = set(paths) if trainable is None else select(trainable, paths, "trainable")
    chosen -= select(frozen, paths, "frozen")
    if not chosen:
        raise OptionError("frozen leaves nothing to train; leave some parameters out of its patterns.")
    values = {leaf.path: leaf.value for leaf in found}
    masters = cast({path: values[path] for path in paths if path in chosen}, jnp.float32)
    if whole := [path for path, value in masters.items() if not jnp.issubdtype(value.dtype, jnp.inexact)]:
        raise OptionError(f"{whole[0]} holds whole numbers, which cannot be trained; add it to frozen.")
    rest = cast({path: values[path] for path in paths if path not in chosen}, dtype)
    return Structure(tuple(paths), jax.tree.structure(module)), masters, rest


def cast(params: Mapping[str, jax.Array], dtype) -> Params:
    """The parameters in a floating dtype; whole numbers stay as they are."""

    def one(value):
        if value.dtype == dtype or not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        return value.update(dtype=dtype) if isinstance(value, jax.ShapeDtypeStruct) else value.astype(dtype)

    return {path: one(value) for path, value in params.items()}


def decay_mask(paths: Iterable[str], patterns: str | Sequence[str] | None = None) -> dict[str, bool]:
    """Whether weight decay pulls at each parameter: what the patterns match, by default kernels and embeddings."""
    paths = list(paths)
    if patterns is None:
        return {path: path.rsplit("/", 1)[-1] in DECAYED for path in paths}
    chosen = select(patterns, paths, "decay")
    return {path: path in chosen for path in paths}
