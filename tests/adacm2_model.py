"""A small InstructBLIP with random weights and the made-up world's tokenizers, as a Hugging Face folder."""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longvid_jax import convert
from longvid_jax.data.chat import QUERIES_FIRST_TEMPLATE
from longvid_jax.data.tokenizer import INSTRUCTION, bert_tokenizer, save_tokenizer, world_tokenizer
from longvid_jax.models.instructblip import InstructBlip, InstructBlipConfig
from longvid_jax.models.paths import leaves

LAYERS, TOKENS, SIZE, WIDTH = 2, 5, 28, 32  # that cross-attend, of a frame, pixels of its side, of the Q-Former
NETWORK = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LENGTH = 2048  # positions of the decoder


def write(folder: Path) -> Path:
    """Writes it into a folder that is absent or empty, and returns that."""
    tokenizer, words = world_tokenizer(), bert_tokenizer()
    stop, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|video_pad|>"))
    qformer = {"num_hidden_layers": 2 * LAYERS - 1, "vocab_size": len(words), "max_position_embeddings": 64}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    config = {
        "model_type": "instructblip",
        "num_query_tokens": 4,
        "num_frame_positions": 64,
        "carry_queries": False,
        "image_token_index": image,
        "vision_config": NETWORK | {"image_size": SIZE, "patch_size": 14},
        "qformer_config": NETWORK | qformer,
        "text_config": NETWORK | text | {"eos_token_id": stop},
    }
    settings = InstructBlipConfig.from_huggingface(config)
    model = _random(jax.eval_shape(lambda: InstructBlip(settings, rngs=nnx.Rngs(0))))
    with tempfile.TemporaryDirectory() as scratch:
        beside = Path(scratch)
        save_tokenizer(tokenizer.backend_tokenizer, beside, max_length=LENGTH, template=QUERIES_FIRST_TEMPLATE)
        words.save_pretrained(beside / INSTRUCTION)
        (beside / "preprocessor_config.json").write_text(json.dumps({"size": {"height": SIZE, "width": SIZE}}))
        files = [file for file in beside.rglob("*") if file.is_file()]
        return convert.save_huggingface(model, config, folder, convert.table_for(config), beside=files)


def _random(module):
    """An abstract module's parameters drawn such that questions and frames matter to what it says."""
    rng, values = np.random.default_rng(0), []
    for leaf in leaves(module):
        around = 1.0 if leaf.path.endswith("scale") else 0.0
        spread = leaf.value.shape[-2] ** -0.5 if leaf.path.endswith("kernel") else 0.3
        values.append(jnp.asarray(rng.normal(around, spread, leaf.value.shape), jnp.float32))
    return jax.tree.unflatten(jax.tree.structure(module), values)
