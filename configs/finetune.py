"""longvid train --config configs/finetune.py:lora --workdir DIR --config.checkpoint=Qwen/Qwen2-VL-7B-Instruct --config.data=talks.json --config.videos=FOLDER

Fine-tunes a converted folder, a Hugging Face folder or a hub id on conversations in LLaVA's layout (config.data, see
longvid_jax.data.conversations), whose paths of videos start at config.videos.

Variants: full, lora, vision_frozen for Qwen2-VL; llama for a Llama, Vicuna or Qwen2, on conversations without videos.
"""  # noqa: E501

from longvid_jax.train.config import base, stage

VARIANTS = ("full", "lora", "vision_frozen", "llama")


def get_config(variant: str = "lora"):
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}, but {', '.join(VARIANTS)}")
    config = base()
    config.compute_dtype = "bfloat16"
    config.save.dtype = "bfloat16"
    config.remat = "full"
    config.optim.lr = 2e-4 if variant == "lora" else 1e-5
    config.optim.warmup = 30
    config.optim.weight_decay = 0.0

    decoder = "" if variant == "llama" else "text/"
    if variant == "lora":
        config.lora.rank = 16
        config.lora.alpha = 32.0
        config.lora.patterns = (f"{decoder}layers/attention/(q|k|v|o)", f"{decoder}layers/mlp/(gate|up|down)")
    if variant == "vision_frozen":
        config.frozen = ("vision/.*",)

    source = {"kind": "conversations", "file": config.get_ref("data"), "folder": config.get_ref("videos")}
    source |= {"size": (252, 448), "fps": 1.0, "max_frames": 64}
    if variant == "llama":
        source = {"kind": "text", "file": config.get_ref("data")}
    config.stages = (
        stage(
            steps=1000,
            batch_size=16,
            sources=(source,),
            frames=() if variant == "llama" else (16, 32, 64),
            text=(512, 1024, 2048),
        ),
    )
    config.accumulate = 4
    return config
