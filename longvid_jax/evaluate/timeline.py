"""A watched video as a figure: what DPSelect marked, how much the picture changed, what each layer kept when."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from longvid_jax.errors import OptionError
from longvid_jax.evaluate.ask import MARKED, kept_share
from longvid_jax.systems.results import Trace
from longvid_jax.video import Video

WIDTH, MARGIN = 7.2, 0.68  # inches: a page's width; the margin left of the axes, where their labels are
AXES = 5.84  # inches, width of the axes
THUMBNAILS = 7
ACCENT, INK, FAINT = "#c8442b", "#33383d", "#9aa1a8"
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)  # seconds between ticks


def check(path: str | os.PathLike) -> None:
    """Raises OptionError unless a figure can be written to `path`: to be asked before hours of video are watched."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError(
            "The figure needs matplotlib, which is not installed; pip install 'longvid_jax[viz]'."
        ) from None
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise OptionError(f"{path} cannot be a figure: its name must end in .png, .pdf or .svg.")
    if not path.parent.is_dir() or path.is_dir():
        raise OptionError(
            f"{path} cannot be written: {path.parent} must be a folder that exists, and {path} a file in it."
        )


def plot(trace: Trace, video: Video, path: str | os.PathLike) -> Path:
    """Writes the timeline of one watched video (B = 1) and returns its path.

    From the top: frames at the strongest key frames; DPSelect's distance of each temporal patch to its predecessor,
    with dots where at least half of a patch is marked; the share of each patch's tokens that each layer kept. Without
    DPSelect the frames are evenly spaced and the distance is left out. Raises OptionError as `check` does.
    """
    check(path)
    from matplotlib.figure import Figure

    times = trace.times[0]
    edges = np.append(times, max(video.probe.duration, times[-1] + 1e-3))
    shown = _moments(trace)
    frames, (thumb_width, thumb_height) = _thumbnails(video, shown)
    heights = {"frames": thumb_height, "link": 0.32, "change": 0.95, "gap": 0.16, "kept": 0.95}
    if trace.change is None:
        heights["change"] = heights["gap"] = 0
    height = 0.38 + sum(heights.values()) + 0.48
    figure = Figure(figsize=(WIDTH, height))

    def axes(top: float, tall: float, left: float = MARGIN, wide: float = AXES):
        return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, wide / WIDTH, tall / height))

    top = 0.38
    figure.text(MARGIN / WIDTH, 1 - 0.08 / height, _summary(trace, video), fontsize=7, color=FAINT, va="top")
    slots = _draw_frames(axes, top, frames, shown, thumb_width, thumb_height)
    top += heights["frames"] + heights["link"]
    if trace.change is not None:
        change = axes(top, heights["change"])
        _draw_change(change, trace, shown)
        change.set_xlim(edges[0], edges[-1])
        label = (MARGIN + AXES) / WIDTH, 1 - 0.08 / height
        figure.text(*label, "\N{BLACK CIRCLE} key frame", fontsize=7, color=ACCENT, va="top", ha="right")
        top += heights["change"] + heights["gap"]
    kept = axes(top, heights["kept"])
    bar = axes(top, heights["kept"], MARGIN + AXES + 0.1, 0.09)
    _draw_kept(kept, bar, edges, kept_share(trace))
    _link(figure, slots, shown, kept if trace.change is None else change)
    return _save(figure, Path(path))


def clock(seconds: float) -> str:
    """3:07, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _moments(trace: Trace) -> np.ndarray:
    """Ascending seconds of the frames to show: the key frames where most changes, or evenly spread ones."""
    times = trace.times[0]
    if trace.keyframes is None:
        return times[np.unique(np.linspace(0, len(times) - 1, THUMBNAILS).round().astype(int))]
    marked = np.flatnonzero(trace.keyframes[0] >= MARKED)
    marked = marked[marked > 0]  # the first patch has no predecessor: its distance is 1 by definition
    strongest = marked[np.argsort(-trace.change[0][marked], kind="stable")[: THUMBNAILS - 1]]
    return times[np.sort(np.append(strongest, 0))]


def _thumbnails(video: Video, times: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Frames at these times, and their width and height on the page."""
    probe = video.probe
    wide = (AXES - 0.06 * (THUMBNAILS - 1)) / THUMBNAILS
    tall = min(wide * probe.height / probe.width, 1.1)
    wide = tall * probe.width / probe.height
    return video.read(times, (round(400 * tall), round(400 * wide))), (wide, tall)


