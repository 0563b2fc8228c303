"""longvid train --config configs/rewind.py:instruct --workdir DIR --config.checkpoint=REWIND --config.data=chat.json --config.videos=FOLDER

ReWind's stages (arXiv 2411.15556) on a checkpoint that `longvid assemble rewind --contrast-width 256` has made:

  pretrain  the perceiver alone learns which videos and captions belong together (SigLIP's loss); config.data is in
            MA-LMM's layout for captions, config.videos holds a file or a folder of frames a video
  instruct  perceiver, memory, projections and low-rank adapters of the Llama learn to answer; config.data is in LLaVA's
            layout (see longvid_jax.data.conversations)
  grounding the same go on learning when something happens, as "from 3 to 5 seconds"; config.data is ActivityNet
            Captions' or DiDeMo's own JSON (see longvid_jax.data.grounding)

Where the paper is silent, these have AdamW with weight decay 0.05 in pre-training and none later, a cosine to 0, clipping at 1,
adapters on all of attention; grounding at the learning rate of instruct.

tiny_pretrain, tiny_instruct, tiny_details, tiny_lengths, tiny_gaps, tiny_glimpses, tiny_looking, tiny_answers and
tiny_grounding are such stages on the made-up world, on towers that `configs/world_towers.py:tiny` has made, one on top of
the other:

  longvid train --config configs/rewind.py:tiny_pretrain --workdir runs/1 --config.towers=runs/towers/model
  longvid train --config configs/rewind.py:tiny_instruct --workdir runs/2 --config.towers=runs/towers/model \
    --config.checkpoint=runs/1/model

and so on. What the paper does not have, and what makes so small a model learn in so few steps: Muon; in most of
tiny_instruct memory learns to note down what happens in the vectors that the towers were told it in, and a loss draws
the question's attention to the frames that show what it is about; then answers are learned from memory and frames in
detail. Details are hardly looked at where memory does: in tiny_details answers come from the frames alone that show what
a question is about. tiny_lengths puts all of it together, on 16, 64 and 256 seconds in turns. From there on memory
stays as it is, and the decoder learns to answer from it and from details, which it has to look at where what memory holds of the
frames in question is left out (tiny_gaps). Selection brings one or two such frames among others, so these are learned
from alone (tiny_glimpses), then with memory and its gaps (tiny_looking), and at last more often without gaps (tiny_answers).

To compare with are tiny_none (no memory, 64 frames spread evenly), tiny_memory (8 frames spread evenly) and tiny_oracle
(8 frames that show it), each in the place of tiny_answers, with nothing left out. tiny_write_N (1, 2, 4: tokens
of a frame), tiny_queries_N (16, 32, 64) and tiny_fps_N (0.5, 1, 2) are tiny_instruct from the towers on, for an
accelerator.

smoke_pretrain, smoke_instruct and smoke_grounding take seconds there and learn next to nothing: to see that all of it
runs.
"""  # noqa: E501

from longvid_jax.train.config import base, stage

TOLD = ("memory_projection/.*", "detail_projection/.*", "separator")
OWN = ("perceiver/.*", "memory/.*", *TOLD)
ADAPTERS = ".*/lora_[ab]"
LORA = "text/layers/attention/[qkvo]"
FRAMES = (32, 64, 128, 256)  # of one a second
TEXT = (384, 512, 768, 1024, 1280)  # what stands for the video included: 2 vectors a frame and 257
SIZE = 28  # pixels of a frame's side, of the smoke variants
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMOKE = {
    "model_type": "rewind",
    "vision_config": SIZES | {"image_size": SIZE, "patch_size": 7},
    "bert_config": SIZES | {"max_position_embeddings": 64},
    "text_config": SIZES | {"model_type": "llama", "rms_norm_eps": 1e-6},
    "width": 32,
    "perceiver_layers": 1,
    "heads": 2,
    "num_queries": 4,
    "detail_tokens": 4,
    "contrast_width": 32,
}


WORLD = {"size": (56, 56), "temporal": 1}  # of its videos, two frames a second
CLIP = 8  # frames
FAMILIES = ("needle", "order", "count", "when", "state", "presence")
TINY = {
    "model_type": "rewind",
    "width": 160,  # more than the Llama's 128: a token has room for what only READ is told
    "perceiver_layers": 3,
    "heads": 5,
    "ff_width": 320,
    "num_queries": 8,
    "detail_tokens": 16,  # all patches: one frame has to be enough
    "contrast_width": 64,
}
# tiny_write_4 and so on: what tokens written of a frame, queries, and frames a second bring.
SWEEPS = {
    **{f"write_{n}": ("slots", n) for n in (1, 2, 4)},
    **{f"queries_{n}": ("num_queries", n) for n in (16, 32, 64)},
    **{f"fps_{fps}": ("fps", float(fps)) for fps in ("0.5", "1", "2")},
}
# Seconds, videos a step, steps with all of the memory and with gaps, and where these look.
MIXED = {
    "gaps": (
        (16.0, 4, 60, 60, "gaps_detailed"),
        (64.0, 1, 100, 50, "gaps_detailed"),
        (256.0, 1, 160, 50, "gaps_detailed"),
    ),
    "looking": ((16.0, 2, 60, 60, "gaps_glimpses"), (64.0, 1, 80, 80, "gaps"), (256.0, 1, 60, 30, "gaps")),
    "answers": ((16.0, 1, 80, 0, ""), (64.0, 1, 80, 50, "gaps"), (256.0, 1, 60, 30, "gaps")),
}
COMPARED = {
    "none": {"memory": False, "frames": "uniform", "num_selected": 64},
    "memory": {"frames": "uniform"},
    "oracle": {"frames": "oracle"},
}


