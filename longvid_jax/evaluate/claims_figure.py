"""The figures of `longvid bench claims`: what keeping less costs, and where needles are found."""

from __future__ import annotations

from pathlib import Path

from longvid_jax.evaluate import claims
from longvid_jax.evaluate.compare import TIMELESS
from longvid_jax.evaluate.timeline import clock

INK, FAINT = "#33383d", "#9aa1a8"

STYLE = {  # colour, line, marker
    "retake": ("#c8442b", "-", "o"),
    "not reforged": ("#e0957f", "--", "o"),
    "pivotkv": ("#b5851d", "-", "s"),
    "dpselect": ("#3a7d5c", "-", "D"),
    "uniform": ("#2f6690", "-", "^"),
    "uniform pairs": ("#81a9c6", "--", "^"),
    "random": ("#7b5a9e", "-", "v"),
}
MEASURES = ("all", TIMELESS, "when IoU")
NAMES = {"plain": "everything kept", "retake": "ReTaKe", "budget": "ReTaKe"}


def accuracy(found: dict, path: Path) -> Path:
    """A column a length, a row a measure: means by share kept, with the intervals of differences to keeping all."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows, seconds = found["rows"], found["setup"]["seconds"]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    measures = [measure for measure in MEASURES if any(row["measure"] == measure for row in rows)]
    figure = Figure(figsize=(2.3 * len(lengths) + 0.7, 1.9 * len(measures) + 0.9), layout="constrained")
    grid = figure.subplots(len(measures), len(lengths), squeeze=False, sharex=True, sharey="row")
    for line, measure in zip(grid, measures, strict=True):
        for axes, length in zip(line, lengths, strict=True):
            _panel(axes, [row for row in rows if row["length"] == length and row["measure"] == measure])
        if measure == "when IoU":
            line[0].set_ylabel("mean IoU of when", fontsize=7.5, color=INK)
        else:
            line[0].set_ylabel(f"right, {measure}", fontsize=7.5, color=INK)
            line[0].yaxis.set_major_formatter(PercentFormatter(1, 0))
    for axes, length in zip(grid[0], lengths, strict=True):
        axes.set_title(f"{clock(length * seconds)}, {length}x", fontsize=8, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("share of the video that is kept", fontsize=7.5, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(path, dpi=200)
    return path


def _panel(axes, rows: list[dict]) -> None:
    """One measure at one length, a line a way."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    plain = next(row for row in rows if row["way"] == claims.PLAIN_WAY)
    axes.axhline(plain["value"], color=INK, linewidth=0.8, linestyle=":", label="everything kept")
    for n, (way, (colour, line, marker)) in enumerate(STYLE.items()):
        mine = sorted((row for row in rows if row["way"] == way), key=lambda row: row["ratio"])
        if not mine:
            continue
        axes.errorbar(
            [row["ratio"] * 1.025 ** (n - len(STYLE) / 2) for row in mine],  # side by side
            [row["value"] for row in mine],
            [
                [max(0.0, row["to_plain"] - row["to_plain_low"]) for row in mine],
                [max(0.0, row["to_plain_high"] - row["to_plain"]) for row in mine],
            ],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=3,
            linewidth=0.9,
            elinewidth=0.6,
            label=claims.WAYS[way].says,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["ratio"] for row in rows if row["ratio"] < 1})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    style(axes)


def needles(found: dict, path: Path) -> Path:
    """A panel a way: the share of needles found, by depth and length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    ways = list(found["accuracy"])
    figure = Figure(figsize=(2.5 * len(ways) + 0.9, 2.6), layout="constrained")
    panels = figure.subplots(1, len(ways), squeeze=False, sharey=True)[0]
    for axes, way in zip(panels, ways, strict=True):
        values = found["accuracy"][way]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                shade = "white" if value < 0.6 else INK
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=shade)
        kept = {"plain": "", "retake": f", {found['keep_ratio']:g} kept", "budget": f", {found['budget']:,} tokens"}
        axes.set_title(NAMES[way] + kept[way], fontsize=8, color=INK)
        axes.set_xticks(range(len(found["seconds"])), [clock(seconds) for seconds in found["seconds"]])
        axes.set_yticks(range(len(found["depths"])), [f"{depth:.0%}" for depth in found["depths"]])
        axes.set_xlabel("length (min:sec)", fontsize=7.5, color=INK)
        style(axes)
    panels[0].set_ylabel("depth of the needle", fontsize=7.5, color=INK)
    bar = figure.colorbar(image, ax=panels, format=PercentFormatter(1, 0), shrink=0.9)
    bar.ax.tick_params(labelsize=7, colors=INK)
    bar.set_label(f"found (guessing: {found['chance']:.0%})", fontsize=7, color=INK)
    figure.savefig(path, dpi=200)
    return path


def style(axes) -> None:
    """Small, quiet axes."""
    axes.tick_params(labelsize=7, colors=INK, width=0.5, length=2.5)
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color=FAINT)
