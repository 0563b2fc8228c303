"""`longvid bench claims`: what a paper says of its method, measured on the made-up world, as tables and figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import claims, claims_adacm2_report, claims_options, claims_rewind_report, heatmap
from longvid_jax.evaluate.compare import TIMELESS, points
from longvid_jax.evaluate.world import check_size
from longvid_jax.terminal import progress

SHIPPED = "qwen2vl_world"  # of the assets
QUICK = {"seeds": 1, "examples": 80, "lengths": (1, 4), "ratios": (0.25, 0.05), "needles": 4}
REPORTS = {"adacm2": claims_adacm2_report, "rewind": claims_rewind_report}
OWN = {"retake": ("ratios", "heatmap", "needles")}  # options
OWN |= {name: ("parts", "own", *one.OPTIONS) for name, one in REPORTS.items()}
TABLE, RESULT, FIGURE, NEEDLES = "claims.csv", "claims.json", "claims.png", "needles"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `longvid bench claims`."""
    parser.add_argument("--system", choices=tuple(OWN), default="retake", help="(default: %(default)s)")
    parser.add_argument("--model", metavar="PATH", help="one trained on the world (default: the shipped one)")
    parser.add_argument("--out", metavar="DIR", help="keep answers (and go on from them), tables and figures there")
    parser.add_argument("--seeds", type=int, metavar="N", help="of worlds (default: 5)")
    parser.add_argument("--examples", type=int, metavar="N", help="questions a seed (default: 400)")
    parser.add_argument("--level", choices=("clear", "busy", "wild"), default="clear", help="(default: clear)")
    parser.add_argument("--seconds", type=float, default=16.0, help="that the plain model is for (default: 16)")
    parser.add_argument("--fps", type=float, default=2.0, help="sampled frames a second (default: 2)")
    parser.add_argument("--size", type=int, default=56, metavar="PX", help="of the frames (default: 56)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="times --seconds (default: 1 4 16; of retake 1 4 8)"
    )
    parser.add_argument("--quick", action="store_true", help="few questions, to see that it runs")
    parser.add_argument("--no-figure", action="store_true", help="tables only, which need no matplotlib")
    says = ", ".join(f"of {name} {' '.join(one.PARTS)}" for name, one in REPORTS.items())
    parser.add_argument("--parts", nargs="+", metavar="PART", help=f"{says} (default: all)")
    says = "a model trained with this way; of adacm2 and rewind (the shipped one has some with it)"
    parser.add_argument("--own", action="append", metavar="WAY=PATH", help=says)
    retake = parser.add_argument_group("retake")
    retake.add_argument("--ratios", type=float, nargs="+", metavar="F", help="(default: 0.5 0.25 0.1 0.05)")
    retake.add_argument("--heatmap", action="store_true", help="also needles by depth and length, to 32 times as long")
    says = "at each depth and length (default: 32); of rewind of each span (default: 200)"
    retake.add_argument("--needles", type=int, metavar="N", help=says)
    claims_adacm2_report.add_arguments(parser.add_argument_group("adacm2"))
    claims_rewind_report.add_arguments(parser.add_argument_group("rewind"))


def run(arguments: argparse.Namespace) -> dict:
    """Measures; returns plain values, ready for JSON. Raises OptionError for what cannot be run."""
    _check_options(arguments)
    if arguments.out and not arguments.no_figure:
        _check_figures()
    if arguments.system in REPORTS:
        return REPORTS[arguments.system].run(arguments)
    plan, needles = _plans(arguments)
    path = arguments.model or _shipped()
    with progress() as bars:
        from longvid_jax.systems.loading import load

        bar = bars.add_task("loading", total=None)
        model = load(path)
        check_size(model, plan.setup.size)
        results, setup = claims_options.results(arguments, model, plan.setup)
        bars.update(bar, total=len(plan) + (len(needles) if needles else 0))

        def told(what: str, count: int) -> None:
            bars.update(bar, description=what, advance=count)

        found = {
            "benchmark": "claims",
            "system": arguments.system,
            "model": str(path),
            "setup": setup,
            "seeds": plan.seeds,
            **claims.run(model, plan, results, told),
            "needles": None if needles is None else heatmap.run(model, needles, results, told),
        }
        bars.update(bar, description="measured")
    if arguments.out:
        _write(found, Path(arguments.out).expanduser(), figures=not arguments.no_figure)
    return found


