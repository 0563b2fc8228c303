"""From stored weights to a bare module, whichever model they are of and however they are stored."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from longvid_jax.convert.folder import PROVENANCE, Checkpoint, first_line, is_checkpoint
from longvid_jax.convert.load import Shardings, check_finite, checked_dtype, fill, restore
from longvid_jax.convert.source import Source, open_source
from longvid_jax.convert.tables import architecture, table_for
from longvid_jax.errors import CheckpointError
from longvid_jax.models.bert import Bert, BertConfig
from longvid_jax.models.instructblip import DECODERS, InstructBlip, InstructBlipConfig, language_model
from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
from longvid_jax.models.rewind import Rewind, RewindConfig
from longvid_jax.models.towers import Towers, TowersConfig

NETWORKS = {
    "llama": (Decoder, DecoderConfig),
    "qwen2": (Decoder, DecoderConfig),
    "qwen2_vl": (Qwen2VL, Qwen2VLConfig),
    "bert": (Bert, BertConfig),
    "instructblip": (InstructBlip, InstructBlipConfig),
    "blip-2": (InstructBlip, InstructBlipConfig),
    "world_towers": (Towers, TowersConfig),
    "rewind": (Rewind, RewindConfig),
}


def open_weights(path_or_id: str | Path, revision: str | None = None) -> Source | Checkpoint:
    """Opens a converted checkpoint, a Hugging Face folder or a hub id; CheckpointError if it is none of them."""
    path = Path(path_or_id).expanduser()
    if is_checkpoint(path) or (path / PROVENANCE).is_file():  # with the latter alone it is one that is not whole
        if revision is not None:
            raise CheckpointError(f"{path} is a local folder, which has no revision {revision!r}; only a hub id has.")
        return Checkpoint(path)
    return open_source(path_or_id, revision)


def from_huggingface(
    path_or_id: str | Path,
    *,
    dtype=None,
    stacked: bool = False,
    shardings: Shardings | None = None,
    part: str | None = None,
    revision: str | None = None,
):
    """A bare module (Decoder, Qwen2VL, ...) with the weights of a Hugging Face folder or hub id, or of a converted one.

    dtype: of all parameters; None keeps what is stored. stacked: layers as one scanned stack instead of a tuple.
    shardings: from a leaf's path and shape to its sharding (models.sharding.parameter_sharding with a mesh, say);
        None: all on the first local device.
    part: only this part of the model, "vision" or "text" of a Qwen2-VL, "qformer" of an InstructBLIP; the others are
        not read, and a language model that is not known does not matter.
    revision: of a hub id.
    Raises CheckpointError with all that does not fit.
    """
    weights = open_weights(path_or_id, revision)
    settings = network_config(weights, part)
    return build(weights, settings, dtype=dtype, stacked=stacked, shardings=shardings, part=part)


def build(weights: Source | Checkpoint, config, *, dtype=None, stacked=False, shardings=None, part=None):
    """The network of `config` (as network_config gives it, or changed) with these weights; see from_huggingface."""
    module = abstract(weights.config, config, stacked=stacked)
    if part is not None:
        module = getattr(module, part, None)
        if not isinstance(module, nnx.Module):
            raise CheckpointError(f"{weights.name} has no part {part!r}; give the name of one, such as 'vision'.")
    options = {"dtype": checked_dtype(dtype), "shardings": shardings, "within": f"{part}/" if part else ""}
    if isinstance(weights, Checkpoint):
        filled = restore(weights, module, **options)
    else:
        filled = fill(weights, module, table_for(weights.config), **options)
    if options["dtype"] == np.float16:
        check_finite(filled, "load them in bfloat16 or float32, float16 ends at 65504")
    return filled


def abstract(config: dict, settings, *, stacked: bool = False):
    """The module of a config.json and of what network_config made of it, without arrays."""
    network, _ = NETWORKS[architecture(config)]
    try:
        return jax.eval_shape(lambda: network(settings, stacked=stacked, rngs=nnx.Rngs(0)))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json has sizes of which no network can be built ({first_line(error)}); fetch it again."
        ) from error


def network_config(weights, part: str | None = None):
    """What fixes the network: a DecoderConfig, Qwen2VLConfig, ...; CheckpointError where none can be built.

    weights: a checkpoint, or just what has its `.config` and, for errors, `.name`. part: all that is to be built of it.
    """
    _, reader = NETWORKS[architecture(weights.config)]
    try:
        settings = reader.from_huggingface(weights.config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{weights.name}: config.json has a value of the wrong kind ({error}); fetch it again."
        ) from error
    if isinstance(settings, Qwen2VLConfig):
        _check_qwen2_vl(weights.name, settings)
    if isinstance(settings, InstructBlipConfig) and settings.text is None and part is None:
        raise CheckpointError(
            f"{weights.name}: its language model is of type '{language_model(weights.config)}', and only "
            f"{' and '.join(DECODERS)} are known; load a part of it, 'vision' or 'qformer', or one with a Vicuna."
        )
    if isinstance(settings, BertConfig) and "add_pooling_layer" not in weights.config:
        settings = dataclasses.replace(settings, pooler=_has_pooler(weights))
    return settings


def _has_pooler(weights) -> bool:
    """Whether a BERT has its pooler, which config.json does not say; True where there are no weights yet."""
    keys = getattr(weights, "tensors", None) or getattr(weights, "arrays", None)
    return keys is None or any(re.search(r"(^|\.|/)pooler[./]", key) for key in keys)


def _check_qwen2_vl(name: str, config: Qwen2VLConfig) -> None:
    text, vision = config.text, config.vision
    if sum(text.rope.sections or ()) != text.rope.head_dim // 2:
        raise CheckpointError(
            f"{name}: mrope_section under rope_scaling in config.json is {text.rope.sections}, but must be "
            f"three numbers with the sum {text.rope.head_dim // 2}, half a head's width."
        )
    if not vision.heads or vision.width % (4 * vision.heads):
        raise CheckpointError(
            f"{name}: num_heads under vision_config in config.json is {vision.heads}, but the width "
            f"{vision.width} must be divisible by four times it."
        )
