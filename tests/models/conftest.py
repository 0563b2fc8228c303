"""Tiny random transformers models, saved to a folder and loaded from it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from longvid_jax import convert
from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig

TEXT = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 64}
TOKENS = {"image_token_id": 117, "video_token_id": 118, "vision_start_token_id": 115, "vision_end_token_id": 116}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A torch model, its folder, and ours from that folder."""

    torch: Any
    folder: Path

    def ours(self, *, stacked: bool = False):
        source = convert.open_source(self.folder)
        if source.config["model_type"] == "qwen2_vl":
            make, config = Qwen2VL, Qwen2VLConfig.from_huggingface(source.config)
        else:
            make, config = Decoder, DecoderConfig.from_huggingface(source.config)
        abstract = jax.eval_shape(lambda: make(config, stacked=stacked, rngs=nnx.Rngs(0)))
        return convert.fill(source, abstract, convert.table_for(source.config))

    def older_config(self) -> None:
        """Rewrites config.json in the fields of transformers 4: rope_theta and rope_scaling."""
        file = self.folder / "config.json"
        config = json.loads(file.read_text())
        scaling = config.pop("rope_parameters")
        config["rope_theta"] = scaling.pop("rope_theta")
        kind = scaling.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
        file.write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny("LlamaForCausalLM", **config): a model with no parameter at its usual initial value; made once."""
    import torch
    import transformers

    made = {}

    def make(name: str, **changes) -> Tiny:
        key = repr((name, sorted(changes.items())))
        if key not in made:
            torch.manual_seed(len(made))
            cls = getattr(transformers, name)
            config = {**TEXT, **changes}
            if name.startswith("Qwen2VL"):
                vision = {**VISION, **config.pop("vision", {})}
                tied = config["tie_word_embeddings"]
                config = {"text_config": config, "vision_config": vision, "tie_word_embeddings": tied, **TOKENS}
            model = cls(cls.config_class(**config)).eval()
            with torch.no_grad():
                for path, parameter in model.named_parameters():  # norms and biases too, which start at ones and zeros
                    around = 1.0 if "norm" in path and path.endswith("weight") or path.endswith("ln_q.weight") else 0.0
                    torch.nn.init.normal_(parameter, around, 0.1)
            folder = tmp_path_factory.mktemp("tiny")
            model.save_pretrained(folder)
            made[key] = Tiny(model, folder)
        return made[key]

    return make