def get_config(variant: str = "instruct"):
    config = base()
    config.remat = "full"
    config.compute_dtype = "bfloat16"
    config.save.dtype = "bfloat16"
    config.optim.weight_decay = 0.05 if variant.endswith("pretrain") else 0.0
    if variant.startswith("smoke_"):
        return _smoke(config, variant.removeprefix("smoke_"))
    if variant.startswith("tiny_"):
        return _tiny(config, variant.removeprefix("tiny_"))
    data = {"file": config.get_ref("data"), "folder": config.get_ref("videos")}
    if variant == "pretrain":
        config.trainable = ("perceiver/.*", "contrast/.*")
        config.optim.lr, config.optim.warmup = 1e-4, 500
        source = {"kind": "captions", **data, "num_frames": 32, "train": True}
        config.stages = (stage(task="contrast", steps=10_000, batch_size=64, sources=(source,), frames=(32,)),)
        return config
    if variant in ("instruct", "grounding"):
        config.trainable = (*OWN, ADAPTERS)
        config.lora.rank, config.lora.alpha, config.lora.patterns = 64, 32.0, (LORA,)
        config.optim.lr, config.optim.warmup = 5e-5, 2000 if variant == "instruct" else 500
        config.rewind.truncate = 4
        steps, kind = (100_000, "conversations") if variant == "instruct" else (15_000, "grounding")
        source = {"kind": kind, **data, "size": (224, 224), "fps": 1.0, "max_frames": FRAMES[-1]}
        config.stages = (
            stage(task="rewound", steps=steps, batch_size=64, sources=(source,), frames=FRAMES, text=TEXT),
        )
        return config
    raise _unknown(variant)


def _smoke(config, which: str):
    config.compute_dtype = config.save.dtype = "float32"
    config.remat = "none"
    config.model = SMOKE
    config.rewind.update({"clip_frames": 4, "num_candidates": 6, "num_selected": 2, "num_neighbors": 2})
    config.save.every = 2
    config.log_every = 1
    source = {"kind": "world", "count": 1000, "seconds": (4.0,), "size": (SIZE, SIZE), "temporal": 1}
    if which == "pretrain":
        config.trainable = ("perceiver/.*", "contrast/.*")
        one = source | {"questions": 1, "families": ("caption",)}
        config.stages = (stage(task="contrast", steps=4, batch_size=4, sources=(one,), frames=(8,)),)
        return config
    if which not in ("instruct", "grounding"):
        raise _unknown(f"smoke_{which}")
    config.trainable = (*OWN, ADAPTERS)
    config.lora.rank, config.lora.alpha, config.lora.patterns = 2, 4.0, (LORA,)
    several = source | {"questions": 4} | ({"families": ("when",)} if which == "grounding" else {})
    shapes = {"batch_size": 2, "frames": (8,), "text": (128,)}
    config.stages = (stage(task="rewound", steps=4, sources=(several,), **shapes),)
    held_out = several | {"split": "validation"}
    config.eval = {"every": 4, "task": "rewound", "batches": 1, "sources": (held_out,), **shapes}
    return config