def _summary(trace: Trace, video: Video) -> str:
    kept = sum(int(chunk.kept[0]) for chunk in trace.chunks)
    name = Path(video.name).name
    return f"{name}   {int(trace.frames[0]):,} frames, {int(trace.tokens[0]):,} tokens, {kept:,} kept in each layer"


def _draw_frames(axes, top: float, frames: np.ndarray, times: np.ndarray, wide: float, tall: float) -> list:
    """A strip of frames with their times, spread over the width; returns its axes."""
    gap = (AXES - wide * len(frames)) / max(len(frames) - 1, 1)
    slots = []
    for n, (frame, time) in enumerate(zip(frames, times, strict=True)):
        slot = axes(top, tall, MARGIN + n * (wide + gap), wide)
        slot.imshow(frame, aspect="auto", interpolation="lanczos")
        slot.set(xticks=[], yticks=[])
        slot.spines[:].set(linewidth=0.5, color=INK)
        slot.set_title(clock(time), fontsize=7, color=INK, pad=2)
        slots.append(slot)
    return slots


def _draw_change(axes, trace: Trace, shown: np.ndarray) -> None:
    times, change, share = trace.times[0], trace.change[0].copy(), trace.keyframes[0]
    change[0] = np.nan
    axes.fill_between(times, change, color=FAINT, alpha=0.35, linewidth=0)
    axes.plot(times, change, color=INK, linewidth=0.7)
    marked = (share >= MARKED) & np.isfinite(change)
    size = np.clip(900 / max(len(times), 1), 3, 14)
    axes.scatter(times[marked], change[marked], s=size, color=ACCENT, linewidths=0, zorder=3, clip_on=False)
    top = max(1.12 * np.nanmax(change, initial=0.0), 1e-6)
    height = np.nan_to_num(change[np.isin(times, shown)])
    axes.vlines(shown, height, top, color=FAINT, linewidth=0.5, clip_on=False)
    axes.set_ylim(0, top)
    axes.set_ylabel("change\n(1 \N{MINUS SIGN} cos)", fontsize=7.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks([])
    _style(axes)


def _draw_kept(axes, bar, edges: np.ndarray, share: np.ndarray) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter

    layers = np.arange(share.shape[0] + 1) - 0.5
    mesh = axes.pcolormesh(edges, layers, share, cmap="viridis", vmin=0, vmax=max(share.max(), 1e-6), rasterized=True)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylabel("layer", fontsize=7.5, color=INK)
    axes.set_xlabel("time (min:sec)", fontsize=7.5, color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    span = edges[-1] - edges[0]
    axes.xaxis.set_major_locator(MultipleLocator(next((step for step in STEPS if span / step <= 10), span / 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: clock(value)))
    axes.figure.colorbar(mesh, cax=bar, format=PercentFormatter(1, 0))
    bar.set_title("kept", fontsize=7, color=INK, pad=3)
    bar.yaxis.set_major_locator(MaxNLocator(4))
    bar.spines[:].set_visible(False)
    _style(axes)
    _style(bar)


def _style(axes) -> None:
    axes.tick_params(labelsize=7, colors=INK, width=0.5, length=2.5)
    axes.yaxis.set_label_coords(-0.36 / AXES, 0.5)
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color=INK)


def _link(figure, slots: list, times: np.ndarray, below) -> None:
    """Thin lines from the frames to their moments."""
    from matplotlib.patches import ConnectionPatch

    for slot, time in zip(slots, times, strict=True):
        figure.add_artist(
            ConnectionPatch(
                (0.5, 0), (time, 1), slot.transAxes, below.get_xaxis_transform(), color=FAINT, linewidth=0.5
            )
        )


def _save(figure, path: Path) -> Path:
    """Under another name first, so that no half figure is ever there."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(unfinished, dpi=200)
        os.replace(unfinished, path)
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path
