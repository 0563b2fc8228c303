"""For tests of conversions that are stopped and go on: one that makes some parts, and what became of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from longvid_jax import checkpoint as trees
from longvid_jax import convert
from longvid_jax.convert import write
from longvid_jax.convert.modules import abstract
from longvid_jax.convert.target import sibling
from longvid_jax.models.llama import DecoderConfig
from longvid_jax.models.paths import leaves

PART_BYTES, PARTS = 1 << 20, 14  # how many that makes
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def write_source(folder: Path) -> Path:
    """A random Llama of some MB."""
    rng = np.random.default_rng(0)
    shapes = {leaf.path: leaf.value.shape for leaf in leaves(abstract(CONFIG, DecoderConfig.from_huggingface(CONFIG)))}
    parts = {
        path: convert.Part(shape, np.dtype(np.float32), lambda shape=shape: rng.normal(size=shape).astype(np.float32))
        for path, shape in shapes.items()
    }
    return convert.write_huggingface(parts, CONFIG, folder, convert.table_for(CONFIG))


def to_orbax(source: Path, target: Path, **how) -> Path:
    """In small parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "PART_BYTES", PART_BYTES)
        return convert.to_orbax(source, target, **how)


def interrupt(source: Path, target: Path, parts: int) -> list[dict]:
    """A conversion that is stopped after so many parts; what its journal lists."""
    left = iter(range(parts + 1))  # what was there before is reported, too

    def stop(size: int) -> None:
        if next(left) == parts:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_orbax(source, target, progress=stop)
    assert not target.exists() and len(listed(target)) == parts
    return listed(target)


def resume(source: Path, target: Path, kept: list[dict], **how) -> set[str]:
    """The same again, to the end: the arrays that it wrote, all but those of `kept`, which must be used as they lie."""
    folder, written, merged = parts_folder(target), [], {}
    before = {entry["part"]: identity(folder / entry["part"]) for entry in kept}
    assert all(before.values())
    add_part, merge = trees.add_part, trees.merge

    def spy_on_add_part(where, arrays):
        written.extend(arrays)
        return add_part(where, arrays)

    def spy_on_merge(where, names, final):
        if final.parent.name == "whole":
            merged.update({name: identity(folder / name) for name in names})
        merge(where, names, final)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "add_part", spy_on_add_part)
        patch.setattr(trees, "merge", spy_on_merge)
        to_orbax(source, target, **how)
    assert before == {name: merged[name] for name in before}
    arrays = {path for entry in kept for path in entry["checksums"]}
    assert len(written) == len(set(written)) and arrays.isdisjoint(written)
    assert arrays | set(written) == convert.Checkpoint(target).arrays.keys()
    assert not [path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")]
    return set(written)


def listed(target: Path) -> list[dict]:
    """What the journal of a target lists, without a line that was being written."""
    file = sibling(target, "converting") / "journal.jsonl"
    lines = file.read_text().split("\n")[1:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def parts_folder(target: Path) -> Path:
    return trees.parts_folder(sibling(target, "converting") / "params")


def identity(folder: Path) -> dict[Path, tuple[int, int]]:
    """Which files there are, and that they are still the same ones."""
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def data_file(part: Path) -> Path:
    """The largest: it has the numbers."""
    return max(part.rglob("d/*"), key=lambda file: file.stat().st_size)


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_same(target: Path, whole: Path) -> None:
    ours, theirs = convert.Checkpoint(target), convert.Checkpoint(whole)
    assert ours.provenance == theirs.provenance
    assert {file.name for file in target.iterdir()} == {file.name for file in whole.iterdir()}
    ours, theirs = ours.read(ours.arrays), theirs.read(theirs.arrays)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert ours[path].dtype == array.dtype and ours[path].tobytes() == array.tobytes(), path
