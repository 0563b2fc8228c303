"""What is in a checkpoint, from its headers alone: a tree with shapes, dtypes, bytes and what each tensor becomes."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from rich.filesize import decimal
from rich.markup import escape
from rich.tree import Tree

from longvid_jax.convert.source import open_source
from longvid_jax.convert.tables import architecture, table_for
from longvid_jax.errors import CheckpointError

IGNORED = "ignored"


def describe(path_or_id: str | Path, revision: str | None = None) -> dict:
    """A checkpoint as plain data, ready for JSON; no tensor is read.

    It has name, path, model_type and architectures; supported, what it is to this library ("llama", ...) or None;
    parameters and bytes; dtypes, the parameters of each; files, the bytes of tensors in each; and tensors, each with
    key, file, shape, dtype, bytes and becomes (the parameter's path, "ignored", or None where no rule knows the key).
    Raises CheckpointError as open_source does.
    """
    source = open_source(path_or_id, revision)
    try:
        supported, table = architecture(source.config), table_for(source.config)
    except CheckpointError:  # a model of another kind can be looked at all the same
        supported, table = None, None
    tensors, dtypes, files = [], {}, {}
    for key, info in source.tensors.items():
        becomes = None
        if table is not None:
            becomes = IGNORED if table.is_ignored(key) else (table.target(key) or (None,))[0]
        tensors.append(
            {
                "key": key,
                "file": info.file.name,
                "shape": list(info.shape),
                "dtype": info.dtype,
                "bytes": info.nbytes,
                "becomes": becomes,
            }
        )
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + math.prod(info.shape)
        files[info.file.name] = files.get(info.file.name, 0) + info.nbytes
    return {
        "name": source.name,
        "path": str(source.path),
        "model_type": source.config.get("model_type"),
        "architectures": source.config.get("architectures") or [],
        "supported": supported,
        "parameters": sum(dtypes.values()),
        "bytes": sum(files.values()),
        "dtypes": dtypes,
        "files": files,
        "tensors": tensors,
    }


def render(description: dict) -> Tree:
    """What `describe` gives as a tree for a rich console; layers that are alike are one branch."""
    what = ", ".join(description["architectures"]) or description["model_type"] or "no architecture named"
    if description["supported"] is None:
        what += " (not supported: nothing can be loaded)"
    dtypes = ", ".join(description["dtypes"])
    tree = Tree(
        f"[bold]{escape(description['name'])}[/]  {escape(what)}\n"
        f"{description['parameters']:,} parameters, {decimal(description['bytes'])}, {dtypes}, "
        f"{len(description['tensors'])} tensors in {len(description['files'])} file(s)"
    )
    nested = {}
    for tensor in description["tensors"]:
        *branches, last = tensor["key"].split(".")
        node = nested
        for branch in branches:
            node = node.setdefault(f"{branch}.", {})
        node[last] = tensor
    _grow(tree, nested, description["supported"] is not None)
    return tree


# A node maps labels to children: "layers." to another node, "weight" to a tensor as `describe` has it.


def _grow(tree: Tree, node: dict, supported: bool) -> None:
    for run in _alike(node):
        child = node[run[0]]
        name = escape(run[0].rstrip("."))
        if run[0].endswith("."):
            many = f"..{run[-1].rstrip('.')} (x{len(run)})" if len(run) > 1 else ""
            size = decimal(sum(_bytes(label, node[label]) for label in run))
            _grow(tree.add(f"[bold cyan]{name}{many}[/]  [dim]{size}[/]"), child, supported)
        else:
            line = f"{name}  {child['shape']} {child['dtype']} [dim]{decimal(child['bytes'])}[/]"
            if supported:
                line += (
                    f"  -> [green]{child['becomes']}[/]" if child["becomes"] else "  -> [red]unknown to this model[/]"
                )
            tree.add(line)


def _alike(node: dict) -> Iterable[list[str]]:
    """The labels in order, with numbered neighbours that differ in nothing but their number in one list."""
    run: list[str] = []
    for label in sorted(node, key=_natural):
        if run and label[:-1].isdigit() and _signature(label, node[label]) == _signature(run[-1], node[run[-1]]):
            run.append(label)
        else:
            yield from [run] if run else []
            run = [label]
    yield from [run] if run else []


def _signature(label: str, child: dict) -> tuple:
    """What is the same in layers that are alike."""
    if label.endswith("."):
        return tuple((name, _signature(name, child[name])) for name in sorted(child, key=_natural))
    return tuple(child["shape"]), child["dtype"], re.sub(r"\d+", "", child["becomes"] or "-")


def _bytes(label: str, child: dict) -> int:
    return sum(_bytes(name, child[name]) for name in child) if label.endswith(".") else child["bytes"]


def _natural(label: str) -> tuple:
    return (0, int(label[:-1]), "") if label[:-1].isdigit() else (1, 0, label)
