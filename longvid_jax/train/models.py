"""The network that is trained, from random weights or from a checkpoint, and all that belongs to it besides."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longvid_jax import convert
from longvid_jax.convert.folder import files_beside
from longvid_jax.convert.modules import NETWORKS
from longvid_jax.convert.settings import CLIP_MEAN, CLIP_STD, Settings
from longvid_jax.convert.source import open_config
from longvid_jax.data.chat import QUERIES_FIRST_TEMPLATE
from longvid_jax.data.tokenizer import INSTRUCTION, bert_tokenizer, load_tokenizer, world_tokenizer
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models import lora
from longvid_jax.models.eva_vit import EvaConfig
from longvid_jax.models.instructblip import InstructBlipConfig
from longvid_jax.models.layers import Embed
from longvid_jax.models.llama import DecoderConfig
from longvid_jax.models.paths import leaves
from longvid_jax.models.qwen2_vl import VisionConfig
from longvid_jax.models.rewind import RewindConfig
from longvid_jax.models.sharding import parameter_sharding
from longvid_jax.train.config import plain
from longvid_jax.train.initial import scaled
from longvid_jax.train.parts import checked, take

ADAPTERS = ".*/lora_[ab]"
INSTRUCTED = (
    "instructblip",
    "world_towers",
    "rewind",
)  # model types that read the question with a BERT's tokenizer, too
# Keys of a config.json that hang on the tokenizer: the token each is the number of.
TOKENS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """What is known of the model that is trained, apart from its parameters."""

    config: dict  # the content of its config.json
    text: DecoderConfig
    vision: VisionConfig | EvaConfig | None  # None: a decoder alone
    tokenizer: Any
    files: tuple[Path, ...]  # of the checkpoint it comes from, to be copied beside its weights
    video_token: int | None = None
    mean: tuple[float, ...] = CLIP_MEAN  # of pixels from 0 to 1
    std: tuple[float, ...] = CLIP_STD
    words: Any = None  # the tokenizer of a BERT or a Q-Former, where there is one
    settings: Any = None  # what convert.network_config made of the config.json
    adacm2: Any = None  # how AdaCM2 watches: config.adacm2
    rewind: Any = None  # how ReWind watches and looks back: config.rewind
    facts: Any = None  # the map of config.towers from facts to vectors, where a stage learns to tell them


def build(config, mesh=None) -> tuple[Model, Any]:
    """The model of a resolved config and its module, low-rank adapters in it if the config asks for them.

    Raises CheckpointError if it cannot be loaded, OptionError if the tokenizer and it do not fit.
    """
    model, module = _load(config, mesh) if config.checkpoint else _make(config, mesh)
    _check_tokenizer(model)
    if isinstance(model.settings, InstructBlipConfig):
        model, module = _with_frames(config, model, module, mesh)
    if config.towers and any(stage.task == "telling" for stage in config.stages):
        model = dataclasses.replace(model, facts=convert.from_huggingface(config.towers, part="facts"))
    if isinstance(model.settings, RewindConfig):
        model = dataclasses.replace(model, rewind=plain(config.rewind))
    if config.lora.rank:
        key = jax.random.key(config.seed)
        module = lora.add(module, tuple(config.lora.patterns), config.lora.rank, config.lora.alpha, key=key)
    return model, module


def _with_frames(config, model: Model, module, mesh) -> tuple[Model, Any]:
    """An InstructBLIP with frame positions, if the config wants some and it has none, and told how it watches."""
    count, how = config.frame_positions.count, plain(config.adacm2)
    values = {**model.config, "carry_queries": how["carry_queries"]}
    if count and not model.settings.num_frames:
        width, dtype = model.settings.vision.width, module.query_tokens.dtype
        table = waves(count, width) if config.frame_positions.initial == "waves" else np.zeros((count, width))
        module.frames = Embed(count, width, dtype=dtype, rngs=nnx.Rngs(0))
        where = None if mesh is None else parameter_sharding(mesh, "frames/embedding", (count, width))
        module.frames.embedding.set_value(jax.device_put(jnp.asarray(table, dtype), where))
        values["num_frame_positions"] = count
    settings = dataclasses.replace(
        model.settings, num_frames=values.get("num_frame_positions", 0), carry_queries=how["carry_queries"]
    )
    module.config = settings
    return dataclasses.replace(model, config=values, settings=settings, adacm2=how), module


def waves(count: int, width: int) -> np.ndarray:
    """float32 [count, width]: sines and cosines of frame numbers, with periods from 4 frames on."""
    periods = 4.0 * 4096 ** (np.arange(width // 2) / (width // 2))
    angles = 2 * np.pi * np.arange(count)[:, None] / periods
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def trainable(config) -> tuple[str, ...] | None:
    """The patterns of what is trained: as the config says; else with LoRA its adapters; else everything."""
    return tuple(config.trainable) or ((ADAPTERS,) if config.lora.rank else None)


def _make(config, mesh) -> tuple[Model, Any]:
    """Random weights of config.model, with the tokenizer of the world."""
    if not config.model:
        raise OptionError("config.checkpoint and config.model are empty; give one of them.")
    tokenizer, words = world_tokenizer(), None
    if config.model.get("model_type") in INSTRUCTED:
        tokenizer.chat_template, words = QUERIES_FIRST_TEMPLATE, bert_tokenizer()
    values = _filled(_from_parts(plain(config.model), plain(config.parts)), tokenizer, words)
    settings = convert.network_config(SimpleNamespace(config=values, name="config.model"))
    model = _model(values, settings, tokenizer, (), words=words)
    network, _ = NETWORKS[convert.architecture(values)]

    def start():
        return scaled(network(settings, stacked=config.stacked, rngs=nnx.Rngs(config.seed)))

    shardings = None if mesh is None else _shardings(jax.eval_shape(start), mesh)
    module = jax.jit(start, out_shardings=shardings)()
    for part in plain(config.parts):
        module = take(module, part, config.stacked)
    return model, module if mesh is None or not config.parts else jax.device_put(module, shardings)


def _from_parts(values: dict, parts) -> dict:
    """A config.json in which the sizes of a part that is not there are those of the checkpoint it comes from."""
    for part in map(checked, parts):
        if (name := f"{part['to']}_config") not in values:
            found = open_config(part["source"])[1]
            values |= {name: found[name]} if name in found else {}
    return values


def _filled(values: dict, tokenizer, words) -> dict:
    """A config.json with what hangs on the tokenizers."""
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in TOKENS.items()}
    if words is None:
        return {"vocab_size": len(tokenizer), **ids, **values}
    if "text_config" not in values:
        raise OptionError("config.model has no text_config; give it, or take the part 'text' from a checkpoint.")
    text = {"vocab_size": len(tokenizer), **{key: ids[key] for key in ("bos_token_id", "eos_token_id")}}
    values = {"image_token_index": ids["video_token_id"], **values, "text_config": text | values["text_config"]}
    reader = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    return values | {name: reader | values[name] for name in ("bert_config", "qformer_config") if name in values}


def _load(config, mesh) -> tuple[Model, Any]:
    weights = convert.open_weights(config.checkpoint)
    settings = convert.network_config(weights)
    shardings = None if mesh is None else lambda path, shape: parameter_sharding(mesh, path, shape)
    module = convert.build(weights, settings, stacked=config.stacked, shardings=shardings)
    tokenizer = load_tokenizer(weights.path)
    if tokenizer is None:
        raise CheckpointError(f"{weights.name} has no tokenizer; put tokenizer.json and tokenizer_config.json in it.")
    words = load_tokenizer(weights.path / INSTRUCTION)
    files = tuple(files_beside(weights.path))
    return _model(weights.config, settings, tokenizer, files, weights.path, words=words), module


def _shardings(module, mesh):
    """Where the parameters of an abstract module lie."""
    places = [parameter_sharding(mesh, leaf.path, leaf.value.shape) for leaf in leaves(module)]
    return jax.tree.unflatten(jax.tree.structure(module), places)


def _model(values: dict, settings, tokenizer, files, folder: Path | None = None, words=None) -> Model:
    if isinstance(settings, DecoderConfig):
        return Model(values, settings, None, tokenizer, files, settings=settings)
    pixels = {}
    if folder is not None:
        found = Settings.from_folder(folder, values)
        pixels = {"mean": found.mean, "std": found.std}
    video = values.get("video_token_id", values.get("image_token_index"))
    return Model(
        values, settings.text, settings.vision, tokenizer, files, video, **pixels, words=words, settings=settings
    )


def _check_tokenizer(model: Model) -> None:
    largest = max(model.tokenizer.get_vocab().values())
    if largest >= model.text.vocab_size:
        raise OptionError(
            f"the tokenizer has tokens up to {largest}, but the model's vocab_size is {model.text.vocab_size}; "
            "make it larger or take the tokenizer that belongs to the model."
        )
    if model.vision is None or model.files and isinstance(model.vision, EvaConfig):
        return  # an InstructBLIP's queries need no token
    token = TOKENS["video_token_id"]
    if model.tokenizer.get_vocab().get(token) != model.video_token:
        raise OptionError(
            f"the tokenizer has no token {token} with the number {model.video_token}, which the model's config.json "
            "gives as video_token_id; take the tokenizer that belongs to the model."
        )
