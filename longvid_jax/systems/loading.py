"""From a checkpoint's name to a model that answers."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp

from longvid_jax import convert
from longvid_jax.convert.settings import Settings
from longvid_jax.data.tokenizer import INSTRUCTION, load_tokenizer
from longvid_jax.errors import CheckpointError, OptionError, VideoWarning
from longvid_jax.models.sharding import parameter_sharding
from longvid_jax.systems.adacm2 import AdaCM2, AdaCM2Model
from longvid_jax.systems.base import VideoModel
from longvid_jax.systems.retake import ReTaKe, RetakeModel
from longvid_jax.systems.rewind import ReWind, RewindModel

# Which method runs on which architecture, and what it is loaded as.
SYSTEMS = {
    "qwen2_vl": (ReTaKe, RetakeModel),
    "instructblip": (AdaCM2, AdaCM2Model),
    "blip-2": (AdaCM2, AdaCM2Model),
    "rewind": (ReWind, RewindModel),
}


def load(
    source,
    method: ReTaKe | AdaCM2 | ReWind | None = None,
    dtype=None,
    mesh=None,
    *,
    stacked: bool | None = None,
    part: str | None = None,
    revision: str | None = None,
) -> VideoModel:
    """A model that answers questions about videos, from a converted folder, a Hugging Face folder or a hub id.

    method: lv.ReTaKe(...) for a Qwen2-VL, lv.AdaCM2(...) for an InstructBLIP, lv.ReWind(...) for a ReWind,
    or None for the plain model.
    dtype: of parameters and activations; by default what the device is good at.
    mesh: a jax.sharding.Mesh over which parameters and caches are spread (see scale.make_mesh).
    stacked: layers as one scanned stack (the default on TPUs and with a mesh) or as a tuple.
    part: "vision", "text" or "qformer" loads that network alone and returns it as a bare module.
    revision: branch, tag or commit of a hub id.

    Weights are read slice by slice, straight to where they belong; every tensor must be used and every parameter
    filled. Raises CheckpointError with all that does not fit.
    """
    methods = tuple(kind for kind, _ in dict.fromkeys(SYSTEMS.values()))
    if method is not None and not isinstance(method, methods):
        raise OptionError(f"method is {method!r}, but must be lv.ReTaKe(...), lv.AdaCM2(...), lv.ReWind(...) or None.")
    weights = convert.open_weights(source, revision)
    if (name := convert.architecture(weights.config)) not in SYSTEMS:
        raise CheckpointError(
            f"{weights.name} is a {name} model, with no vision tower that watches; give one of {', '.join(SYSTEMS)}."
        )
    kind, system = SYSTEMS[name]
    if method is not None and not isinstance(method, kind):
        raise OptionError(f"{weights.name} is a {name} model, for lv.{kind.__name__}(...), not for {method!r}.")
    config = convert.network_config(weights, part)
    if isinstance(method, ReTaKe) and method.yarn_factor is not None:
        rope = dataclasses.replace(config.text.rope, scaling="yarn", factor=float(method.yarn_factor))
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, rope=rope))
    if system is AdaCM2Model and part is None and not config.qformer.words:
        warnings.warn(
            f"{weights.name}: its Q-Former takes no instruction, so what is kept of a video does not depend on the "
            "question.",
            VideoWarning,
            stacklevel=2,
        )
    settings = Settings.from_folder(weights.path, weights.config)
    model = convert.build(
        weights,
        config,
        dtype=dtype or default_dtype(),
        stacked=jax.default_backend() == "tpu" or mesh is not None if stacked is None else stacked,
        shardings=None if mesh is None else lambda path, shape: parameter_sharding(mesh, path, shape),
        part=part,
    )
    if part is not None:
        return model
    options = {"method": method, "tokenizer": load_tokenizer(weights.path), "mesh": mesh}
    if system in (AdaCM2Model, RewindModel):
        options["words"] = load_tokenizer(weights.path / INSTRUCTION)
    return system(model, settings, **options)


def default_dtype():
    """float32 on CPUs, bfloat16 on TPUs and on GPUs that have it, else float16 (a T4)."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.float32
    if device.platform == "gpu" and float(getattr(device, "compute_capability", "8.0")) < 8:
        return jnp.float16
    return jnp.bfloat16
