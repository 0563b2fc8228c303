"""longvid train --config configs/qwen2vl_world.py:tiny --workdir runs/tiny

A small Qwen2-VL that learns the made-up world of longvid_jax.video.synthetic from nothing.

Variants: tiny, and smoke, which takes seconds and learns next to nothing: to see that all of it runs.
"""

from longvid_jax.train.config import base, stage

FPS = 2  # sampled frames a second, the source's own
SIZE = 56  # pixels of a frame's side
TEXT = tuple(range(64, 1537, 64))  # buckets of tokens

TINY = {
    "model_type": "qwen2_vl",
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]},
    "tie_word_embeddings": True,
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 128,
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


LONGEST = 512  # seconds: as far as positions go in training; the videos themselves have 64 at most


def get_config(variant: str = "tiny"):
    config = base()
    config.optim.rule = "muon"
    config.optim.lr = 3e-3
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.1
    config.optim.floor = 0.02
    if variant == "smoke":
        config.model = SMOKE
        config.stages = (
            _naming(steps=2, worlds=2, size=28),
            _worlds(steps=4, batch_size=4, size=28, seconds=2.0, questions=4),
        )
        config.eval = _held_out(every=6, batches=1, batch_size=4, size=28, seconds=2.0)
        config.save.every = 2
        config.log_every = 1
        config.optim.warmup = 1
        return config
    if variant != "tiny":
        raise ValueError(f"there is no variant {variant!r}, but tiny and smoke")
    config.model = TINY
    config.stages = (
        _naming(steps=3000, worlds=16),
        _worlds(steps=300, batch_size=16, seconds=2.0, questions=6),
        _worlds(steps=400, batch_size=12, seconds=4.0, questions=10),
        _worlds(steps=600, batch_size=8, seconds=8.0, questions=14),
        _worlds(steps=1800, batch_size=8, seconds=16.0, questions=14, group="short"),
        _naming(steps=600, worlds=16, group="short"),
        # Long ones too, later and wider apart than they are.
        _worlds(steps=2300, batch_size=8, seconds=16.0, questions=14, offset=LONGEST - 64, stride=4, group="long"),
        _worlds(steps=1000, batch_size=4, seconds=32.0, questions=20, offset=LONGEST - 128, stride=4, group="long"),
        _worlds(steps=1800, batch_size=2, seconds=64.0, questions=28, offset=LONGEST - 256, stride=4, group="long"),
        _naming(steps=1500, worlds=16, group="long", monochrome=0.1, recoloured=0.5),
    )
    config.eval = _held_out(every=1000, batches=12, batch_size=8, seconds=16.0)
    config.save.every = 250
    config.save.dtype = "bfloat16"
    config.pixels.min_pixels = config.pixels.max_pixels = SIZE * SIZE
    config.assets = "qwen2vl_world"
    config.benchmark = {"seconds": 16.0, "fps": FPS, "size": SIZE, "level": "clear"}
    config.optim.warmup = 50
    return config


def _naming(steps: int, worlds: int, size: int = SIZE, group: str = "", **shown):
    """The vision tower learns colours and shapes, some moments of many worlds at a time."""
    source = {"kind": "moments", "size": (size, size), "monochrome": 0.4} | shown
    return stage(task="naming", steps=steps, batch_size=worlds, sources=(source,), group=group)


def _worlds(
    steps: int, batch_size: int, seconds: float, questions: int, size: int = SIZE, group: str = "", **positions
):
    source = {"kind": "world", "count": 10_000_000, "seconds": (seconds,), "size": (size, size), "questions": questions}
    return stage(
        steps=steps,
        batch_size=batch_size,
        sources=(source | positions,),
        frames=(int(seconds * FPS),),
        text=TEXT,
        group=group,
    )


def _held_out(every: int, batches: int, batch_size: int, seconds: float, size: int = SIZE) -> dict:
    source = {"kind": "world", "count": 1000, "split": "validation", "seconds": (seconds,), "size": (size, size)}
    return {
        "every": every,
        "batches": batches,
        "batch_size": batch_size,
        "sources": (source | {"questions": 14},),
        "frames": (int(seconds * FPS),),
        "text": TEXT,
    }
