"""Asking about one video, with an account as plain data: what `longvid ask` and `longvid demo` are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from longvid_jax.systems.base import VideoModel
from longvid_jax.systems.results import Answer, Trace
from longvid_jax.systems.retake import RetakeModel
from longvid_jax.video import Video

MARKED = 0.5  # a temporal patch is a keyframe if DPSelect marks at least this share of it


def ask(
    model: RetakeModel,
    video: Video,
    questions: Sequence[str],
    *,
    progress: Callable[[int], None] | None = None,
    **decoding,
) -> tuple[list[Answer], dict]:
    """Watches a video once, answers all questions, and describes what happened.

    Args:
      progress: called with the number of frames of each window that was watched.
      decoding: as for `VideoModel.answer`.

    Returns:
      The answers, and a dict ready for JSON: answers, video, method, trace (of the first answer) and seconds a stage.
    """
    answers = model.ask(video, list(questions), profile=True, progress=progress, **decoding)
    first = answers[0].trace
    return answers, {
        "answers": [
            {"question": question, "text": answer.text, "tokens": answer.tokens[0].tolist()}
            for question, answer in zip(questions, answers, strict=True)
        ],
        "video": describe_video(model, video),
        "method": {"name": "none"} if model.method is None else {"name": "retake", **dataclasses.asdict(model.method)},
        "trace": describe_trace(first),
        "seconds": dict(first.seconds),
    }


def describe_video(model: VideoModel, video: Video) -> dict:
    """A watched video as plain data: its own size and length, what was planned, what was decoded of it."""
    probe, report = video.probe, video.report
    return {
        "path": video.name,
        "duration": probe.duration,
        "width": probe.width,
        "height": probe.height,
        "fps": probe.fps,
        "codec": probe.codec,
        "planned": len(video),
        "frames": report.samples,
        "damaged": report.damaged,
        "report": str(report),
        "frame_size": list(model.frame_size(video)),
    }


def describe_trace(trace: Trace) -> dict:
    """The trace of one video (B = 1) as plain data; patches are temporal ones, in time order."""
    patches = None
    if trace.keyframes is not None:
        patches = [
            {"time": float(time), "share": float(share), "change": float(change)}
            for time, share, change in zip(trace.times[0], trace.keyframes[0], trace.change[0], strict=True)
        ]
    return {
        "frames": int(trace.frames[0]),
        "tokens": int(trace.tokens[0]),
        "tokens_kept": int(sum(chunk.kept[0] for chunk in trace.chunks)),
        "grid": list(trace.grid),
        "cache_length": int(trace.cache_length[0]),
        "cache_bytes": trace.cache_bytes,
        "cache_bytes_uncompressed": trace.cache_bytes_uncompressed,
        "cache_capacity": trace.cache_capacity,
        "kept_count": trace.kept_count[..., 0].tolist(),
        "times": [float(time) for time in trace.times[0]],
        "patches": patches,
        "keyframes": None if patches is None else [patch for patch in patches if patch["share"] >= MARKED],
    }


def kept_share(trace: Trace) -> np.ndarray:
    """float [L, T]: the share of each temporal patch's tokens that each layer keeps, of one video (B = 1)."""
    per_patch = int(np.prod(trace.grid))
    layers = []
    for layer in trace.kept:
        counts = []
        for indices, chunk in zip(layer, trace.chunks, strict=True):
            real = indices[0, : int(chunk.kept[0])]
            counts.append(np.bincount(real // per_patch, minlength=int(chunk.patches[0])))
        layers.append(np.concatenate(counts))
    return np.stack(layers) / per_patch
