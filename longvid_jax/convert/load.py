"""From a Hugging Face checkpoint into a module, strictly and without the whole of it ever being in host memory."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from longvid_jax.convert.ops import Op
from longvid_jax.convert.paths import Leaf, leaves
from longvid_jax.convert.source import DTYPES, Source
from longvid_jax.convert.tables import Table
from longvid_jax.errors import CheckpointError

SLAB_BYTES = 1 << 24


@dataclass(frozen=True)
class Assignment:
    """A leaf and the tensors that fill it: one, or one a layer for a stack."""

    leaf: Leaf
    keys: tuple[str, ...]
    op: Op


def plan(source: Source, module, table: Table) -> list[Assignment]:
    """Which tensors fill which leaf of `module` (real or from jax.eval_shape), in the order of its leaves.

    Reads headers only. Every tensor is used once or ignored by name, every leaf is filled once, and shapes fit; else
    one CheckpointError names all faults.
    """
    targets = leaves(module)
    wanted = {path: leaf for leaf in targets for path in leaf.part_paths}
    filled, faults = {}, []
    unknown = []
    for key, info in source.tensors.items():
        path, op = table.target(key) or (None, None)
        if path is None:
            if not table.is_ignored(key):
                unknown.append(key)
        elif path not in wanted:
            if not _is_tied(table, key):
                faults.append(f"{key}: would be {path}, which the model of this config does not have")
        elif path in filled:
            faults.append(f"{key}: would fill {path} again, after {filled[path]}; keep one")
        else:
            filled[path] = key
            shape = wanted[path].part_shape
            if (expected := op.source_shape(shape)) != info.shape:
                faults.append(f"{key}: has the shape {list(info.shape)}, the config needs {list(expected or shape)}")
        if path is not None and info.dtype not in DTYPES:
            faults.append(f"{key}: is stored as {info.dtype}; only {', '.join(DTYPES)} are read")
    missing = {path: _source_key(source, table, path) for path in wanted if path not in filled}
    for key in unknown:
        near = difflib.get_close_matches(key, missing.values(), n=1, cutoff=0.8)
        faults.append(f"{key}: no parameter has this name" + (f"; did you mean {near[0]}?" if near else ""))
    faults += [f"{key}: missing; {path} needs it" for path, key in missing.items()]
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise CheckpointError(f"{source.name} does not fit its config.json, {len(faults)} fault(s):{lines}")
    return [
        Assignment(leaf, tuple(filled[path] for path in leaf.part_paths), table.source(leaf.part_paths[0])[1])
        for leaf in targets
    ]


def fill(
    source: Source,
    module,
    table: Table,
    *,
    dtype=None,
    shardings: Callable[[str, tuple[int, ...]], Sharding] | None = None,
):
    """The module with its parameters read from `source`; `module` may be abstract (jax.eval_shape).

    dtype: of all parameters, cast on the host slice by slice; None keeps what is stored.
    shardings: from a leaf's path (`layers/mlp/gate/kernel` in a stack, `layers/03/mlp/gate/kernel` in a tuple) and its
        shape to its sharding; each device reads its own slice. None: all on the first local device.
    A stack is filled layer by layer on the device, so the host holds no more than one layer of one leaf.
    Raises CheckpointError as `plan` does.
    """
    assignments = plan(source, module, table)
    _check_tied(source, table, assignments)
    if shardings is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        shardings = lambda path, shape: here  # noqa: E731
    arrays = [_array(source, item, dtype, shardings(item.leaf.path, item.leaf.value.shape)) for item in assignments]
    return jax.tree.unflatten(jax.tree.structure(module), arrays)


def check_finite(module) -> None:
    """Raises CheckpointError that names the first parameters with NaN or infinity in them, if there are any."""
    bad = []
    for leaf in leaves(module):
        good = np.atleast_1d(_finite(leaf.value, axes=tuple(range(leaf.stacked, leaf.value.ndim))))
        bad += [path for path, fine in zip(leaf.part_paths, good, strict=True) if not fine]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        names = ", ".join(bad[:5]) + more
        raise CheckpointError(f"the weights have NaN or infinity in {names}; the checkpoint is damaged.")


@partial(jax.jit, static_argnames="axes")
def _finite(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.isfinite(x).all(axis=axes)


def _array(source: Source, item: Assignment, dtype, sharding: Sharding) -> jax.Array:
    shape = item.leaf.value.shape
    dtype = _stored_dtype(source, item.keys) if dtype is None else dtype
    if not item.leaf.stacked:
        return _tensor(source, item.keys[0], item.op, shape, dtype, sharding)
    layer_sharding, put = _without_first_axis(sharding), _put(sharding)
    stack = jnp.zeros(shape, dtype, device=sharding)
    for n, key in enumerate(item.keys):
        stack = put(stack, _tensor(source, key, item.op, shape[1:], dtype, layer_sharding), n).block_until_ready()
    return stack


@cache
def _put(sharding: Sharding) -> Callable:
    """Writes one layer into a stack, in place."""
    update = partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def _tensor(source: Source, key: str, op: Op, shape, dtype, sharding: Sharding) -> jax.Array:
    parts = {}  # devices that hold the same slice share one reading

    def part(index):
        bounds = tuple(s.indices(size) for s, size in zip(index, shape, strict=True))
        if bounds not in parts:
            parts[bounds] = op.read(partial(source.read, key), index).astype(dtype, copy=False)
        return parts[bounds]

    # Waits, or tensors on their way to the devices would pile up in host memory.
    return jax.make_array_from_callback(tuple(shape), sharding, part, dtype=dtype).block_until_ready()


def _without_first_axis(sharding: Sharding) -> Sharding:
    """A stack's sharding for one of its layers; a layer whose stack is split over layers goes to all devices first."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
    if isinstance(sharding, SingleDeviceSharding) or sharding.is_fully_replicated:
        return sharding
    raise TypeError(f"a stack of layers needs a NamedSharding or a single device, not {sharding}")


def _stored_dtype(source: Source, keys: tuple[str, ...]):
    stored = {source.tensors[key].dtype for key in keys}
    return jnp.result_type(*(jax.dtypes.canonicalize_dtype(DTYPES[name]) for name in stored))


def _source_key(source: Source, table: Table, path: str) -> str:
    found = table.source(path)
    if found is None:
        raise ValueError(f"the table has no rule for the parameter {path}")  # ours to mend, not the user's
    return table.spelled_like(found[0], source.tensors)


def _is_tied(table: Table, key: str) -> bool:
    return table.tied is not None and table.spelling(key) == table.tied[0]


def _check_tied(source: Source, table: Table, assignments: list[Assignment]) -> None:
    """A tied model's own copy of the output layer must be the embedding, or a trained one would be lost silently."""
    used = {key for item in assignments for key in item.keys}
    copy = next((key for key in source.tensors if _is_tied(table, key) and key not in used), None)
    if copy is None:
        return
    original = next(key for key in used if table.spelling(key) == table.tied[1])
    rows, same = source.tensors[copy].shape[0], source.tensors[copy].shape == source.tensors[original].shape
    step = max(1, rows * SLAB_BYTES // max(1, source.tensors[copy].nbytes))
    if not same or any(
        not np.array_equal(source.read(copy, (at,)), source.read(original, (at,)), equal_nan=True)
        for at in (slice(n, n + step) for n in range(0, rows, step))
    ):
        raise CheckpointError(
            f"{source.name}: {copy} differs from {original} although the config ties them; "
            "set tie_word_embeddings to false in config.json to use it."
        )