def _tiny(config, which: str):
    config.compute_dtype = "float32"
    config.remat = "none"
    config.stacked, config.rewind.unroll = False, 4  # a third less time a step on a CPU
    config.optim.rule = "muon"
    config.optim.lr, config.optim.warmup, config.optim.floor = 3e-3, 100, 0.02
    config.optim.b2, config.optim.weight_decay = 0.99, 0.05
    config.save.every = 200
    config.benchmark = {"seconds": 16.0, "fps": 2.0, "size": 56, "level": "clear", "families": FAMILIES}
    towers = config.get_ref("towers")
    parts = tuple({"to": part, "source": towers, "part": part} for part in ("vision", "bert", "text"))
    if which == "pretrain":
        config.model, config.parts = TINY, parts
        config.trainable = ("perceiver/.*", "contrast/.*")
        captions = {"kind": "world", "count": 10_000_000, "seconds": (4.0,), "questions": 1, "families": ("caption",)}
        config.stages = (stage(task="contrast", steps=400, batch_size=48, sources=(WORLD | captions,), frames=(8,)),)
        return config
    config.trainable = (*OWN, ADAPTERS)
    config.lora.rank, config.lora.alpha, config.lora.patterns = 16, 16.0, (LORA,)
    how = {}
    if which in COMPARED:
        config.rewind.update(COMPARED[which])
    if which in SWEEPS:
        name, value = SWEEPS[which]
        config.benchmark.fps = value if name == "fps" else 2.0
        how = {name: value} if name in ("fps", "slots") else {}
        written = {"num_write": value} if name == "slots" else {name: value} if name == "num_queries" else {}
        config.model, config.parts = TINY | written, parts
    config.eval = _asked(batch_size=5, seconds=16.0, split="validation", count=1000, **how)
    config.eval.update({"every": 200, "batches": 8})
    if which in ("instruct", *SWEEPS):
        config.rewind.relevance = 0.1
        config.stages = (
            _asked(batch_size=6, seconds=4.0, steps=300, task="telling", **how),
            _asked(batch_size=4, seconds=16.0, steps=1000, task="telling", **how),
            _asked(batch_size=4, seconds=16.0, steps=600, **how),
        )
        return config
    if which == "details":
        config.optim.warmup = 20
        config.stages = (_asked(batch_size=6, seconds=16.0, steps=300, task="detailed", memory=False),)
        return config
    if which in ("lengths", "gaps", "glimpses", "looking", "answers", *COMPARED):
        config.optim.lr, config.optim.warmup = 2e-3 if which == "glimpses" else 1e-3, 20
        config.save.keep_best = 0  # evaluation is of 16 seconds alone
    if which == "lengths":
        config.rewind.relevance = 0.1
        config.stages = (
            _asked(batch_size=4, seconds=16.0, steps=160, group="lengths"),
            _asked(batch_size=4, seconds=16.0, steps=60, group="lengths", task="detailed", memory=False),
            _asked(batch_size=1, seconds=64.0, steps=110, group="lengths"),
            _asked(batch_size=1, seconds=64.0, steps=50, group="lengths", task="telling"),
            _asked(batch_size=1, seconds=256.0, steps=110, group="lengths", questions=2),
            _asked(batch_size=1, seconds=256.0, steps=50, group="lengths", questions=2, task="telling"),
        )
        return config
    # Details say neither when something is nor how often, so that it is not asked where memory has gaps.
    seen = tuple(family for family in FAMILIES if family not in ("when", "count"))
    if which in ("gaps", "glimpses", "looking", "answers", *COMPARED):
        config.trainable = (*TOLD, ADAPTERS)
    if which == "glimpses":
        config.stages = (_asked(batch_size=3, seconds=16.0, steps=500, task="glimpses", memory=False, families=seen),)
        return config
    if which in ("gaps", "looking", "answers", *COMPARED):
        config.assets = "rewind_world" if which == "answers" else ""
        stages = []
        for seconds, batch_size, whole, steps, task in MIXED.get(which, MIXED["answers"]):
            like = {"batch_size": batch_size, "seconds": seconds, "group": "answers", "memory": which != "none"}
            like |= {"questions": 4} if seconds == 256.0 else {}
            stages.append(_asked(steps=whole, **like))
            if steps:
                task = "rewound" if which in COMPARED else task
                stages.append(_asked(steps=steps, task=task, families=seen, **like))
        config.stages = tuple(stages)
        return config
    if which != "grounding":
        raise _unknown(f"tiny_{which}")
    config.optim.lr, config.optim.warmup = 1e-3, 20
    config.stages = (_asked(batch_size=4, seconds=16.0, steps=100, families=("when",)),)
    return config


def _asked(
    batch_size: int,
    seconds: float,
    *,
    task: str = "rewound",
    steps: int = 0,
    split: str = "train",
    count: int = 10_000_000,
    families: tuple = FAMILIES,
    questions: int = 8,
    fps: float = 2.0,
    slots: int = 2,
    group: str = "",
    memory: bool = True,
):
    """Questions about each world of so many seconds: a stage, or without steps an evaluation.

    Its source also knows what answers them, which "telling" and frames of an oracle ask for.
    """
    source = WORLD | {
        "kind": "telling",
        "count": count,
        "seconds": (seconds,),
        "questions": questions,
        "families": families,
    }
    source |= {"split": split, "fps": fps, "clip_frames": CLIP, "slots": slots}
    frames = int(fps * seconds)
    # The memory, a separator, details of 8 frames or of 64, and a question with its answer.
    text = tuple(
        memory * slots * -(-frames // CLIP) * CLIP + 1 + TINY["detail_tokens"] * detailed + 36 for detailed in (8, 64)
    )
    values = {"task": task, "batch_size": batch_size, "sources": (source,), "frames": (frames,), "text": text}
    return stage(steps=steps, group=group, **values) if steps else values


def _unknown(variant: str) -> ValueError:
    stages = ("pretrain", "instruct", "grounding")
    known = ", ".join(f"{kind}{name}" for kind in ("", "tiny_", "smoke_") for name in stages)
    known += ", " + ", ".join(
        f"tiny_{name}" for name in ("details", "lengths", "gaps", "glimpses", "looking", "answers", *COMPARED, *SWEEPS)
    )
    return ValueError(f"there is no variant {variant!r}, but {known}")
