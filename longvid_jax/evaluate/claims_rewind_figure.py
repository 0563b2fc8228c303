"""The figure of `longvid bench claims --system rewind`: accuracy by length, and which needles are found."""

from __future__ import annotations

from pathlib import Path

from longvid_jax.evaluate.claims_figure import INK, style
from longvid_jax.evaluate.claims_rewind import BEST, FEWER, LONG, MEMORY, NONE, REWIND, WAYS, method

STYLE = {  # colour, line, marker
    NONE: ("#33383d", ":", "s"),
    MEMORY: ("#2f6690", "-", "^"),
    REWIND: ("#c8442b", "-", "o"),
    FEWER: ("#b5851d", "-.", "v"),
    BEST: ("#3a7d5c", "--", "D"),
}
FOUND = {
    "candidates": (f"{method().num_candidates} candidates", "#b5851d", "s"),
    "selected": (f"{method().num_selected} selected", "#c8442b", "o"),
    "relevant": (f"{method().num_selected} most relevant", "#2f6690", "^"),
}
MEASURES = {"all": "right, all", "when IoU": "mean IoU of when"}


def draw(found: dict, path: Path) -> Path:
    """A panel a measure, a line a way with its intervals; and one of recall by the frames that show a needle."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    measures = [name for name in MEASURES if any(row["measure"] == name for row in found["rows"])]
    count = len(measures) + bool(found["spans"])
    figure = Figure(figsize=(2.9 * count + 0.4, 3.0), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=False):
        for way, (colour, line, marker) in STYLE.items():
            mine = [row for row in found["rows"] if row["way"] == way and row["measure"] == measure]
            bounds = [(row["value"], row["low"], row["high"]) for row in mine]
            _line(axes, [row["length"] for row in mine], bounds, WAYS[way].says, colour, line, marker)
        _ticks(axes, sorted({row["length"] for row in found["rows"]}), "{}x")
        axes.set_title(MEASURES[measure], fontsize=7.5, color=INK)
        axes.set_xlabel(f"times {found['setup']['seconds']:g} seconds", fontsize=7.5, color=INK)
        if measure == "all":
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    if measures:  # in the last of them, whose lines fall from the upper left
        axes.legend(fontsize=5.5, frameon=False, loc="upper right")
    if found["spans"]:
        axes = panels[-1]
        spans = [one["span"] for one in found["spans"]]
        for name, (says, colour, marker) in FOUND.items():
            _line(axes, spans, [one[name] for one in found["spans"]], says, colour, "-", marker)
        _ticks(axes, spans, "{}")
        axes.set_title("needles found", fontsize=7.5, color=INK)
        axes.set_xlabel(f"sampled frames that show it, of {LONG}", fontsize=7.5, color=INK)
        axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.legend(fontsize=5.5, frameon=False)
    figure.savefig(path, dpi=200)
    return path


def _line(axes, places, bounds, says: str, colour: str, line: str, marker: str) -> None:
    """Values with the ends of their intervals, (value, low, high) each."""
    values = [value for value, *_ in bounds]
    errors = [
        [max(0.0, value - low) for value, low, _ in bounds],
        [max(0.0, high - value) for value, _, high in bounds],
    ]
    axes.errorbar(
        places, values, yerr=errors, color=colour, linestyle=line, marker=marker, markersize=3, linewidth=0.9,
        elinewidth=0.6, label=says,
    )  # fmt: skip


def _ticks(axes, places, says: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: says.format(f"{value:g}")))
    style(axes)
