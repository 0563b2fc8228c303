"""longvid train --config configs/world_towers.py:tiny --workdir runs/towers

Three small towers learn the made-up world side by side: an EVA tower names what is in sight, a BERT guesses words of
questions, and a Llama answers questions from facts that are told in vectors. AdaCM2 and ReWind are built on them.

The Llama begins as the decoder of the shipped Qwen2-VL (assets/qwen2vl_world), which has answered such questions.

Variants: tiny, and smoke, which takes seconds and learns next to nothing: to see that all of it runs.
"""

from longvid_jax.data.facts import FACT_WIDTH
from longvid_jax.evaluate import assets
from longvid_jax.train.config import base, stage

SIZE = 56  # pixels of a frame's side
QUERIES = 32  # vectors in which facts are told
TEXT = tuple(range(64, 1537, 64))  # buckets of tokens

# Of the shipped Qwen2-VL's decoder, which is a Llama with biases.
TEXT_CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "tie_word_embeddings": True,
}
VISION_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 14,
}
BERT_CONFIG = {
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}
TINY = {
    "model_type": "world_towers",
    "vision_config": VISION_CONFIG,
    "bert_config": BERT_CONFIG,
    "text_config": TEXT_CONFIG,
    "fact_width": FACT_WIDTH,
}
SMALLER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMOKE = TINY | {
    "vision_config": VISION_CONFIG | SMALLER,
    "bert_config": BERT_CONFIG | SMALLER,
    "text_config": TEXT_CONFIG | SMALLER | {"num_key_value_heads": 1},
}


def get_config(variant: str = "tiny"):
    config = base()
    config.optim.rule = "muon"
    config.optim.lr = 2e-3
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.05
    config.optim.floor = 0.02
    if variant == "smoke":
        config.model = SMOKE
        config.stages = (_towers(steps=4, batch_size=2, questions=4),)
        config.eval = _held_out(every=4, batches=1, batch_size=2)
        config.save.every = 2
        config.log_every = 1
        config.optim.warmup = 1
        return config
    if variant != "tiny":
        raise ValueError(f"there is no variant {variant!r}, but tiny and smoke")
    config.model = TINY
    config.parts = (
        {"to": "text", "source": str(assets.path("qwen2vl_world")), "part": "text", "new": ("/attention/o/bias",)},
    )
    config.stages = (
        _towers(steps=400, batch_size=8, questions=14),
        _towers(steps=1600, batch_size=6, questions=14, worlds=8),
    )
    config.eval = _held_out(every=400, batches=8, batch_size=16)
    config.save.every = 400
    config.save.keep_best = 0
    config.optim.warmup = 100
    return config


def _towers(steps: int, batch_size: int, questions: int, worlds: int = 0):
    worlds = worlds or batch_size
    moments = {
        "worlds": worlds,
        "kind": "moments",
        "size": (SIZE, SIZE),
        "monochrome": 0.1,
        "recoloured": 0.4,
        "moments": 12,
    }
    facts = {"kind": "facts", "count": 10_000_000, "questions": questions, "temporal": 1, "slots": QUERIES}
    facts |= {"seconds": (16.0, 8.0, 16.0, 32.0, 16.0, 64.0), "offset": 128, "stride": 3}
    return stage(task="towers", steps=steps, batch_size=batch_size, sources=(moments, facts), text=TEXT)


def _held_out(every: int, batches: int, batch_size: int) -> dict:
    source = {"kind": "facts", "count": 1000, "split": "validation", "temporal": 1, "slots": QUERIES, "questions": 14}
    return {
        "every": every,
        "task": "facts",
        "batches": batches,
        "batch_size": batch_size,
        "sources": (source | {"seconds": (16.0,)},),
        "text": TEXT,
    }
