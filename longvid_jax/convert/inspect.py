"""What is in a checkpoint, from its headers alone: a tree with shapes, dtypes, bytes and what each tensor becomes."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.filesize import decimal
from rich.markup import escape
from rich.tree import Tree

from longvid_jax.convert.folder import PARAMS, Checkpoint
from longvid_jax.convert.load import nbytes
from longvid_jax.convert.modules import open_weights
from longvid_jax.convert.source import Source
from longvid_jax.convert.tables import Table, architecture, table_for
from longvid_jax.errors import CheckpointError

IGNORED = "ignored"


def describe(path_or_id: str | Path, revision: str | None = None) -> dict:
    """A checkpoint as plain data, ready for JSON; no tensor is read.

    It has name, path, model_type and architectures; kind, "huggingface" or "longvid_jax" (a converted one); supported,
    what it is to this library ("llama", ...) or None; parameters and bytes; dtypes, the parameters of each; files, the
    bytes of tensors in each; and tensors, each with key, file, shape, dtype and bytes. In a Hugging Face folder each
    becomes a parameter's path, "ignored", or None where no rule knows the key, and has stored_as, its keys in the files
    where they differ (see convert.lavis). In a converted one each key is a path
    and comes_from a Hugging Face key, and there is provenance: source, revision, files, table, dtype, versions.
    Raises CheckpointError as open_weights does.
    """
    weights = open_weights(path_or_id, revision)
    try:
        supported, table = architecture(weights.config), table_for(weights.config)
    except CheckpointError:  # a model of another kind can be looked at all the same
        supported, table = None, None
    converted = isinstance(weights, Checkpoint)
    tensors = _arrays(weights, table) if converted else _tensors(weights, table)
    dtypes, files = {}, {}
    for tensor in tensors:
        dtypes[tensor["dtype"]] = dtypes.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
        files[tensor["file"]] = files.get(tensor["file"], 0) + tensor["bytes"]
    description = {
        "name": weights.name,
        "path": str(weights.path),
        "kind": "longvid_jax" if converted else "huggingface",
        "model_type": weights.config.get("model_type"),
        "architectures": weights.config.get("architectures") or [],
        "supported": supported,
        "parameters": sum(dtypes.values()),
        "bytes": sum(files.values()),
        "dtypes": dtypes,
        "files": files,
        "tensors": tensors,
    }
    if converted:
        description["provenance"] = {k: v for k, v in weights.provenance.items() if k != "parameters_crc32"}
    return description


def _tensors(source: Source, table: Table | None) -> list[dict]:
    def becomes(key: str) -> str | None:
        if table is None:
            return None
        if table.tied and _ties(source.config) and table.spelling(key) == table.tied[0]:
            return table.target(table.tied[1])[0]
        return IGNORED if table.is_ignored(key) else (table.target(key) or (None,))[0]

    return [
        {
            "key": key,
            "file": info.file.name,
            "shape": list(info.shape),
            "dtype": info.dtype,
            "bytes": info.nbytes,
            "becomes": becomes(key),
            **({"stored_as": list(stored)} if (stored := source.stored[key]) != (key,) else {}),
        }
        for key, info in source.tensors.items()
    ]


def _ties(config: dict) -> bool:
    """Whether the output layer is the embedding: it is the language model's config that says so, where it is apart."""
    return {**config, **(config.get("text_config") or {})}.get("tie_word_embeddings", False)


def _arrays(checkpoint: Checkpoint, table: Table | None) -> list[dict]:
    return [
        {
            "key": path,
            "file": PARAMS,
            "shape": list(array.shape),
            "dtype": np.dtype(array.dtype).name,
            "bytes": nbytes(array),
            "comes_from": (table.source(path) or (None,))[0] if table else None,
        }
        for path, array in checkpoint.arrays.items()
    ]


def render(description: dict) -> Tree:
    """What `describe` gives as a tree for a rich console; layers that are alike are one branch."""
    what = ", ".join(description["architectures"]) or description["model_type"] or "no architecture named"
    if description["supported"] is None:
        what += " (not supported: nothing can be loaded)"
    converted, dtypes = description["kind"] == "longvid_jax", ", ".join(description["dtypes"])
    where = f"{len(description['files'])} file(s)" if not converted else PARAMS
    tree = Tree(
        f"[bold]{escape(description['name'])}[/]  {escape(what)}\n"
        f"{description['parameters']:,} parameters, {decimal(description['bytes'])}, {dtypes}, "
        f"{len(description['tensors'])} tensors in {where}"
    )
    if converted:
        branch = tree.add("[bold cyan]provenance[/]")
        for name, value in description["provenance"].items():
            branch.add(f"{escape(name)}  {escape(json.dumps(value))}")
    separator, nested = "/" if converted else ".", {}
    for tensor in description["tensors"]:
        *branches, last = tensor["key"].split(separator)
        node = nested
        for branch in branches:
            node = node.setdefault(f"{branch}{separator}", {})
        node[last] = tensor
    _grow(tree, nested, description["supported"] is not None)
    return tree


# A node maps labels to children: "layers." to another node, "weight" to a tensor as `describe` has it.


def _grow(tree: Tree, node: dict, supported: bool) -> None:
    for run in _alike(node):
        child = node[run[0]]
        name = escape(run[0].rstrip("./"))
        if _is_branch(run[0]):
            many = f"..{run[-1].rstrip('./')} (x{len(run)})" if len(run) > 1 else ""
            size = decimal(sum(_bytes(label, node[label]) for label in run))
            _grow(tree.add(f"[bold cyan]{name}{many}[/]  [dim]{size}[/]"), child, supported)
        else:
            line = f"{name}  {child['shape']} {child['dtype']} [dim]{decimal(child['bytes'])}[/]"
            if supported:
                arrow, other = ("->", child["becomes"]) if "becomes" in child else ("<-", child["comes_from"])
                line += f"  {arrow} " + (f"[green]{escape(other)}[/]" if other else "[red]unknown to this model[/]")
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
    if _is_branch(label):
        return tuple((name, _signature(name, child[name])) for name in sorted(child, key=_natural))
    other = child.get("becomes") or child.get("comes_from") or "-"
    return tuple(child["shape"]), child["dtype"], re.sub(r"\d+", "", other)


def _bytes(label: str, child: dict) -> int:
    return sum(_bytes(name, child[name]) for name in child) if _is_branch(label) else child["bytes"]


def _is_branch(label: str) -> bool:
    return label.endswith((".", "/"))


def _natural(label: str) -> tuple:
    return (0, int(label[:-1]), "") if label[:-1].isdigit() else (1, 0, label)
