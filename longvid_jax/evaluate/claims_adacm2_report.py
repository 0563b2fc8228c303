"""`longvid bench claims --system adacm2`: its options, its tables and figures, and what it says."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import assets, claims_adacm2, claims_options
from longvid_jax.evaluate.claims_adacm2 import (
    ATTENTION,
    FAMILIES,
    GIVEN,
    PARTS,
    PLAIN,
    TRAINABLE,
    WAYS,
    Clips,
    Plan,
    Setting,
    check,
    seconds_a_frame,
    verdicts,
)
from longvid_jax.evaluate.compare import TIMELESS, points
from longvid_jax.terminal import progress, say

SHIPPED = "adacm2_world"  # of the assets
OPTIONS = ("alpha", "beta", "sweep", "sweep_seeds", "frames", "limit_mb", "captions")
QUICK = {
    "seeds": 1,
    "examples": 16,
    "lengths": (1, 2),
    "sweep": (0.1, 0.9),
    "frames": (16, 64, 128),
}
TABLE, RESULT, MEMORY = "claims.csv", "claims.json", "memory.csv"


def add_arguments(group) -> None:
    """The options that only this system has."""
    group.add_argument("--alpha", type=float, metavar="F", help="of the main comparison (default: 0.1)")
    group.add_argument("--beta", type=float, metavar="F", help="of the main comparison (default: 0.9)")
    group.add_argument("--sweep", type=float, nargs="+", metavar="F", help="of both (default: 0.1 0.5 0.9)")
    group.add_argument("--sweep-seeds", type=int, metavar="N", help="of the sweep (default: 1)")
    group.add_argument("--frames", type=int, nargs="+", metavar="N", help="of the memory (default: 16 32 ... 4096)")
    group.add_argument("--limit-mb", type=float, metavar="F", help="a video's cache at most (default: 128 MiB)")
    group.add_argument("--captions", action="store_true", help="ask for captions too, which take long")


def run(arguments: argparse.Namespace) -> dict:
    """Measures; returns plain values, ready for JSON. Raises OptionError for what cannot be run."""
    plan, paths = _plan(arguments)
    path = arguments.model or assets.path(SHIPPED)
    with progress() as bars:
        from longvid_jax.evaluate import claims_adacm2_memory

        bar = bars.add_task("loading", total=None)
        models = claims_options.load(path, paths, check, plan.setup.size)
        results, setup = claims_options.results(arguments, models[""], plan.setup)
        bars.update(bar, total=len(plan))
        if left := claims_adacm2.left(models, plan, results):
            say(f"about {_minutes(models[''], plan, left):.0f} minutes of questions to go")

        def told(what: str, count: int) -> None:
            bars.update(bar, description=what, advance=count)

        remembered = claims_adacm2_memory.run(models[""], plan, results, told) if "memory" in plan.parts else None
        rows = claims_adacm2.run(models, plan, results, told)
        bars.update(bar, description="measured")
    found = {
        "benchmark": "claims",
        "system": "adacm2",
        "model": str(path),
        "own": {way: str(where) for way, where in paths.items()},
        "setup": setup,
        "seeds": plan.seeds,
        "memory": remembered,
        "rows": rows,
        "claims": verdicts(rows),
    }
    if arguments.out:
        _write(found, Path(arguments.out).expanduser(), figures=not arguments.no_figure)
    return found


def _plan(arguments: argparse.Namespace) -> tuple[Plan, dict[str, str]]:
    """What is asked for, and the models of their own."""
    names = ("seeds", "examples", "lengths", "alpha", "beta", "sweep", "sweep_seeds", "frames")
    given = claims_options.given(arguments, names, QUICK)
    claims_options.check_counts(given, ("seeds", "sweep_seeds", "lengths"))
    for name in ("alpha", "beta", "sweep"):
        for value in [given.get(name, 0.5)] if name != "sweep" else given.get(name, ()):
            if not 0 < value < 1:
                raise OptionError(f"--{name} has {value}, but must be between 0 and 1.")
    for value in given.get("frames", ()):
        if value < 16 or value % 16:
            raise OptionError(f"--frames has {value}, but each must be a multiple of 16.")
    if arguments.limit_mb is not None:
        given["limit"] = int(arguments.limit_mb * (1 << 20))
    own = claims_options.own(arguments.own, TRAINABLE)
    given["parts"] = claims_options.parts(arguments.parts, PARTS)
    setup = claims_options.setup(arguments, given.pop("examples", None), None if arguments.captions else FAMILIES)
    given["lengths"] = sorted(set(given.get("lengths", Plan.lengths)))
    return Plan(setup, **given, own=tuple(own)), own


def _minutes(model, plan: Plan, left: int) -> float:
    """How long the work takes, roughly: watching, rendering and encoding, as measured on a little of each."""
    clip = Clips(dataclasses.replace(plan.setup, examples=plan.setup.questions))
    clip.features(model, [0])  # compiles
    clip.forget()
    start = time.perf_counter()
    clip.features(model, [0])
    made = (time.perf_counter() - start) / len(clip.times)
    videos = plan.seeds * sum(plan.lengths) * -(-plan.setup.examples // plan.setup.questions)
    return (made * videos * len(clip.times) + seconds_a_frame(model, plan) * left) / 60


def _write(found: dict, folder: Path, *, figures: bool) -> None:
    memory = found["memory"]["rows"] if found["memory"] else []
    claims_options.write(folder, RESULT, found, {TABLE: found["rows"], MEMORY: memory})
    if figures:
        from longvid_jax.evaluate import claims_adacm2_figure as figure

        parts = {row["part"] for row in found["rows"]}
        if found["memory"]:
            figure.memory(found["memory"], folder / "memory.png")
        if parts - {"sweep"}:
            figure.accuracy(found, folder / "claims.png")
        if "sweep" in parts:
            figure.sweep(found, folder / "sweep.png")


# --- as text ----------------------------------------------------------------------------------------------------------


def report(found: dict) -> str:
    """The result of `run` as text."""
    rows, setup = found["rows"], found["setup"]
    lines = [f"AdaCM2 on {found['model']}: {found['seeds']} x {setup['examples']} questions, {setup['level']} worlds"]
    if found["memory"]:
        lines += _memory(found["memory"])
    if rows:
        lines += [
            "",
            "Right answers in % with their 95 % interval; behind them, in points, the differences to no eviction and "
            "to AdaCM2",
            "with a cache of this size, with theirs. Tokens are those that a layer holds of a video.",
        ]
    for length in dict.fromkeys(row["length"] for row in rows):
        here = [row for row in rows if row["length"] == length]
        for measure in ("all", TIMELESS):
            shown = [row for row in here if row["measure"] == measure and row["part"] != "sweep"]
            if shown:
                lines += ["", f"{length} x {setup['seconds']:g} seconds, {measure}: {shown[0]['questions']} questions"]
                lines += map(_line, shown)
        lines += _families([row for row in here if row["part"] != "sweep"])
        lines += _sweep([row for row in here if row["part"] == "sweep" and row["measure"] == "all"])
    if rows and not any(row["way"] == PLAIN.way and row["length"] == rows[-1]["length"] for row in rows):
        lines += [
            "",
            f"At {rows[-1]['length']} x the cache of no eviction does not fit the limit, or was not asked for.",
        ]
    if found["claims"]:
        lines += ["", "What is claimed, on all questions:"]
    for one in found["claims"]:
        if one["measure"] != "all":
            continue
        own = "" if one["weights"] == GIVEN else f", {one['weights']}"
        lines.append(
            f"  {one['length']} x, {one['cache']:,} tokens{own}: {one['claim']} {one['verdict']} "
            f"({points(one['difference'])}, {points(one['low'])} to {points(one['high'])} points)"
        )
    return "\n".join(lines)


def _memory(memory: dict) -> list[str]:
    def megabytes(value) -> str:
        return f"{'-':>12}" if value is None else f"{value / 1e6:>9.2f} MB"

    lines = [
        "",
        f"Memory of one video on {memory['device']}: keys and values, all that lives between steps, the compiled step",
        f"  {'frames':>8}{'with eviction':>36}{'nothing evicted':>36}",
    ]
    by_frames = {(row["evicting"], row["frames"]): row for row in memory["rows"]}
    for frames in sorted({frames for _, frames in by_frames}):
        cells = ""
        for evicting in (True, False):
            row = by_frames.get((evicting, frames))
            cells += (
                f"{'more than ' + format(memory['limit'] / (1 << 20), 'g') + ' MiB of cache':>36}"
                if row is None
                else "".join(megabytes(row[name]) for name in ("cache", "live", "program"))
            )
        lines.append(f"  {frames:>8,}{cells}")
    growth = ", ".join(f"{name} {100 * value:.1f} %" for name, value in memory["growth"].items())
    lines.append(f"  flat within 2 % from 64 frames on: {memory['flat']} (growth: {growth})")
    if memory["saved"]:
        saved = ", ".join(f"{name} {100 * value:.0f} %" for name, value in memory["saved"].items())
        lines.append(f"  saved at {memory['saved_at']:,} frames: {saved} (the paper: up to 65 % of all GPU memory)")
    return lines


def _line(row: dict) -> str:
    own = "" if row["weights"] == GIVEN else ", own weights"
    what = WAYS[row["way"]].says + own
    kept = "" if row["way"] == PLAIN.way else f"{row['alpha']:g} {row['beta']:g}"
    cells = [f"{100 * row['value']:5.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"]
    for to in ("none", "attention"):
        same = f"to_{to}" not in row or (to == "none" and row["way"] == PLAIN.way) or _itself(row, to)
        cells.append("" if same else "{} [{}, {}]".format(*(points(row[f"to_{to}{end}"]) for end in ENDS)))
    return f"  {what:44}{kept:8}{row['cache']:>7,}" + "".join(f"{cell:>24}" for cell in cells)


ENDS = ("", "_low", "_high")


def _itself(row: dict, to: str) -> bool:
    return to == "attention" and row["way"] == ATTENTION


def _families(rows: list[dict]) -> list[str]:
    """Accuracy by family, a line a setting."""
    names = [name for name in (*FAMILIES, "caption", "when IoU") if any(row["measure"] == name for row in rows)]
    if not names:
        return []
    lines = ["", "  " + f"{'by family':52}" + "".join(f"{name:>10}" for name in names)]
    settings: dict[tuple, dict] = {}
    for row in rows:
        setting = Setting(row["way"], row["alpha"], row["beta"], row["weights"])
        settings.setdefault(setting, {})[row["measure"]] = row["value"]
    for setting, values in settings.items():
        lines.append(f"  {str(setting):52}" + "".join(f"{100 * values[name]:>10.1f}" for name in names))
    return lines


def _sweep(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    betas = sorted({row["beta"] for row in rows})
    value = {(row["alpha"], row["beta"]): row for row in rows}
    lines = ["", f"  alpha (rows) and beta (columns), all: {rows[0]['questions']} questions, % right and tokens held"]
    lines.append(f"  {'':8}" + "".join(f"{beta:>14g}" for beta in betas))
    for alpha in sorted({row["alpha"] for row in rows}):
        cells = (f"{100 * value[alpha, beta]['value']:.1f} ({value[alpha, beta]['cache']:,})" for beta in betas)
        lines.append(f"  {alpha:<8g}" + "".join(f"{cell:>14}" for cell in cells))
    return lines
