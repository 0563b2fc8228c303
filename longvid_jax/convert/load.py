"""From stored weights into a module, strictly and without the whole of them ever being in host memory."""

import ctypes
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from longvid_jax.convert.folder import Checkpoint
from longvid_jax.convert.ops import Op
from longvid_jax.convert.source import DTYPES, Source
from longvid_jax.convert.tables import Table
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models.paths import Leaf, leaves

SLAB_BYTES = 1 << 24
RESTORED_BYTES = 1 << 26  # of a checkpoint are read in one go

TYPES = ("float32", "bfloat16", "float16")  # that parameters may be cast to

Shardings = Callable[[str, tuple[int, ...]], Sharding]


@dataclass(frozen=True)
class Assignment:
    """A leaf and the tensors that fill it: one, or one a layer for a stack."""

    leaf: Leaf
    keys: tuple[str, ...]
    op: Op


def plan(source: Source, module, table: Table, within: str = "") -> list[Assignment]:
    """Which tensors fill which leaf of `module` (real or from jax.eval_shape), in the order of its leaves.

    Reads headers only. Every tensor is used once or ignored by name, every leaf is filled once, and shapes fit; else
    one CheckpointError names all faults. within: as for `fill`.
    """
    targets = leaves(module, within)
    wanted = {path: leaf for leaf in targets for path in leaf.part_paths}
    filled, faults = {}, []
    unknown = []
    for key, info in source.tensors.items():
        path, op = table.target(key) or (None, None)
        if path is None:
            if not table.is_ignored(key):
                unknown.append(key)
            continue
        if not path.startswith(within):
            continue
        if path not in wanted:
            if not _is_tied(table, key):
                faults.append(f"{key}: would be {path}, which the model of this config does not have")
        elif path in filled:
            faults.append(f"{key}: would fill {path} again, after {filled[path]}; keep one")
        else:
            filled[path] = key
            shape = wanted[path].part_shape
            if (expected := op.source_shape(shape)) != info.shape:
                faults.append(f"{key}: has the shape {list(info.shape)}, the config needs {list(expected or shape)}")
        if info.dtype not in DTYPES:
            faults.append(f"{key}: is stored as {info.dtype}; only {', '.join(DTYPES)} are read")
    missing = {path: _source_key(source, table, path) for path in wanted if path not in filled}
    faults += [_unknown(key, missing.values()) for key in unknown]
    faults += [f"{key}: missing; {path} needs it" for path, key in missing.items()]
    if faults:
        raise CheckpointError(_report(source.name, faults))
    return [
        Assignment(leaf, tuple(filled[path] for path in leaf.part_paths), table.source(leaf.part_paths[0])[1])
        for leaf in targets
    ]


