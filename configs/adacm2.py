"""longvid train --config configs/adacm2.py:lvu_director --workdir DIR --config.checkpoint=Salesforce/instructblip-vicuna-7b --config.data=train.json --config.videos=FOLDER

AdaCM2's recipe (arXiv 2411.12593, with MA-LMM's settings where the paper is silent): of an InstructBLIP with a Vicuna
the Q-Former, its queries, the projection and the frame positions are trained, the vision tower and the Vicuna are not.
The annotations are in MA-LMM's layout (see longvid_jax.data.malmm); config.videos holds a file or a folder of frames a
video.

Variants: lvu_relationship, lvu_way_speaking, lvu_scene, lvu_director, lvu_genre, lvu_writer, lvu_year; breakfast; coin;
msrvtt_cap, msvd_cap, youcook2_cap; msrvtt_qa, msvd_qa.

tiny learns the made-up world, on towers that `configs/world_towers.py:tiny` has made:

  longvid train --config configs/adacm2.py:tiny --workdir runs/adacm2 --config.towers=runs/towers/model

policy goes on from it for a few minutes with a cache that forgets, and learns with what stays:

  longvid train --config configs/adacm2.py:policy --workdir runs/recent --config.checkpoint=runs/adacm2/model \
    --config.adacm2.scores=recent

smoke takes seconds and learns next to nothing: to see that all of it runs.
"""  # noqa: E501

from longvid_jax.train.config import base, stage

LVU = ("relationship", "way_speaking", "scene", "director", "genre", "writer", "year")
# Kind of source, its arguments, learning rate, epochs, batch size, buckets of tokens of prompt and answer.
RECIPES = {
    **{f"lvu_{task}": ("lvu", {"task": task, "num_frames": 100}, 1e-4, 20, 64, (64,)) for task in LVU},
    "breakfast": ("breakfast", {"num_frames": 100}, 1e-4, 20, 64, (64,)),
    "coin": ("coin", {"num_frames": 100}, 1e-4, 20, 64, (64,)),
    "msrvtt_cap": ("captions", {"num_frames": 80}, 1e-5, 10, 128, (64, 128, 256)),
    "msvd_cap": ("captions", {"num_frames": 80}, 1e-5, 10, 128, (64, 128, 256)),
    "youcook2_cap": ("captions", {"num_frames": 80}, 1e-4, 10, 128, (64, 128, 256)),
    "msrvtt_qa": ("questions", {"num_frames": 20}, 1e-4, 5, 128, (64, 96, 192)),
    "msvd_qa": ("questions", {"num_frames": 20}, 1e-4, 5, 128, (64, 96, 192)),
}
DECAYED = (".*/kernel", ".*/embedding", "query_tokens")  # MA-LMM's: all that is not a vector
TRAINED = ("qformer/.*", "query_tokens", "projection/.*", "frames/.*")

SIZE, FPS, QUERIES = 56, 2, 32  # pixels of a frame's side, sampled frames a second
QFORMER = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}
# All but captions, which 32 vectors for one question are not asked to carry.
FAMILIES = ("needle", "order", "count", "when", "state", "presence")
FRESH = ("/cross", "/query_mlp", "/layers/04/", "/layers/05/")  # what a BERT of four layers does not have


def get_config(variant: str = "lvu_relationship"):
    config = base()
    config.trainable = TRAINED
    config.remat = "full"
    if variant in ("tiny", "policy", "smoke"):
        return _world(config, variant)
    if variant not in RECIPES:
        raise ValueError(f"there is no variant {variant!r}, but {', '.join(RECIPES)}, tiny, policy and smoke")
    kind, source, lr, epochs, batch, text = RECIPES[variant]
    config.compute_dtype = "bfloat16"
    config.save.dtype = "bfloat16"
    config.seed = 42
    config.optim.lr = lr
    config.optim.weight_decay = 0.05
    config.optim.decay = DECAYED
    config.optim.warmup = 1000
    config.optim.clip = None
    config.frame_positions.count = 120
    source = {"kind": kind, "file": config.get_ref("data"), "folder": config.get_ref("videos"), "train": True, **source}
    config.stages = (
        stage(
            task="instructed",
            epochs=epochs,
            batch_size=batch,
            sources=(source,),
            frames=(source["num_frames"],),
            text=text,
        ),
    )
    return config


