"""Asking about one video, with an account as plain data: what `longvid ask` and `longvid demo` are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import singledispatch

import numpy as np

from longvid_jax.systems.base import VideoModel
from longvid_jax.systems.results import Account, AdaCM2Trace, Answer, RewindTrace, Trace
from longvid_jax.video import Video

MARKED = 0.5  # a temporal patch is a keyframe if DPSelect marks at least this share of it


def ask(
    model: VideoModel,
    video: Video,
    questions: Sequence[str],
    *,
    progress: Callable[[int], None] | None = None,
    **decoding,
) -> tuple[list[Answer], dict]:
    """Watches a video once (or, where a system must, once a question), answers all, and describes what happened.

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
        "method": describe_method(model),
        "trace": describe_trace(first),
        "seconds": dict(first.seconds),
    }


def describe_method(model: VideoModel) -> dict:
    """The run-time choices of a model as plain data; `name` is that of the command line."""
    if model.method is None:
        return {"name": "none"}
    choices = dataclasses.asdict(model.method)
    if choices.get("carry_queries", True) is None:  # as the checkpoint was trained
        choices["carry_queries"] = model.carry_queries
    return {"name": type(model.method).__name__.lower(), **choices}


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


@singledispatch
def describe_trace(trace: Account) -> dict:
    """The trace of one video (B = 1) as plain data."""
    raise TypeError(f"no trace of a system: {trace!r}")


@singledispatch
def in_words(trace: Account) -> str:
    """What became of one video (B = 1), as a line."""
    raise TypeError(f"no trace of a system: {trace!r}")


# --- ReTaKe -----------------------------------------------------------------------------------------------------------


@describe_trace.register
def _(trace: Trace) -> dict:
    """Patches are temporal ones, in time order."""
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


@in_words.register
def _(trace: Trace) -> str:
    kept = sum(int(chunk.kept[0]) for chunk in trace.chunks)
    return (
        f"{int(trace.frames[0])} frames became {int(trace.tokens[0]):,} tokens, {kept:,} of which were kept: "
        f"{_megabytes(trace.cache_bytes)} MB of cache instead of {_megabytes(trace.cache_bytes_uncompressed)} MB"
    )


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


# --- AdaCM2 -----------------------------------------------------------------------------------------------------------


@describe_trace.register
def _(trace: AdaCM2Trace) -> dict:
    """held: the moments of which any layer holds tokens, with how many of each layer's."""
    counts = held_counts(trace)
    return {
        "frames": int(trace.frames[0]),
        "tokens": int(trace.frames[0]) * trace.tokens,
        "tokens_held": counts.sum(1).tolist(),
        "grid": list(trace.grid),
        "cache_bytes": held_bytes(trace),
        "cache_bytes_uncompressed": trace.cache_bytes_uncompressed,
        "cache_bytes_allocated": trace.cache_bytes,
        "cache_capacity": trace.capacity,
        "held": [
            {"frame": int(frame), "time": float(trace.times[0, frame]), "tokens": counts[:, frame].tolist()}
            for frame in np.flatnonzero(counts.any(0))
        ],
    }


@in_words.register
def _(trace: AdaCM2Trace) -> str:
    least, most = int(held_counts(trace).sum(1).min()), int(held_counts(trace).sum(1).max())
    held = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return (
        f"{int(trace.frames[0])} frames became {int(trace.frames[0]) * trace.tokens:,} tokens, {held} of which each "
        f"layer holds: {_megabytes(held_bytes(trace))} MB of cache instead of "
        f"{_megabytes(trace.cache_bytes_uncompressed)} MB"
    )


def held_bytes(trace: AdaCM2Trace) -> int:
    """What keys and values of the tokens that are held take, all layers together: of what is allocated, that much."""
    places = trace.capacity * np.asarray(trace.length).size
    return trace.cache_bytes // places * int(np.asarray(trace.length).sum())


def held_counts(trace: AdaCM2Trace) -> np.ndarray:
    """int [L, T]: how many tokens of each frame each layer holds, of one video (B = 1)."""
    frames = int(trace.frames[0])
    return np.stack([np.bincount(rows[0][:, 0], minlength=frames) for rows in trace.kept])


def held_places(trace: AdaCM2Trace) -> np.ndarray:
    """int [L, P]: how many tokens from each place of a frame each layer holds (B = 1): 0 the class token, patches."""
    return np.stack([np.bincount(rows[0][:, 1], minlength=trace.tokens) for rows in trace.kept])


# --- ReWind -----------------------------------------------------------------------------------------------------------


@describe_trace.register
def _(trace: RewindTrace) -> dict:
    """selected: the frames looked at in detail, in time order; candidates: those they were chosen from."""
    frames, scores = int(trace.frames[0]), trace.relevance[0]
    chosen = {
        name: [{"frame": int(n), "time": float(trace.times[0, n]), "relevance": float(scores[n])} for n in frames_of[0]]
        for name, frames_of in (("candidates", trace.candidates), ("selected", trace.selected))
    }
    return {
        "frames": frames,
        "tokens": frames * int(np.prod(trace.grid)),
        "tokens_kept": frames * trace.tokens,
        "grid": list(trace.grid),
        "cache_bytes": trace.cache_bytes,
        "cache_bytes_uncompressed": trace.cache_bytes_uncompressed,
        "detail_bytes": trace.detail_bytes,
        "capacity": trace.capacity,
        "relevance": scores.tolist(),
        **chosen,
    }


@in_words.register
def _(trace: RewindTrace) -> str:
    frames = int(trace.frames[0])
    return (
        f"{frames} frames became {frames * trace.tokens:,} tokens in a memory of {_megabytes(trace.cache_bytes)} MB; "
        f"{len(trace.selected[0])} of them were looked at again in detail"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{1 if count >= 1e5 else 3}f}"
