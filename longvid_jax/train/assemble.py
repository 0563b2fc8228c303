"""One ReWind checkpoint of three that exist: a vision tower, a BERT and a Llama; what is new comes from a seed."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx

from longvid_jax import convert
from longvid_jax.convert.folder import files_beside, write_json
from longvid_jax.convert.load import stored_dtype
from longvid_jax.convert.modules import abstract
from longvid_jax.convert.source import Source, open_source
from longvid_jax.data.tokenizer import INSTRUCTION, load_tokenizer
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models.paths import Leaf, leaves
from longvid_jax.models.rewind import Rewind

EVA = ("instructblip", "blip-2", "rewind", "world_towers")  # models whose vision tower is an EVA's
# Part of a ReWind -> (key of its config.json, its name in models that have it among other parts, models that are it).
PARTS = {
    "vision": ("vision_config", "vision", ()),
    "bert": ("bert_config", "bert", ("bert",)),
    "text": ("text_config", "text", ("llama", "qwen2")),
}
FLAGS = {"vision": "--vision", "bert": "--text", "text": "--llm"}
SIZES = (
    "width",
    "perceiver_layers",
    "heads",
    "ff_width",
    "num_queries",
    "num_write",
    "detail_tokens",
    "contrast_width",
)


def assemble(
    vision: str | Path,
    text: str | Path,
    llm: str | Path,
    target: str | Path,
    *,
    perceiver: str | Path | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes a Hugging Face folder that lv.load reads; gives its path.

    vision: an InstructBLIP or BLIP-2, for its EVA tower and its processor. text: a BERT. llm: a Llama or Vicuna, or a
    model that has one. perceiver: an InstructBLIP or BLIP-2 whose Q-Former the perceiver begins with (queries,
    cross-attention and their feed-forward, its n-th layer that looks for the n-th here; the rest is new). sizes: SIZES
    other than the paper's. progress: called with the bytes of each tensor written.

    Tensors are read, and written, one by one. Raises CheckpointError where a part is of another kind or does not fit,
    and OptionError for sizes that no network has.
    """
    sources = {name: open_source(path) for name, path in (("vision", vision), ("bert", text), ("text", llm))}
    config = _config(sources, dict(sizes or {}))
    tokenizer, words = (load_tokenizer(_tokenizers(sources[name], name)) for name in ("text", "bert"))
    _check_tokenizer(FLAGS["text"], llm, tokenizer, config["text_config"])
    _check_tokenizer(FLAGS["bert"], text, words, config["bert_config"])
    named = SimpleNamespace(config=config, name=str(target))
    settings = convert.network_config(named)
    module = abstract(config, settings)

    given = {name: _parts(name, source) for name, source in sources.items()}
    old = {path: part for parts in given.values() for path, part in parts.items()}
    wanted = {leaf.path: leaf for leaf in leaves(module)}
    fresh = _fresh(settings, seed, [path for path in wanted if path not in old])
    if perceiver is not None:
        fresh |= _of_qformer(open_source(perceiver), wanted)
    parts = {}
    for path, leaf in wanted.items():
        part = old.get(path) or fresh[path]
        if part.shape != leaf.part_shape:
            raise CheckpointError(
                f"{path} would have the shape {list(part.shape)}, but needs {list(leaf.part_shape)}; give what fits."
            )
        parts[path] = part
    with tempfile.TemporaryDirectory() as beside:
        files = _beside(sources, Path(beside), words)
        return convert.write_huggingface(
            parts, config, target, convert.table_for(config), beside=files, overwrite=overwrite, progress=progress
        )


def _config(sources: Mapping[str, Source], sizes: dict) -> dict:
    for name in sizes:
        if name not in SIZES:
            raise OptionError(f"there is no size {name!r}; known are {', '.join(SIZES)}.")
    config = {"model_type": "rewind", **sizes}
    for part, source in sources.items():
        key, name, whole = PARTS[part]
        kind = convert.architecture(source.config)
        if kind in whole:
            config[key] = {**source.config, "model_type": kind}
        elif key in source.config and (part != "vision" or kind in EVA):
            config[key] = dict(source.config[key])
        else:
            what = {"vision": "an InstructBLIP or BLIP-2", "bert": "a BERT", "text": "a Llama or Vicuna"}[part]
            raise CheckpointError(f"{FLAGS[part]} {source.name} is a {kind} model; give {what}.")
    config["bert_config"]["add_pooling_layer"] = False  # only the words' outputs are used
    for name in ("video_token_id", "image_token_index"):
        if name in sources["text"].config:
            config[name] = sources["text"].config[name]
    return config


