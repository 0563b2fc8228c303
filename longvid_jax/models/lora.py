"""Low-rank adapters (LoRA, arXiv 2106.09685) on any linear map: y = x W + b + (x A) B alpha / rank.

All functions give a new module and leave theirs as it is; they take real modules and abstract ones (jax.eval_shape),
with layers in tuples or stacks, inside and outside jit. Adapters alone are a flat dict by canonical path,
`text/layers/03/attention/q/lora_a`, which longvid_jax.checkpoint saves and which fits either layout.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models.layers import Linear, adapted_kernel
from longvid_jax.models.paths import is_stacked, part_paths, path_of, select

A, B = "lora_a", "lora_b"


def add(module, patterns: str | Sequence[str], rank: int, alpha: float, *, key: jax.Array):
    """The module with adapters on the linear maps that the patterns choose; what it computes is the same at first.

    patterns: regular expressions for whole paths of linear maps without layer numbers, `text/layers/attention/(q|v)`.
    key: for A, uniform within 1 / sqrt(in) as in the reference implementation; B is zero. Both have the kernel's dtype.
        The values hang on the key and the path only: neither on other patterns nor on the layout.

    Raises OptionError for a pattern that matches no linear map, a map that has adapters, a rank or alpha below or at 0.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise OptionError(f"LoRA's rank is {rank!r}, but must be a whole number of at least 1.")
    linears = _linears(module)
    chosen = select(patterns, linears, "LoRA's patterns")
    if twice := sorted(path for path in chosen if linears[path].lora_a is not None):
        raise OptionError(f"{twice[0]} already has adapters; merge them first or leave it out of the patterns.")
    changed = {}
    for path in chosen:
        kernel = linears[path].kernel.get_value()
        *layers, width_in, width_out = kernel.shape
        keys = jnp.stack([jax.random.fold_in(key, zlib.crc32(part.encode())) for part in _parts(path, kernel)])

        def init(keys, shape=(width_in, rank), dtype=kernel.dtype, stacked=bool(layers)):
            values = jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32, -1, 1))(keys) * shape[0] ** -0.5
            return (values if stacked else values[0]).astype(dtype)

        a = _run(init, keys, like=kernel)
        b = _run(lambda shape=(*layers, rank, width_out), dtype=kernel.dtype: jnp.zeros(shape, dtype), like=kernel)
        changed[path] = _with(linears[path], a, b, _scale(alpha, rank))
    return _replace(module, changed)


def merge(module):
    """The module without adapters, what they add being part of its kernels.

    Added in float32 and rounded to the kernel's dtype: in bfloat16 small adapters are partly lost to that rounding.
    """
    changed = {}
    for path, linear in _adapted(module).items():
        kernel = _run(adapted_kernel, *_arrays(linear), linear.lora_scale)
        changed[path] = _with(linear, None, None, None, kernel=kernel)
    return _replace(module, changed)


def unmerge(module, adapters: Mapping[str, jax.Array], alpha: float):
    """A merged module with its adapters apart again: the inverse of merge, for float32 kernels up to rounding.

    Kernels of fewer bits come back only about as near as their own precision.
    """
    module = with_adapters(module, adapters, alpha)
    changed = {}
    for path, linear in _adapted(module).items():
        kernel, a, b = _arrays(linear)
        changed[path] = _with(
            linear, a, b, linear.lora_scale, kernel=_run(adapted_kernel, kernel, a, b, -linear.lora_scale)
        )
    return _replace(module, changed)


def adapters(module) -> dict[str, jax.Array]:
    """All adapters of the module by canonical path; the scale is not among them, so keep alpha with them."""
    found = {}
    for path, linear in _adapted(module).items():
        kernel, *pair = _arrays(linear)
        for name, value in zip((A, B), pair, strict=True):
            for n, part in enumerate(_parts(path, kernel)):
                found[f"{part}/{name}"] = _run(lambda x, n=n: x[n], value) if is_stacked(path) else value
    return found


