"""The model that a training has made, as a Hugging Face folder."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from longvid_jax import checkpoint, convert
from longvid_jax.convert.folder import write_json
from longvid_jax.convert.source import read_json
from longvid_jax.convert.target import written
from longvid_jax.data.chat import QWEN2_VL_TEMPLATE
from longvid_jax.data.tokenizer import INSTRUCTION, save_tokenizer
from longvid_jax.models import lora
from longvid_jax.train.config import plain
from longvid_jax.train.models import Model

ALPHA = "adapters.json"


def export(module, model: Model, config, folder: Path) -> Path:
    """Writes the module, adapters merged, with its tokenizer and pixel settings as `folder`/model; returns that.

    Its adapters, if it has any, are besides saved alone as `folder`/adapters: see `read_adapters`. Of several processes
    the first one writes, which must have room in its memory for all parameters.
    """
    module = jax.tree.map(_whole, module)
    if jax.process_index() == 0:
        _write(module, model, config, folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("exported")
    return folder / "model"


def _whole(array: jax.Array):
    """An array of which this process has all parts."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    return multihost_utils.process_allgather(array, tiled=True)


def _write(module, model: Model, config, folder: Path) -> None:
    if config.lora.rank:
        _save_adapters(lora.adapters(module), config, folder / "adapters")
        module = lora.merge(module)
    with tempfile.TemporaryDirectory() as beside:
        files = model.files or _write_beside(model, plain(config.pixels), Path(beside))
        convert.save_huggingface(
            module,
            model.config,
            folder / "model",
            convert.table_for(model.config),
            dtype=jnp.dtype(config.save.dtype),
            beside=files,
            overwrite=True,
        )


def _save_adapters(adapters, config, folder: Path) -> None:
    with written(folder, sum(array.nbytes for array in adapters.values()), True, lambda _: True) as unfinished:
        checkpoint.save(unfinished / "params", adapters)
        about = {"alpha": config.lora.alpha, "rank": config.lora.rank, "base": config.checkpoint}
        write_json(unfinished / ALPHA, about)


def read_adapters(folder: str | Path) -> tuple[dict, float]:
    """Adapters that a training has saved, and their alpha: models.lora.with_adapters(module, *read_adapters(...))."""
    folder = Path(folder)
    alpha = read_json(folder / ALPHA)["alpha"]
    return checkpoint.restore(folder / "params", checkpoint.contents(folder / "params")), alpha


def _write_beside(model: Model, limits: dict[str, int], folder: Path) -> list[Path]:
    """The tokenizer and the processor's constants of a model that comes from no checkpoint."""
    template = model.tokenizer.chat_template or QWEN2_VL_TEMPLATE
    length = model.text.rope.original_length
    save_tokenizer(model.tokenizer.backend_tokenizer, folder, max_length=length, template=template)
    if model.words is not None:
        model.words.save_pretrained(folder / INSTRUCTION)
        side = {"height": model.vision.image_size, "width": model.vision.image_size}
        about = {"image_processor_type": "BlipImageProcessor", "size": side}
        write_json(folder / "preprocessor_config.json", {**about, "image_mean": model.mean, "image_std": model.std})
    elif model.vision is not None:
        vision = model.vision
        about = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_mean": list(model.mean),
            "image_std": list(model.std),
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal,
            "merge_size": vision.merge,
            **{name: pixels for name, pixels in limits.items() if pixels},
        }
        write_json(folder / "preprocessor_config.json", about)
    return sorted(file for file in folder.rglob("*") if file.is_file())
