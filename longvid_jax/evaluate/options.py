"""Options of the command line that several sub-commands have: what a system keeps of a video, and how it answers."""

from __future__ import annotations

import argparse
import os

from longvid_jax.errors import OptionError

RETAKE = {  # of the command line -> of lv.ReTaKe
    "keep_ratio": "keep_ratio",
    "budget": "budget",
    "chunk_frames": "chunk_frames",
    "dpselect": "dpselect",
    "dpselect_ratio": "dpselect_ratio",
    "pivots": "pivots",
    "no_reforge": "reforge",
    "yarn_factor": "yarn_factor",
    "prompt_guided": "prompt_guided",
}
ADACM2 = {name: name for name in ("alpha", "beta", "carry_queries")}
REWIND = {
    name: name for name in ("clip_frames", "num_candidates", "num_selected", "num_neighbors", "detail", "offload")
}
BEAMS = ("num_beams", "length_penalty", "min_new_tokens")  # ways to decode that AdaCM2 and ReWind have
NONE = "none"
METHODS = {"retake": RETAKE, "adacm2": ADACM2, "rewind": REWIND}
SAYS = {
    "retake": "ReTaKe (on a Qwen2-VL)",
    "adacm2": "AdaCM2 (on an InstructBLIP)",
    "rewind": "ReWind (on a model of its own)",
}
KEEP_RATIO = 0.25


def add_method(parser: argparse.ArgumentParser, *, plain: bool = False) -> None:
    """--method and all that `method` makes choices of; without --method it is the model's own system.

    plain: it is none, if nothing of what is kept is given.
    """
    # Defaults are the systems' own and stay None here, so that what was given can be told from what was not.
    said = "none, or the model's own if what it keeps is given" if plain else "the model's own"
    parser.set_defaults(plain=plain)
    group = parser.add_argument_group("what is kept")
    group.add_argument("--method", choices=(*METHODS, NONE), help=f"none: all (default: {said})")
    group = parser.add_argument_group("with a Qwen2-VL: ReTaKe (arXiv 2412.20504)")
    group.add_argument("--keep-ratio", type=float, metavar="F", help="share of the video tokens (default: 0.25), or")
    group.add_argument("--budget", type=int, metavar="N", help="tokens of text and video together")
    group.add_argument("--chunk-frames", type=int, metavar="N", help="frames read at a time (default: 32)")
    group.add_argument("--dpselect", choices=("patch", "frame", "none"), help="key frames' unit (default: patch)")
    group.add_argument("--dpselect-ratio", type=float, metavar="F", help="share that passes DPSelect (default: 1)")
    group.add_argument("--pivots", choices=("mean", "always"), help="key frames' score (default: mean)")
    group.add_argument(
        "--no-reforge", action="store_true", default=None, help="leave kept tokens where they were in time"
    )
    group.add_argument("--yarn-factor", type=float, metavar="F", help="stretch the model's context by YaRN")
    group.add_argument("--prompt-guided", action="store_true", default=None, help="keep what the question attends to")
    group = parser.add_argument_group("with an InstructBLIP: AdaCM2 (arXiv 2411.12593)")
    shares = {"type": _shares, "metavar": "F[,F...]"}
    group.add_argument("--alpha", **shares, help="recent share of the cache, of all layers or each (default: 0.1)")
    group.add_argument("--beta", **shares, help="share of the older part that stays (default: 0.1)")
    group.add_argument(
        "--carry-queries",
        action=argparse.BooleanOptionalAction,
        help="a frame's queries go on from those of the frame before (default: as the model was trained)",
    )
    group = parser.add_argument_group("with a ReWind (arXiv 2411.15556)")
    number = {"type": int, "metavar": "N"}
    group.add_argument("--clip-frames", **number, help="frames perceived together (default: 8)")
    group.add_argument("--num-candidates", **number, help="most relevant frames, among which (default: 64)")
    group.add_argument("--num-selected", **number, help="frames are chosen to be looked at in detail (default: 8)")
    group.add_argument("--num-neighbors", **number, help="frames that make one dense (default: 5)")
    group.add_argument("--detail", choices=("buffer", "redecode"), help="where details come from (default: buffer)")
    group.add_argument("--offload", action="store_true", default=None, help="keep details in the host's memory")


