"""Options of the command line that several sub-commands have: what ReTaKe keeps."""

from __future__ import annotations

import argparse

from longvid_jax.errors import OptionError

METHOD = {  # of the command line -> of lv.ReTaKe
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
KEEP_RATIO = 0.25


def add_method(parser: argparse.ArgumentParser, default: str | None = "retake") -> None:
    """--method and all that `method` makes a lv.ReTaKe of; a default of None is retake if any of these is given."""
    # Defaults are ReTaKe's own and stay None here, so that what was given can be told from what was not.
    group = parser.add_argument_group("what is kept (arXiv 2412.20504)")
    said = "retake" if default else "none, or retake where what it keeps is given"
    group.add_argument("--method", choices=("retake", "none"), default=default, help=f"none: all (default: {said})")
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


def method(arguments: argparse.Namespace):
    """The lv.ReTaKe that is asked for, or None; OptionError for options that contradict each other."""
    from longvid_jax.systems.retake import ReTaKe

    given = {name: value for name in METHOD if (value := getattr(arguments, name)) is not None}
    name = arguments.method or ("retake" if given else "none")
    if name == "none":
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise OptionError(f"--method none keeps everything, so {flags} cannot be used with it; leave one out.")
        return None
    choices = {METHOD[name]: value for name, value in given.items()}
    if "no_reforge" in given:
        choices["reforge"] = False
    if choices.get("dpselect") == "none":
        choices["dpselect"] = None
    if "budget" not in choices:
        choices.setdefault("keep_ratio", KEEP_RATIO)
    return ReTaKe(**choices)