def _check_options(arguments: argparse.Namespace) -> None:
    """OptionError for options that are another system's."""
    others = dict.fromkeys(name for names in OWN.values() for name in names if name not in OWN[arguments.system])
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name)]
    if given:
        raise OptionError(f"--system {arguments.system} has no {', '.join(given)}; leave it out.")


def _plans(arguments: argparse.Namespace) -> tuple[claims.Plan, heatmap.Plan | None]:
    given = claims_options.given(arguments, tuple(QUICK), QUICK)
    claims_options.check_counts(given, ("seeds", "needles", "lengths"))
    setup = claims_options.setup(arguments, given.pop("examples", None))
    needles = {"needles": given.pop("needles")} if "needles" in given else {}
    for value in given.get("ratios", ()):
        if not 0 < value < 1:
            raise OptionError(f"--ratios has {value}, but each must be between 0 and 1.")
    plan = claims.Plan(setup, **given)
    lengths = {"lengths": heatmap.LENGTHS[:3]} if arguments.quick else {}
    return plan, heatmap.Plan(setup, **needles, **lengths) if arguments.heatmap else None


def _shipped() -> Path:
    from longvid_jax.evaluate import assets

    return assets.path(SHIPPED)


def _check_figures() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError(
            "The figures need matplotlib, which is not installed; pip install 'longvid_jax[viz]', or give --no-figure."
        ) from None


def _write(found: dict, folder: Path, *, figures: bool) -> None:
    claims_options.write(folder, RESULT, found, {TABLE: found["rows"]})
    if found["needles"]:
        text = json.dumps(found["needles"], indent=1) + "\n"
        (folder / f"{NEEDLES}.json").write_text(text, encoding="utf-8")
    if figures:
        from longvid_jax.evaluate import claims_figure

        claims_figure.accuracy(found, folder / FIGURE)
        if found["needles"]:
            claims_figure.needles(found["needles"], folder / f"{NEEDLES}.png")


# --- as text ----------------------------------------------------------------------------------------------------------

SHOWN = ("all", TIMELESS, "when", "when IoU", "caption events")


def report(found: dict) -> str:
    """The result of `run` as text."""
    if found["system"] in REPORTS:
        return REPORTS[found["system"]].report(found)
    rows, setup = found["rows"], found["setup"]
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] < 1}, reverse=True)
    by_place = {(row["length"], row["measure"], row["way"], row["ratio"]): row for row in rows}
    lines = [
        f"ReTaKe on {found['model']}: {found['seeds']} x {setup['examples']} questions, {setup['level']} worlds",
        "Right answers in %, and behind them the difference to keeping everything with its 95 % interval, in points.",
        f"The shares kept are those asked for; what whole tokens and temporal patches make of them is in {TABLE}.",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        for measure in SHOWN:
            plain = by_place.get((length, measure, claims.PLAIN_WAY, 1.0))
            if plain is None:
                continue
            lines += [
                "",
                f"{length} x {setup['seconds']:g} seconds, {measure}: {plain['questions']} questions, "
                f"{100 * plain['value']:.1f} % with everything",
                f"  {'kept':24}" + "".join(f"{ratio:>28g}" for ratio in ratios),
            ]
            for way, about in claims.WAYS.items():
                if way != claims.PLAIN_WAY:
                    cells = [_cell(by_place[length, measure, way, ratio]) for ratio in ratios]
                    lines.append(f"  {about.says:24}" + "".join(f"{cell:>28}" for cell in cells))
    lines += ["", "What the paper says:"]
    for one in found["claims"]:
        lines.append(
            f"  {one['length']} x, {one['ratio']:g} kept, {one['measure']}: {one['claim']} {one['verdict']} "
            f"({points(one['difference'])}, {points(one['low'])} to {points(one['high'])} points)"
        )
    if needles := found["needles"]:
        lines += ["", "Needles found in %, by depth (rows) and seconds (columns):"]
        for way, table in needles["accuracy"].items():
            lines.append(f"  {way:8}" + "".join(f"{seconds:8g}" for seconds in needles["seconds"]))
            for depth, values in zip(needles["depths"], table, strict=True):
                lines.append(f"  {depth:8g}" + "".join(f"{100 * value:8.0f}" for value in values))
    return "\n".join(lines)


def _cell(row: dict) -> str:
    difference = (row["to_plain"], row["to_plain_low"], row["to_plain_high"])
    return f"{100 * row['value']:.1f}  " + "{} [{}, {}]".format(*map(points, difference))
