"""The network that is trained, from random weights or from a checkpoint, and all that belongs to it besides."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx

from longvid_jax import convert
from longvid_jax.convert.folder import files_beside
from longvid_jax.convert.modules import NETWORKS
from longvid_jax.convert.settings import CLIP_MEAN, CLIP_STD, Settings
from longvid_jax.data.tokenizer import load_tokenizer, world_tokenizer
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models import lora
from longvid_jax.models.llama import DecoderConfig
from longvid_jax.models.paths import leaves
from longvid_jax.models.qwen2_vl import VisionConfig
from longvid_jax.models.sharding import parameter_sharding
from longvid_jax.train.config import plain
from longvid_jax.train.initial import scaled

ADAPTERS = ".*/lora_[ab]"
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
    vision: VisionConfig | None  # None: a decoder alone
    tokenizer: Any
    files: tuple[Path, ...]  # of the checkpoint it comes from, to be copied beside its weights
    video_token: int | None = None
    mean: tuple[float, ...] = CLIP_MEAN  # of pixels from 0 to 1
    std: tuple[float, ...] = CLIP_STD


def build(config, mesh=None) -> tuple[Model, Any]:
    """The model of a resolved config and its module, low-rank adapters in it if the config asks for them.

    Raises CheckpointError if it cannot be loaded, OptionError if the tokenizer and it do not fit.
    """
    model, module = _load(config, mesh) if config.checkpoint else _make(config, mesh)
    _check_tokenizer(model)
    if config.lora.rank:
        key = jax.random.key(config.seed)
        module = lora.add(module, tuple(config.lora.patterns), config.lora.rank, config.lora.alpha, key=key)
    return model, module


def trainable(config) -> tuple[str, ...] | None:
    """The patterns of what is trained: as the config says; else with LoRA its adapters; else everything."""
    return tuple(config.trainable) or ((ADAPTERS,) if config.lora.rank else None)


def _make(config, mesh) -> tuple[Model, Any]:
    """Random weights of config.model, with the tokenizer of the world."""
    tokenizer = world_tokenizer()
    values = {"vocab_size": len(tokenizer), **{key: tokenizer.convert_tokens_to_ids(t) for key, t in TOKENS.items()}}
    values |= plain(config.model)
    if not config.model:
        raise OptionError("config.checkpoint and config.model are empty; give one of them.")
    settings = convert.network_config(SimpleNamespace(config=values, name="config.model"))
    model = _model(values, settings, tokenizer, ())
    network, _ = NETWORKS[convert.architecture(values)]

    def start():
        return scaled(network(settings, stacked=config.stacked, rngs=nnx.Rngs(config.seed)))

    return model, jax.jit(start, out_shardings=None if mesh is None else _shardings(jax.eval_shape(start), mesh))()


def _load(config, mesh) -> tuple[Model, Any]:
    weights = convert.open_weights(config.checkpoint)
    settings = convert.network_config(weights)
    shardings = None if mesh is None else lambda path, shape: parameter_sharding(mesh, path, shape)
    module = convert.build(weights, settings, stacked=config.stacked, shardings=shardings)
    tokenizer = load_tokenizer(weights.path)
    if tokenizer is None:
        raise CheckpointError(f"{weights.name} has no tokenizer; put tokenizer.json and tokenizer_config.json in it.")
    return _model(weights.config, settings, tokenizer, tuple(files_beside(weights.path)), weights.path), module


def _shardings(module, mesh):
    """Where the parameters of an abstract module lie."""
    places = [parameter_sharding(mesh, leaf.path, leaf.value.shape) for leaf in leaves(module)]
    return jax.tree.unflatten(jax.tree.structure(module), places)


def _model(values: dict, settings, tokenizer, files, folder: Path | None = None) -> Model:
    if isinstance(settings, DecoderConfig):
        return Model(values, settings, None, tokenizer, files)
    pixels = {}
    if folder is not None:
        found = Settings.from_folder(folder, values)
        pixels = {"mean": found.mean, "std": found.std}
    return Model(values, settings.text, settings.vision, tokenizer, files, values.get("video_token_id"), **pixels)


def _check_tokenizer(model: Model) -> None:
    largest = max(model.tokenizer.get_vocab().values())
    if largest >= model.text.vocab_size:
        raise OptionError(
            f"the tokenizer has tokens up to {largest}, but the model's vocab_size is {model.text.vocab_size}; "
            "make it larger or take the tokenizer that belongs to the model."
        )
    if model.vision is None:
        return
    token = TOKENS["video_token_id"]
    if model.tokenizer.get_vocab().get(token) != model.video_token:
        raise OptionError(
            f"the tokenizer has no token {token} with the number {model.video_token}, which the model's config.json "
            "gives as video_token_id; take the tokenizer that belongs to the model."
        )
