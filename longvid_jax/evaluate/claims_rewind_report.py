"""`longvid bench claims --system rewind`: its options, its tables and its figure, and what it says."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import assets, claims_options, claims_rewind, compared
from longvid_jax.evaluate.claims_rewind import (
    FAMILIES,
    GIVEN,
    LONG,
    NONE,
    PARTS,
    REWIND,
    TRAINABLE,
    WAYS,
    WIDE,
    Plan,
    check,
    method,
)
from longvid_jax.evaluate.compare import TIMELESS, points
from longvid_jax.terminal import progress

SHIPPED, COMPARED = "rewind_world", "rewind_compared"  # of the assets: the model, and those that are trained to compare
OPTIONS = ("spans", "needles", "views")
QUICK = {"seeds": 1, "examples": 16, "lengths": (1, 2), "spans": (2, 8), "needles": 3, "views": (1, 8)}
RESULT, FIGURE = "claims.json", "claims.png"
TABLES = {"claims.csv": "rows", "recall.csv": "recall", "spans.csv": "spans", "views.csv": "views"}
MEASURES = ("all", TIMELESS, *FAMILIES, "when IoU", "when R1@0.5")


def add_arguments(group) -> None:
    """The options that only this system has."""
    group.add_argument("--spans", type=int, nargs="+", metavar="N", help="frames that show a needle (default: 1 2 4 8)")
    group.add_argument(
        "--views", type=int, nargs="+", metavar="N", help="frames in detail that show what is asked (default: 1 2 4 8)"
    )


def run(arguments: argparse.Namespace) -> dict:
    """Measures; returns plain values, ready for JSON. Raises OptionError for what cannot be run."""
    plan, own = _plan(arguments)
    path = arguments.model or assets.path(SHIPPED)
    beside = nullcontext({}) if arguments.model else compared.folders(path, assets.path(COMPARED))
    with progress() as bars, beside as shipped:
        bar = bars.add_task("loading", total=None)
        shipped = {way: shipped[way] for way in TRAINABLE if way in shipped}
        paths = ({REWIND: path} | shipped if shipped else {}) | own
        models = claims_options.load(path, paths, check, plan.setup.size, method=method())
        results, setup = claims_options.results(arguments, models[""], plan.setup)
        bars.update(bar, total=len(plan))

        def told(what: str, count: int) -> None:
            bars.update(bar, description=what, advance=count)

        found = {
            "benchmark": "claims",
            "system": "rewind",
            "model": str(path),
            "own": {way: str(own.get(way, "comes with the package")) for way in paths},
            "setup": setup,
            "seeds": plan.seeds,
            **claims_rewind.run(models, plan, results, told),
        }
        bars.update(bar, description="measured")
    if arguments.out:
        _write(found, Path(arguments.out).expanduser(), figures=not arguments.no_figure)
    return found


def _plan(arguments: argparse.Namespace) -> tuple[Plan, dict[str, str]]:
    """What is asked for, and the models that were trained with a way."""
    names = ("seeds", "examples", "lengths", "spans", "needles", "views")
    given = claims_options.given(arguments, names, QUICK)
    claims_options.check_counts(given, ("seeds", "needles", "lengths", "spans", "views"))
    if max(given.get("spans", (1,))) >= LONG:
        raise OptionError(f"--spans has {max(given['spans'])}, but videos have {LONG} frames.")
    given["parts"] = claims_options.parts(arguments.parts, PARTS)
    own = claims_options.own(arguments.own, TRAINABLE)
    setup = claims_options.setup(arguments, given.pop("examples", None), FAMILIES)
    for name in ("lengths", "spans", "views"):
        given[name] = sorted(set(given.get(name, getattr(Plan, name))))
    return Plan(setup, **given), own


def _write(found: dict, folder: Path, *, figures: bool) -> None:
    claims_options.write(folder, RESULT, found, {table: found[part] for table, part in TABLES.items()})
    if figures and (found["rows"] or found["spans"]):
        from longvid_jax.evaluate import claims_rewind_figure

        claims_rewind_figure.draw(found, folder / FIGURE)


# --- as text ----------------------------------------------------------------------------------------------------------


def report(found: dict) -> str:
    """The result of `run` as text."""
    rows, setup = found["rows"], found["setup"]
    lines = [f"ReWind on {found['model']}: {found['seeds']} x {setup['examples']} questions, {setup['level']} worlds"]
    if rows:
        lines += [
            "Right answers in % with their 95 % interval, and the difference in points to the step before (of both "
            "kinds of selection that to frames spread evenly); by family, %.",
            *(f"{way}: {where}" for way, where in found["own"].items()),
        ]
    for length in dict.fromkeys(row["length"] for row in rows):
        here = {(row["way"], row["measure"]): row for row in rows if row["length"] == length}
        names = [name for name in MEASURES[2:] if any(measure == name for _, measure in here)]
        lines += ["", f"{length} x {setup['seconds']:g} seconds{'':>67}" + "".join(f"{name:>12}" for name in names)]
        for way, about in WAYS.items():
            row = here[way, "all"]
            what = about.says + ("" if row["weights"] == GIVEN else f", {row['weights']}")
            cells = f"{100 * row['value']:5.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            if "to_before" in row:
                ends = (points(row[f"to_before{end}"]) for end in ("", "_low", "_high"))
                cells = f"{cells}   " + "{} [{}, {}]".format(*ends)
            lines.append(
                f"  {what:44}{cells:42}" + "".join(f"{100 * here[way, name]['value']:>12.1f}" for name in names)
            )
    kept = method()
    if recall := [one for one in found["recall"] if one["needles"]]:
        few = f"{kept.num_selected} selected, the {kept.num_selected} most relevant"
        lines += [
            "",
            f"Questions on needles that are found, in %: among the {kept.num_candidates} candidates, the {few}",
        ]
        lines += [f"  {one['frames']:>5} frames, {one['needles']} needles: {_found(one)}" for one in recall]
    if found["spans"]:
        lines += ["", f"The same by sampled frames that show the needle, in {LONG} frames of one a second"]
        lines += [f"  {one['span']:>5} frames, {one['needles']} needles: {_found(one)}" for one in found["spans"]]
    if found["views"]:
        lines += ["", "Right answers in %, but to when, by frames in detail that show what is asked, alone (seed 0)"]
        for one in found["views"]:
            ends = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * one[name] for name in ("value", "low", "high")))
            shown = f"{one['shows']:.1f} frames that show it, in {100 * one['covered']:.1f} % of questions any"
            lines.append(f"  {one['length']} x, {one['views']:>8}: {ends}; {shown}")
    if found["claims"]:
        lines += ["", "What is claimed:"]
    for one in found["claims"]:
        if one["measure"] != TIMELESS:
            ends = ", ".join(f"{100 * one[name]:.1f}" for name in ("difference", "low", "high"))
            trained = f", {one['weights']}" if one["weights"] else ""
            lines.append(f"  {one['length']} x{trained}: {one['claim']} {one['verdict']} ({ends})")
    if any(row["way"] == NONE and row["weights"] == GIVEN for row in rows):
        lines.append("Without memory the same weights see what they never saw in training: nothing is claimed of that.")
    return "\n".join(lines)


def _found(one: dict) -> str:
    names = ("candidates", "selected", "relevant")
    text = ", ".join("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in one[name])) for name in names if name in one)
    if "wide_selected" in one:
        wide = (100 * one[name][0] for name in ("wide_selected", "wide_relevant"))
        text += f"; of {one['wide']} in {WIDE} frames or more " + "{:.1f} and {:.1f}".format(*wide)
    return text
