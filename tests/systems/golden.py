"""The authors' ReTaKe cases (tests/golden/retake), in the forms in which the tests ask for them."""

import json
from pathlib import Path

import numpy as np
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import longvid_jax as lv
from longvid_jax.convert.settings import CLIP_MEAN, CLIP_STD

FOLDER = Path(__file__).parents[1] / "golden" / "retake"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def method(name: str, **changes) -> lv.ReTaKe:
    """The settings of a case, from the authors' words to ours.

    Its YaRN setting is left out: the keys of that case are those of plain rotation to 1e-7 (see test_yarn_was_off...).
    """
    settings = json.loads((FOLDER / name / "retake.json").read_text())["longvideo_kwargs"]
    compression, selection = settings["kvcache_compression_kwargs"], settings.get("visual_compression_kwargs")
    if compression.get("dynamic_compression_ratio"):
        share = {"budget": compression["max_input_length"]}
    else:
        share = {"keep_ratio": compression["compression_ratio"]}
    choices = dict(
        share,
        chunk_frames=settings["chunked_prefill_frames"],
        dpselect=None if selection is None else "frame" if selection["patch_sync"] else "patch",
        reforge=compression["pos_embed_reforge"],
    )
    return lv.ReTaKe(**{**choices, **changes})


def vectors(name: str) -> dict[str, np.ndarray]:
    """golden.npz of a case."""
    with np.load(FOLDER / name / "golden.npz") as file:
        return dict(file)


def inputs(vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arguments of generate()."""
    names = ("input_ids", "pixel_values_videos", "video_grid_thw")
    return {name: vectors[name].astype(np.float32) if "pixel" in name else vectors[name] for name in names}


def frames(vectors: dict[str, np.ndarray], patch: int = 4) -> np.ndarray:
    """The case's patches as frames float32 [T, H, W, 3] of 0..255 (not whole numbers, as the case is random)."""
    t, h, w = vectors["video_grid_thw"][0]
    pixels = rearrange(
        vectors["pixel_values_videos"].astype(np.float32),
        "(t h w mh mw) (c f p q) -> (t f) (h mh p) (w mw q) c",
        t=t, h=h // 2, w=w // 2, mh=2, mw=2, c=3, f=2, p=patch,
    )  # fmt: skip
    return (pixels * np.float32(CLIP_STD) + np.float32(CLIP_MEAN)) * 255


def windows(pixels: np.ndarray, length: int):
    """Frames in windows of some length, one video, two frames a second."""
    for start in range(0, len(pixels), length):
        part = pixels[start : start + length]
        times = np.float32(np.arange(start, start + len(part)) / 2)
        yield lv.Frames(part[None], times[None], np.ones((1, len(part)), bool))


def with_tokenizer(model, vectors: dict[str, np.ndarray]):
    """Gives a model a tokenizer of words t0..t199 whose chat template makes the case's prompt; returns its question."""
    ids, video = vectors["input_ids"][0], model.settings.video_token
    first, last = np.flatnonzero(ids == video)[[0, -1]]
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(200)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    before = " ".join(f"t{i}" for i in ids[:first])
    model.tokenizer.chat_template = f"{before} t{video} {{{{ messages[0]['content'][1]['text'] }}}}"
    return " ".join(f"t{i}" for i in ids[last + 1 :])
