"""The figures of `longvid bench claims --system adacm2`: memory by frames, accuracy by length, and the sweep."""

from __future__ import annotations

from pathlib import Path

from longvid_jax.evaluate.claims_adacm2 import ATTENTION, GIVEN, NONE, OWN, WAYS
from longvid_jax.evaluate.claims_figure import INK, style
from longvid_jax.evaluate.compare import TIMELESS

STYLE = {  # colour, line, marker
    NONE: ("#33383d", ":", "s"),
    ATTENTION: ("#c8442b", "-", "o"),
    "random": ("#7b5a9e", "-", "v"),
    "recent": ("#2f6690", "-", "^"),
    "shared": ("#b5851d", "--", "D"),
    "carried": ("#e0957f", "--", "o"),
    "generic": ("#3a7d5c", "-", "P"),
    "empty": ("#8ab89f", "-", "X"),
    "generic memory": ("#3a7d5c", "--", "P"),
}
MEASURES = ("all", TIMELESS, "when IoU")
GROUPS = {  # the parts that share a column, and what it is called
    "policies": ("accuracy",),
    "alpha = beta = 0.1": ("paper",),
    "own weights": ("own",),
    "variants": ("carried", "shared", "prompt"),
}


def memory(found: dict, path: Path) -> Path:
    """Bytes by frames, with and without eviction: the cache, and all that the compiled step takes."""
    from matplotlib.figure import Figure

    rows = found["rows"]
    kinds = [name for name in ("cache", "program") if all(row[name] is not None for row in rows)]
    says = {"cache": "keys and values", "program": "compiled step"}
    figure = Figure(figsize=(2.6 * len(kinds) + 0.6, 2.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for evicting, name, label in ((False, NONE, "nothing evicted"), (True, ATTENTION, "AdaCM2")):
            mine = [row for row in rows if row["evicting"] == evicting]
            colour, line, marker = STYLE[name]
            axes.loglog(
                [row["frames"] for row in mine],
                [row[kind] / 1e6 for row in mine],
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=3,
                linewidth=0.9,
                label=label,
            )
        axes.set_title(says[kind], fontsize=8, color=INK)
        axes.set_xlabel("frames watched", fontsize=7.5, color=INK)
        axes.set_ylabel("MB", fontsize=7.5, color=INK)
        axes.legend(fontsize=6.5, frameon=False)
        style(axes)
    figure.savefig(path, dpi=200)
    return path


def accuracy(found: dict, path: Path) -> Path:
    """A row a measure and a column a group of ways: means by length, with their intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = [row for row in found["rows"] if row["part"] != "sweep"]
    groups = {says: parts for says, parts in GROUPS.items() if any(row["part"] in parts for row in rows)}
    measures = [measure for measure in MEASURES if any(row["measure"] == measure for row in rows)]
    figure = Figure(figsize=(2.5 * len(groups) + 0.8, 1.9 * len(measures) + 1.1), layout="constrained")
    grid = figure.subplots(len(measures), len(groups), squeeze=False, sharex=True, sharey="row")
    labels = {}
    for line, measure in zip(grid, measures, strict=True):
        of_measure = [row for row in rows if row["measure"] == measure]
        for axes, (says, parts) in zip(line, groups.items(), strict=True):
            _panel(axes, [row for row in of_measure if row["part"] in parts or _everywhere(row)])
            labels |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            if measure == measures[0]:
                axes.set_title(says, fontsize=8, color=INK)
        line[0].set_ylabel(f"right, {measure}" if measure != "when IoU" else "mean IoU of when", fontsize=7.5)
        if measure != "when IoU":
            line[0].yaxis.set_major_formatter(PercentFormatter(1, 0))
    for axes in grid[-1]:
        axes.set_xlabel("times the trained length", fontsize=7.5, color=INK)
    figure.legend(
        labels.values(), labels, loc="outside lower center", ncols=min(3, 1 + len(groups)), fontsize=7, frameon=False
    )
    figure.savefig(path, dpi=200)
    return path


def _everywhere(row: dict) -> bool:
    """What is shown in every column to compare with."""
    return row["part"] == "accuracy" and row["way"] in (NONE, ATTENTION)


def _panel(axes, rows: list[dict]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        lines.setdefault((row["way"], row["part"] == "paper", row["weights"]), []).append(row)
    for n, ((way, tenth, weights), mine) in enumerate(lines.items()):
        colour, line, marker = STYLE[way]
        label = WAYS[way].says + ", alpha = beta = 0.1" * tenth + f", {OWN}" * (weights != GIVEN)
        axes.errorbar(
            [row["length"] * 1.03 ** (n - len(lines) / 2) for row in mine],  # side by side
            [row["value"] for row in mine],
            [
                [max(0.0, row["value"] - row["low"]) for row in mine],
                [max(0.0, row["high"] - row["value"]) for row in mine],
            ],
            color=colour,
            linestyle="--" if tenth or weights != GIVEN else line,
            marker=marker,
            markersize=3,
            linewidth=0.9,
            elinewidth=0.6,
            label=label,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["length"] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    style(axes)


def sweep(found: dict, path: Path) -> Path:
    """A panel a length: the share of right answers by alpha and beta, with the tokens that a layer holds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = [row for row in found["rows"] if row["part"] == "sweep" and row["measure"] == "all"]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    alphas, betas = (sorted({row[name] for row in rows}) for name in ("alpha", "beta"))
    low, high = min(row["value"] for row in rows), max(row["value"] for row in rows)
    figure = Figure(figsize=(0.55 * len(betas) * len(lengths) + 2.0, 0.5 * len(alphas) + 1.0), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axes, length in zip(panels, lengths, strict=True):
        of_length = {(row["alpha"], row["beta"]): row for row in rows if row["length"] == length}
        values = [[of_length[alpha, beta]["value"] for beta in betas] for alpha in alphas]
        image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto", origin="lower")
        for (alpha, beta), row in of_length.items():
            shade = "white" if row["value"] < low + 0.6 * (high - low) else INK
            says = f"{100 * row['value']:.0f}\n{row['cache']:,}"
            place = betas.index(beta), alphas.index(alpha)
            axes.text(*place, says, ha="center", va="center", fontsize=5.5, color=shade)
        axes.set_title(f"{length}x, % right and tokens held", fontsize=7.5, color=INK)
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set_xlabel("beta", fontsize=7.5, color=INK)
        style(axes)
    panels[0].set_ylabel("alpha", fontsize=7.5, color=INK)
    bar = figure.colorbar(image, ax=panels, format=PercentFormatter(1, 0), shrink=0.9)
    bar.ax.tick_params(labelsize=7, colors=INK)
    figure.savefig(path, dpi=200)
    return path
