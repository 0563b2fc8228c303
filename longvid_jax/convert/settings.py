"""What a checkpoint's folder says beside its weights: special tokens, pixel limits, when to stop."""

import dataclasses
import json
from pathlib import Path

from longvid_jax.errors import CheckpointError
from longvid_jax.video.preprocess import MAX_PIXELS, MIN_PIXELS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Run-time constants of a checkpoint that sees."""

    video_token: int | None  # stands for what is seen; an InstructBLIP may have none, and sees before all words
    image_token: int | None
    stop_tokens: tuple[int, ...]
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    size: tuple[int, int] | None = None  # height and width of all frames, where the model has one size

    @classmethod
    def from_folder(cls, folder: Path, config: dict) -> "Settings":
        """Reads config.json (given), generation_config.json and the processor's file, of either generation."""
        video_token = config.get("video_token_id", config.get("image_token_index"))
        if video_token is None and config.get("model_type") == "qwen2_vl":
            raise CheckpointError(
                "config.json has no 'video_token_id', without which a video has no place in a prompt; add it."
            )
        generation = _read(folder / "generation_config.json")
        text = {**config, **config.get("text_config", {})}
        stop = generation.get("eos_token_id", text.get("eos_token_id"))
        stop = [] if stop is None else [stop] if isinstance(stop, int) else stop
        images = _read(folder / "preprocessor_config.json")
        videos = {**images, **_read(folder / "video_preprocessor_config.json")}
        size = videos.get("size") or {}
        return cls(
            video_token=video_token,
            image_token=config.get("image_token_id"),
            stop_tokens=tuple(stop),
            min_pixels=videos.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS,
            max_pixels=videos.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS,
            mean=tuple(videos.get("image_mean") or CLIP_MEAN),
            std=tuple(videos.get("image_std") or CLIP_STD),
            size=(size["height"], size["width"]) if {"height", "width"} <= size.keys() else None,
        )


def _read(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch it again or remove it.") from None