def _parts(part: str, source: Source) -> dict[str, convert.Part]:
    """What the source has of a part, by its path in a ReWind."""
    _, name, whole = PARTS[part]
    within = "" if convert.architecture(source.config) in whole else f"{name}/"
    module = abstract(source.config, convert.network_config(source, name if within else None))
    module = getattr(module, name) if within else module
    found = {}
    for item in convert.plan(source, module, convert.table_for(source.config), within):
        path = f"{part}/{item.leaf.path.removeprefix(within)}"
        if not path.startswith("bert/pooler"):
            found[path] = _part(source, item.leaf, item.keys[0], item.op)
    return found


def _part(source: Source, leaf: Leaf, key: str, op) -> convert.Part:
    everything = tuple(slice(0, size) for size in leaf.part_shape)
    read = partial(op.read, partial(source.read, key), everything)
    return convert.Part(leaf.part_shape, np.dtype(stored_dtype(source, (key,))), read)


def _fresh(settings, seed: int, paths: list[str]) -> dict[str, convert.Part]:
    """New parameters at these paths; those of the parts that there are already are not made."""

    @jax.jit
    def start():
        made = {leaf.path: leaf.value for leaf in leaves(Rewind(settings, rngs=nnx.Rngs(seed)))}
        return {path: made[path] for path in paths}

    return {path: convert.Part(x.shape, np.dtype(x.dtype), partial(np.asarray, x)) for path, x in start().items()}


def _of_qformer(source: Source, wanted: Mapping[str, Leaf]) -> dict[str, convert.Part]:
    """What of a Q-Former the perceiver can begin with."""
    if convert.architecture(source.config) not in ("instructblip", "blip-2"):
        raise CheckpointError(f"--perceiver {source.name} has no Q-Former; give an InstructBLIP or BLIP-2.")
    module = abstract(source.config, convert.network_config(source, "qformer"))
    held = {leaf.path: leaf for leaf in leaves(module)}
    looking = sorted({path.split("/")[2] for path in held if "/cross/" in path})
    names = {"query_tokens": "perceiver/query_tokens"}
    for path in held:
        pieces = path.split("/")
        if pieces[:2] == ["qformer", "layers"] and pieces[2] in looking and pieces[3] in ("cross", "query_mlp"):
            below = "/".join([pieces[3].removeprefix("query_"), *pieces[4:]])
            names[path] = f"perceiver/layers/{looking.index(pieces[2]):02d}/{below}"
    table, tensors = convert.table_for(source.config), {}
    for key in source.tensors:
        path, op = table.target(key) or (None, None)
        if path in names and names[path] in wanted:
            tensors[names[path]] = _part(source, held[path], key, op)
    return tensors


def _tokenizers(source: Source, part: str) -> Path:
    """The folder with the tokenizer of a part."""
    below = source.path / INSTRUCTION
    return below if part == "bert" and below.is_dir() else source.path


def _check_tokenizer(flag: str, name, tokenizer, config: Mapping) -> None:
    if tokenizer is None:
        raise CheckpointError(f"{flag} {name} has no tokenizer; put tokenizer.json and tokenizer_config.json in it.")
    largest, size = max(tokenizer.get_vocab().values()), config.get("vocab_size")
    if size is not None and largest >= size:
        raise CheckpointError(
            f"{flag} {name}: its tokenizer has tokens up to {largest}, but its embedding {size} rows; give the one "
            "that belongs to it."
        )


def _beside(sources: Mapping[str, Source], folder: Path, words) -> list[Path]:
    """The Llama's tokenizer, the BERT's in a folder of its own, and the vision tower's processor."""
    for file in files_beside(sources["text"].path):
        if file.parent == sources["text"].path and "processor" not in file.name:
            shutil.copyfile(file, folder / file.name)
    words.save_pretrained(folder / INSTRUCTION)
    processor = sources["vision"].path / "preprocessor_config.json"
    if processor.is_file():
        shutil.copyfile(processor, folder / processor.name)
    else:
        side = sources["vision"].config["vision_config"].get("image_size", 224)
        write_json(folder / processor.name, {"size": {"height": side, "width": side}})
    return sorted(file for file in folder.rglob("*") if file.is_file())