def add_beams(group) -> None:
    """What `beams` reads: ways to decode that not all systems have."""
    group.add_argument("--num-beams", type=int, metavar="N", help="of a search for the likeliest answer (not Qwen2-VL)")
    group.add_argument("--length-penalty", type=float, metavar="F", help="above 1 for longer answers of that search")
    group.add_argument("--min-new-tokens", type=int, metavar="N", help="at least (not Qwen2-VL)")


def _shares(text: str) -> float | tuple[float, ...]:
    """A number, or several with commas between them."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a list such as 0.1,0.2") from None
    return values if len(values) > 1 else values[0]


def check(arguments: argparse.Namespace) -> None:
    """Raises OptionError for options that contradict each other whatever the model is."""
    for name, fields in METHODS.items():
        given = _given(arguments, fields)
        if given and arguments.method == NONE:
            raise OptionError(
                f"--method none keeps everything, so {_flags(given)} cannot be used with it; leave it out."
            )
        if given and arguments.method not in (None, name):
            raise OptionError(
                f"only {SAYS[name]} takes {_flags(given)}, but --method is {arguments.method}; leave one out."
            )
    several = [_flags(given) for fields in METHODS.values() if (given := _given(arguments, fields))]
    if len(several) > 1:
        raise OptionError(
            f"{several[0]} and {several[1]} are of two systems; leave out those that are not the model's."
        )


def method(arguments: argparse.Namespace, path: str | os.PathLike):
    """The lv.ReTaKe, lv.AdaCM2 or lv.ReWind that is asked for, or None, for the checkpoint at a path.

    Raises OptionError for options of another system, and CheckpointError if there is no checkpoint.
    """
    from longvid_jax import convert
    from longvid_jax.systems.loading import SYSTEMS

    check(arguments)
    architecture = convert.architecture(convert.open_weights(path).config)
    if architecture not in SYSTEMS:
        return None  # loading it says so
    kind, _ = SYSTEMS[architecture]
    own = kind.__name__.lower()
    for name, fields in METHODS.items():
        given = _given(arguments, fields)
        if name != own and (given or arguments.method == name):
            what = _flags(given) if given else f"--method {name}"
            raise OptionError(f"{what} is for {SAYS[name]}, but {path} is a {architecture} model; leave it out.")
    given = [name for name in BEAMS if getattr(arguments, name, None) is not None]
    if given and own == "retake":
        raise OptionError(
            f"{_flags(given)} is for answers of an InstructBLIP or a ReWind, but {path} is a {architecture} model; "
            "leave it out."
        )
    given = _given(arguments, METHODS[own])
    if own == "rewind" and arguments.method == NONE:
        raise OptionError(f"{path} is a ReWind, which does not run without its memory; leave out --method none.")
    if arguments.method == NONE or (arguments.plain and arguments.method is None and not given):
        return None
    choices = {METHODS[own][name]: value for name, value in given.items()}
    return kind(**(_retake(choices) if own == "retake" else choices))


def _retake(choices: dict) -> dict:
    if "reforge" in choices:
        choices["reforge"] = False
    if choices.get("dpselect") == "none":
        choices["dpselect"] = None
    if "budget" not in choices:
        choices.setdefault("keep_ratio", KEEP_RATIO)
    return choices


def beams(arguments: argparse.Namespace) -> dict:
    """Of the options that add_beams adds those that are given."""
    return {name: value for name in BEAMS if (value := getattr(arguments, name)) is not None}


def _given(arguments: argparse.Namespace, names) -> dict:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _flags(names) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
