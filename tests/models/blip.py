"""Tiny random InstructBLIPs, BLIP-2s and BERTs of transformers, in which no parameter has its usual initial value."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from longvid_jax.models.qformer import looking_at

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
QFORMER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
OPT = {
    "model_type": "opt",
    "vocab_size": 60,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
BERT = {**QFORMER, "num_hidden_layers": 2, "type_vocab_size": 3}
QUERIES, IMAGE = 4, 59  # query tokens, and the token whose place they take


def randomise(model, seed: int = 0):
    """Around 1 for the scales of norms, around 0 for all else."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            around = 1.0 if "norm" in path.lower() and path.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, around, 0.15)
    return model.eval()


def config_of(
    kind: str = "InstructBlip", *, text: dict = LLAMA, vision: dict | None = None, qformer: dict | None = None
):
    """kind: InstructBlip or Blip2."""
    return getattr(transformers, f"{kind}Config")(
        vision_config={**VISION, **(vision or {})},
        qformer_config={**QFORMER, **(qformer or {})},
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )


def make(kind: str = "InstructBlip", *, head: str = "ForConditionalGeneration", **how):
    """A model with all its parts."""
    return randomise(getattr(transformers, f"{kind}{head}")(config_of(kind, **how)))


def inputs(rng: np.random.Generator, *, batch: int = 2, words: int = 5, length: int = 9) -> dict[str, np.ndarray]:
    """What a model takes; the second instruction is shorter than the others, and padded."""
    valid = np.ones((batch, words), np.int64)
    valid[1, words - 2 :] = 0
    ids = rng.integers(3, IMAGE, (batch, length))
    return {
        "pixel_values": rng.normal(size=(batch, 3, VISION["image_size"], VISION["image_size"])).astype(np.float32),
        "qformer_input_ids": rng.integers(1, QFORMER["vocab_size"], (batch, words)),
        "qformer_attention_mask": valid,
        "input_ids": np.concatenate([np.full((batch, QUERIES), IMAGE), ids], axis=1),
    }


def expected_logits(model, given: dict[str, np.ndarray]) -> np.ndarray:
    """transformers' logits; a BLIP-2 does not take the Q-Former's words."""
    if not isinstance(model, transformers.InstructBlipForConditionalGeneration):
        given = {name: value for name, value in given.items() if not name.startswith("qformer")}
    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in given.items()}).logits.numpy()


@jax.jit
def logits(model, given: dict[str, np.ndarray]) -> jax.Array:
    """The same with our networks, put together."""
    features = model.vision(jnp.moveaxis(given["pixel_values"], 1, -1))
    text = model.qformer.embed(given["qformer_input_ids"])
    look = looking_at(*model.qformer.keys_values(features))
    batch, queries = features.shape[0], model.config.num_queries
    seen, _ = model.qformer(model.queries(batch), text, given["qformer_attention_mask"].astype(bool), look, None)
    behind = model.text.embed(given["input_ids"][:, queries:])
    x = jnp.concatenate([model.projection(seen), behind], axis=1)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[:, None], (*x.shape[:2], 1))
    return model.text.logits(model.text(x, positions, jnp.ones(x.shape[:2], bool))[0])