def _world(config, variant: str):
    config.optim.rule = "muon"
    config.optim.lr = 3e-3
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.05
    config.optim.floor = 0.02
    # Nothing is forgotten while it learns, so that one look at all frames does for a look after each.
    config.adacm2.alpha = config.adacm2.beta = 1.0
    config.remat = "none"
    config.frame_positions.initial = "waves"
    if variant == "smoke":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config.model = {
            "model_type": "instructblip",
            "num_query_tokens": 4,
            "vision_config": sizes | {"image_size": 28, "patch_size": 14},
            "qformer_config": QFORMER | sizes,
            "text_config": {"model_type": "llama", "rms_norm_eps": 1e-6, **sizes},
        }
        config.adacm2.alpha = config.adacm2.beta = 0.5
        config.frame_positions.count = 64
        config.stages = (_questions(steps=4, batch_size=2, seconds=4.0, asked=4, size=28),)
        config.eval = _held_out(every=4, batches=1, batch_size=2, seconds=4.0, size=28)
        config.save.every = 2
        config.log_every = 1
        config.optim.warmup = 1
        return config
    config.eval = _held_out(every=400, batches=16, batch_size=5, seconds=16.0)
    config.save.every = 200
    config.save.dtype = "bfloat16"
    config.benchmark = {"seconds": 16.0, "fps": FPS, "size": SIZE, "level": "clear", "families": FAMILIES}
    if variant == "policy":
        config.adacm2.alpha, config.adacm2.beta = 0.1, 0.9
        config.optim.lr = 1e-3
        config.optim.warmup = 5
        config.remat = "full"
        config.stages = (_questions(steps=60, batch_size=2, seconds=16.0, asked=8),)
        config.eval.every = 0
        return config
    config.model = {"model_type": "instructblip", "num_query_tokens": QUERIES, "qformer_config": QFORMER}
    towers = config.get_ref("towers")
    config.parts = (
        {"to": "vision", "source": towers, "part": "vision"},
        {"to": "text", "source": towers, "part": "text"},
        {"to": "qformer", "source": towers, "part": "bert", "new": FRESH},
    )
    config.frame_positions.count = 2048
    # First the Q-Former learns to find what answers a question, and to tell it as the towers tell facts.
    config.stages = (
        _questions(steps=300, batch_size=6, seconds=4.0, asked=8, task="telling"),
        _questions(steps=1500, batch_size=5, seconds=16.0, asked=8, task="telling"),
        _questions(steps=1500, batch_size=5, seconds=16.0, asked=8),
    )
    config.assets = "adacm2_world"
    config.optim.warmup = 100
    return config


def _questions(steps: int, batch_size: int, seconds: float, asked: int, size: int = SIZE, task: str = "instructed"):
    """Half of the videos stand later and wider apart than they are, so that later frame positions are learned too."""
    source = {"kind": "telling" if task == "telling" else "world", "count": 10_000_000, "seconds": (seconds,)}
    source |= {
        "size": (size, size),
        "questions": asked,
        "temporal": 1,
        "offset": 384,
        "stride": 2,
        "families": FAMILIES,
    }
    return stage(
        task=task,
        steps=steps,
        batch_size=batch_size,
        sources=(source,),
        frames=(int(seconds * FPS),),
        text=(68,),
    )


def _held_out(every: int, batches: int, batch_size: int, seconds: float, size: int = SIZE) -> dict:
    source = {"kind": "world", "count": 1000, "split": "validation", "seconds": (seconds,), "size": (size, size)}
    return {
        "every": every,
        "task": "instructed",
        "batches": batches,
        "batch_size": batch_size,
        "sources": (source | {"questions": 8, "temporal": 1, "families": FAMILIES},),
        "frames": (int(seconds * FPS),),
        "text": (68,),
    }
