"""From a checkpoint's name to a model that answers."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from longvid_jax import convert
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
from longvid_jax.models.sharding import parameter_sharding
from longvid_jax.systems.retake import ReTaKe, RetakeModel
from longvid_jax.systems.settings import Settings


def load(source, method: ReTaKe | None = None, dtype=None, mesh=None, *, stacked: bool | None = None) -> RetakeModel:
    """A model that answers questions about videos, from a Hugging Face folder or hub id.

    method: lv.ReTaKe(...), or None for the plain model. dtype: of parameters and activations; by default what the
    device is good at. mesh: a jax.sharding.Mesh over which parameters and caches are spread (see scale.make_mesh).
    stacked: layers as one scanned stack (the default on TPUs and with a mesh) or as a tuple.

    Weights are read slice by slice, straight to where they belong; every tensor must be used and every parameter
    filled. Raises CheckpointError with all that does not fit.
    """
    if method is not None and not isinstance(method, ReTaKe):
        raise OptionError(f"method is {method!r}, but must be lv.ReTaKe(...) or None.")
    weights = convert.open_source(source)
    if (name := convert.architecture(weights.config)) != "qwen2_vl":
        raise CheckpointError(f"{weights.name} is a {name} model, which has no vision tower; ReTaKe runs on qwen2_vl.")
    config = _config(weights)
    if method is not None and method.yarn_factor is not None:
        rope = dataclasses.replace(config.text.rope, scaling="yarn", factor=float(method.yarn_factor))
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, rope=rope))
    settings = Settings.from_folder(weights.path, weights.config)
    stacked = jax.default_backend() == "tpu" or mesh is not None if stacked is None else stacked
    abstract = jax.eval_shape(lambda: Qwen2VL(config, stacked=stacked, rngs=nnx.Rngs(0)))
    shardings = None if mesh is None else lambda path, shape: parameter_sharding(mesh, path, shape)
    model = convert.fill(
        weights, abstract, convert.table_for(weights.config), dtype=dtype or default_dtype(), shardings=shardings
    )
    return RetakeModel(model, settings, method=method, tokenizer=_tokenizer(weights.path), mesh=mesh)


def _config(weights: convert.Source) -> Qwen2VLConfig:
    """The checkpoint's config; CheckpointError where no network can be built from it."""
    try:
        config = Qwen2VLConfig.from_huggingface(weights.config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{weights.name}: config.json has a value of the wrong kind ({error}); fetch it again."
        ) from error
    text, vision = config.text, config.vision
    if sum(text.rope.sections or ()) != text.rope.head_dim // 2:
        raise CheckpointError(
            f"{weights.name}: mrope_section under rope_scaling in config.json is {text.rope.sections}, but must be "
            f"three numbers with the sum {text.rope.head_dim // 2}, half a head's width."
        )
    if not vision.heads or vision.width % (4 * vision.heads):
        raise CheckpointError(
            f"{weights.name}: num_heads under vision_config in config.json is {vision.heads}, but the width "
            f"{vision.width} must be divisible by four times it."
        )
    return config


def default_dtype():
    """float32 on CPUs, bfloat16 on TPUs and on GPUs that have it, else float16 (a T4)."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.float32
    if device.platform == "gpu" and float(getattr(device, "compute_capability", "8.0")) < 8:
        return jnp.float16
    return jnp.bfloat16


def _tokenizer(folder):
    """The folder's tokenizer; None where it has none."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer  # seconds to import; token ids alone do not need it

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read ({error}); fetch tokenizer.json again."
        ) from error