def fill(source: Source, module, table: Table, *, dtype=None, shardings: Shardings | None = None, within: str = ""):
    """The module with its parameters read from `source`; `module` may be abstract (jax.eval_shape).

    dtype: of all parameters, cast on the host slice by slice; None keeps what is stored.
    shardings: from a leaf's path (`layers/mlp/gate/kernel` in a stack, `layers/03/mlp/gate/kernel` in a tuple) and its
        shape to its sharding; each device reads its own slice. None: all on the first local device.
    within: the module is only this part of the model, such as `vision/`; tensors of other parts are left alone.
    A stack is filled layer by layer on the device, so the host holds no more than one layer of one leaf.
    Raises CheckpointError as `plan` does.
    """
    assignments = plan(source, module, table, within)
    check_tied(source, table, assignments)
    tensors = {
        path: (key, item.op) for item in assignments for path, key in zip(item.leaf.part_paths, item.keys, strict=True)
    }
    dtypes = {item.leaf.path: dtype or stored_dtype(source, item.keys) for item in assignments}

    def read(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
        for path, spec in wanted.items():
            yield path, _tensor(source, *tensors[path], spec)

    return _assemble(module, [item.leaf for item in assignments], dtypes, shardings, read)


def restore(checkpoint: Checkpoint, module, *, dtype=None, shardings: Shardings | None = None, within: str = ""):
    """The module with its parameters read from a converted checkpoint; arguments as for `fill`, and as strict."""
    targets = leaves(module, within)
    shapes = {path: leaf.part_shape for leaf in targets for path in leaf.part_paths}
    stored = {path: array for path, array in checkpoint.arrays.items() if path.startswith(within)}
    unknown, missing = stored.keys() - shapes.keys(), shapes.keys() - stored.keys()
    faults = [
        f"{path}: has the shape {list(stored[path].shape)}, the config needs {list(shape)}"
        for path, shape in shapes.items()
        if path in stored and stored[path].shape != shape
    ]
    faults += [_unknown(path, missing) for path in sorted(unknown)]
    faults += [f"{path}: missing" for path in sorted(missing)]
    if faults:
        raise CheckpointError(_report(checkpoint.name, faults))
    dtypes = {
        leaf.path: dtype or jnp.result_type(*(stored[path].dtype for path in leaf.part_paths)) for leaf in targets
    }
    return _assemble(module, targets, dtypes, shardings, partial(_restored, checkpoint))


def _restored(checkpoint: Checkpoint, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    for group in grouped(wanted, RESTORED_BYTES):
        yield from checkpoint.read(group).items()
        give_back_memory()


def give_back_memory() -> None:
    """To the system, where the C library can: what it keeps of a part's memory for later would add up to several."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def grouped(specs: Mapping[str, jax.ShapeDtypeStruct], limit: int) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """The specs in runs of no more than `limit` bytes each, or of a single one that has more."""
    group, size = {}, 0
    for path, spec in specs.items():
        if group and size + nbytes(spec) > limit:
            yield group
            group, size = {}, 0
        group[path] = spec
        size += nbytes(spec)
    if group:
        yield group


def nbytes(spec) -> int:
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize


def _assemble(module, targets: list[Leaf], dtypes: Mapping[str, np.dtype], shardings: Shardings | None, read):
    """The module of the arrays that `read` yields, one by one, for what it is asked for by canonical path."""
    if shardings is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        shardings = lambda path, shape: here  # noqa: E731
    wanted, place, arrays = {}, {}, {}
    for leaf in targets:
        sharding = shardings(leaf.path, leaf.value.shape)
        if leaf.stacked:
            arrays[leaf.path] = jnp.zeros(leaf.value.shape, dtypes[leaf.path], device=sharding)
            sharding = _without_first_axis(sharding)
        for n, path in enumerate(leaf.part_paths):
            wanted[path] = jax.ShapeDtypeStruct(leaf.part_shape, dtypes[leaf.path], sharding=sharding)
            place[path] = leaf, n
    for path, array in read(wanted):
        leaf, n = place[path]
        if leaf.stacked:
            stack = arrays[leaf.path]
            array = _put(stack.sharding)(stack, array, n).block_until_ready()
        arrays[leaf.path] = array
    return jax.tree.unflatten(jax.tree.structure(module), [arrays[leaf.path] for leaf in targets])


@cache
def _put(sharding: Sharding) -> Callable:
    """Writes one layer into a stack, in place."""
    update = partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def _tensor(source: Source, key: str, op: Op, spec: jax.ShapeDtypeStruct) -> jax.Array:
    parts = {}  # devices that hold the same slice share one reading

    def part(index):
        bounds = tuple(s.indices(size) for s, size in zip(index, spec.shape, strict=True))
        if bounds not in parts:
            with np.errstate(over="ignore"):  # who casts to float16 looks for infinities afterwards
                parts[bounds] = op.read(partial(source.read, key), index).astype(spec.dtype, copy=False)
        return parts[bounds]

    # Waits, or tensors on their way to the devices would pile up in host memory.
    return jax.make_array_from_callback(spec.shape, spec.sharding, part, dtype=spec.dtype).block_until_ready()


def _without_first_axis(sharding: Sharding) -> Sharding:
    """A stack's sharding for one of its layers; a layer whose stack is split over layers goes to all devices first."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
    if isinstance(sharding, SingleDeviceSharding) or sharding.is_fully_replicated:
        return sharding
    raise TypeError(f"a stack of layers needs a NamedSharding or a single device, not {sharding}")


def checked_dtype(dtype) -> np.dtype | None:
    """The dtype that parameters are to have, None for what is stored; OptionError for one that they cannot have."""
    if dtype is None:
        return None
    try:
        if (found := np.dtype(dtype)).name in TYPES:
            return found
    except TypeError:
        pass
    raise OptionError(f"dtype is {dtype!r}, but must be one of {', '.join(TYPES)}, or None for what is stored.")


def check_finite(module, cause: str = "the checkpoint is damaged") -> None:
    """Raises CheckpointError that names the first parameters with NaN or infinity in them, if there are any."""
    bad = []
    for leaf in leaves(module):
        good = np.atleast_1d(_finite(leaf.value, axes=tuple(range(leaf.stacked, leaf.value.ndim))))
        bad += [path for path, fine in zip(leaf.part_paths, good, strict=True) if not fine]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        names = ", ".join(bad[:5]) + more
        raise CheckpointError(f"the weights have NaN or infinity in {names}; {cause}.")


@partial(jax.jit, static_argnames="axes")
def _finite(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.isfinite(x).all(axis=axes)


def stored_dtype(source: Source, keys: tuple[str, ...]):
    """The dtype that holds all of the tensors' values, as jax has it (no float64 unless that is enabled)."""
    stored = {source.tensors[key].dtype for key in keys}
    return jnp.result_type(*(jax.dtypes.canonicalize_dtype(DTYPES[name]) for name in stored))


def check_tied(source: Source, table: Table, assignments: list[Assignment]) -> None:
    """A tied model's own copy of the output layer must be the embedding, or a trained one would be lost silently."""
    used = {key for item in assignments for key in item.keys}
    copy = next((key for key in source.tensors if _is_tied(table, key) and key not in used), None)
    original = next((key for key in used if table.tied and table.spelling(key) == table.tied[1]), None)
    if copy is None or original is None:
        return
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


def _source_key(source: Source, table: Table, path: str) -> str:
    found = table.source(path)
    if found is None:
        raise ValueError(f"the table has no rule for the parameter {path}")  # ours to mend, not the user's
    return table.spelled_like(found[0], source.tensors)


def _is_tied(table: Table, key: str) -> bool:
    return table.tied is not None and table.spelling(key) == table.tied[0]


def _unknown(key: str, missing: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, missing, n=1, cutoff=0.8)
    return f"{key}: no parameter has this name" + (f"; did you mean {near[0]}?" if near else "")


def _report(name: str, faults: list[str]) -> str:
    lines = "".join(f"\n  {fault}" for fault in faults)
    return f"{name} does not fit its config.json, {len(faults)} fault(s):{lines}"
