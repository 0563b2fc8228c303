"""longvid train --config configs/qwen2vl_world.py:tiny --workdir runs/tiny

A small Qwen2-VL that learns the made-up world of longvid_jax.video.synthetic from nothing.

Variants: tiny, and smoke, which takes seconds and learns next to nothing: to see that all of it runs.
"""

from longvid_jax.train.config import base, stage

TINY = {
    "model_type": "qwen2_vl",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]},
    "tie_word_embeddings": True,
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 128,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
SMOKE = TINY | {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": TINY["vision_config"] | {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
}


def get_config(variant: str = "tiny"):
    config = base()
    if variant == "smoke":
        config.model = SMOKE
        config.stages = (_worlds(steps=4, batch_size=4, size=28, seconds=(2.0,), frames=(2, 4)),)
        config.eval = _held_out(every=4, batches=1, batch_size=4, size=28, seconds=(2.0,), frames=(4,))
        config.save.every = 2
        config.log_every = 1
        config.optim.warmup = 1
        return config
    if variant != "tiny":
        raise ValueError(f"there is no variant {variant!r}, but tiny and smoke")
    config.model = TINY
    config.stages = (
        _worlds(steps=2000, batch_size=32, size=56, seconds=(2.0, 4.0), frames=(4, 8)),
        _worlds(steps=4000, batch_size=32, size=56, seconds=(8.0, 16.0), frames=(16, 32)),
    )
    config.eval = _held_out(every=500, batches=8, batch_size=32, size=56, seconds=(16.0,), frames=(32,))
    config.optim.warmup = 200
    return config


def _worlds(steps: int, batch_size: int, size: int, seconds: tuple, frames: tuple):
    source = {"kind": "world", "count": 1_000_000, "seconds": seconds, "size": (size, size), "questions": 8}
    return stage(
        steps=steps,
        batch_size=batch_size,
        sources=(source,),
        frames=frames,
        text=(256, 512, 1024),
        shifts={"offset": 512, "stride": 4, "plain": 0.5},
    )


def _held_out(every: int, batches: int, batch_size: int, size: int, seconds: tuple, frames: tuple) -> dict:
    source = {"kind": "world", "count": 1000, "split": "validation", "seconds": seconds, "size": (size, size)}
    return {
        "every": every,
        "batches": batches,
        "batch_size": batch_size,
        "sources": (source,),
        "frames": frames,
        "text": (512, 1024),
    }