def with_adapters(module, adapters: Mapping[str, jax.Array], alpha: float | None = None):
    """The module with these adapters, of `adapters`, in their dtype.

    alpha: for a module without adapters, which then has those at the paths given. None: for a module that has adapters
        at all of these paths and no others, whose values are replaced and whose scales stay.

    Raises CheckpointError if they do not fit.
    """
    linears, rest, changed = _linears(module), dict(adapters), {}
    for path, linear in linears.items():
        kernel = linear.kernel.get_value()
        parts = _parts(path, kernel)
        if not any(f"{part}/{name}" in rest for part in parts for name in (A, B)):
            if linear.lora_a is not None:
                raise CheckpointError(f"{path} has adapters, but none are given for it; give all or merge it first.")
            continue
        if (linear.lora_a is None) == (alpha is None):
            state = "none: give alpha as well" if alpha is None else "some already: leave alpha out, or merge first"
            raise CheckpointError(f"adapters are given for {path}, which has {state}.")
        pair = []
        for name in (A, B):
            if missing := [part for part in parts if f"{part}/{name}" not in rest]:
                raise CheckpointError(f"{missing[0]}/{name} is missing among the adapters; give those of all layers.")
            values = [rest.pop(f"{part}/{name}") for part in parts]
            pair.append(_run(lambda *xs: jnp.stack(xs), *values) if is_stacked(path) else values[0])
        _check_shapes(path, kernel, *pair)
        rank = pair[0].shape[-1]
        changed[path] = _with(linear, *pair, linear.lora_scale if alpha is None else _scale(alpha, rank))
    if rest:
        raise CheckpointError(f"{sorted(rest)[0]} is no adapter of a linear map of this module; leave it out.")
    return _replace(module, changed)


def _linears(module) -> dict[str, Linear]:
    nodes, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda node: isinstance(node, Linear))
    return {path_of(keys): node for keys, node in nodes if isinstance(node, Linear)}


def _adapted(module) -> dict[str, Linear]:
    return {path: linear for path, linear in _linears(module).items() if linear.lora_a is not None}


def _replace(module, changed: Mapping[str, Linear]):
    nodes, structure = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda node: isinstance(node, Linear))
    return jax.tree.unflatten(structure, [changed.get(path_of(keys), node) for keys, node in nodes])


def _with(linear: Linear, a, b, scale: float | None, *, kernel=None) -> Linear:
    linear = jax.tree.map(lambda x: x, linear)  # another one
    linear.lora_a, linear.lora_b = (None, None) if a is None else (nnx.Param(a), nnx.Param(b))
    linear.lora_scale = scale
    if kernel is not None:
        linear.kernel = nnx.Param(kernel)
    return linear


def _arrays(linear: Linear):
    return linear.kernel.get_value(), linear.lora_a.get_value(), linear.lora_b.get_value()


def _parts(path: str, kernel) -> list[str]:
    return part_paths(path, kernel.shape[0]) if is_stacked(path) else [path]


def _scale(alpha: float, rank: int) -> float:
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise OptionError(f"LoRA's alpha is {alpha!r}, but must be a number above 0.")
    return alpha / rank


def _check_shapes(path: str, kernel, a, b) -> None:
    *layers, width_in, width_out = kernel.shape
    rank = a.shape[-1]
    expected = (*layers, width_in, rank), (*layers, rank, width_out)
    if (tuple(a.shape), tuple(b.shape)) != expected:
        raise CheckpointError(
            f"the adapters of {path} have the shapes {list(a.shape)} and {list(b.shape)}, but its kernel "
            f"{list(kernel.shape)} needs {list(expected[0])} and {list(expected[1])}; they are of another model."
        )


def _run(function, *arrays, like=None):
    """function(*arrays), or what it would give where one of the arrays (or `like`) is abstract."""
    abstract = any(isinstance(array, jax.ShapeDtypeStruct) for array in (*arrays, like))
    return jax.eval_shape(function, *arrays) if abstract else function(*arrays)
