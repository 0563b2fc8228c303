"""The sub-command `longvid eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import options
from longvid_jax.terminal import keep_compiled, print_json, progress

SETUP = ("seed", "examples", "level", "seconds", "split", "fps", "questions")  # of evaluate.world.Setup
KNOWN = (*SETUP, "size", "letters", "families")
SPLITS = ("validation", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given is that of the config, and else of evaluate.world.Setup."""
    parser.add_argument("--benchmark", choices=("world",), default="world", help="the made-up world (default)")
    which = parser.add_argument_group("the model")
    which.add_argument("--model", metavar="PATH", help="converted folder, Hugging Face folder or hub id; or")
    which.add_argument(
        "--config",
        metavar="FILE:VARIANT",
        help="as for `longvid train`: the model is what that has made in --workdir, or the one that is shipped",
    )
    which.add_argument("--workdir", metavar="DIR", help="of a run of the config")

    worlds = parser.add_argument_group("the worlds, none of which is trained on")
    worlds.add_argument("--seed", type=int, metavar="S", help="which worlds (default: 0)")
    worlds.add_argument("--examples", type=int, metavar="N", help="questions in all (default: 400)")
    worlds.add_argument("--level", choices=("clear", "busy", "wild"), help="how hard to watch (default: clear)")
    worlds.add_argument("--seconds", type=float, metavar="F", help="length of a video (default: 16)")
    worlds.add_argument("--split", choices=SPLITS, help="(default: test)")
    worlds.add_argument("--fps", type=float, metavar="F", help="sampled frames a second (default: 2)")
    worlds.add_argument("--size", type=int, metavar="PX", help="height and width of the frames (default: 56)")
    worlds.add_argument("--questions", type=int, metavar="N", help="on one video, at most (default: 8)")
    worlds.add_argument("--letters", action="store_true", help="multiple choice: the answer is a letter")
    worlds.add_argument("--no-baselines", action="store_true", help="only the model, which takes half the time")
    options.add_method(parser, plain=True)


def run(arguments: argparse.Namespace) -> None:
    """Loads, asks, scores and prints."""
    from longvid_jax.evaluate import world_scores
    from longvid_jax.evaluate.world import Setup, check_size

    options.check(arguments)
    path, chosen = _model(arguments)
    chosen |= {name: value for name in SETUP if (value := getattr(arguments, name)) is not None}
    if arguments.size is not None:
        chosen["size"] = (arguments.size, arguments.size)
    if arguments.letters:
        chosen["letters"] = True
    setup = Setup(**chosen)
    setup.world(0)  # a length or a level that cannot be is found before a model is loaded
    method = options.method(arguments, path)
    keep_compiled()
    with progress() as bars:
        from longvid_jax.systems.loading import load

        bar = bars.add_task("loading", total=None)
        model = load(path, method=method)
        check_size(model, setup.size)
        shares = 1 if arguments.no_baselines else 2
        bars.update(bar, total=shares * setup.examples)

        def told(what: str, count: int) -> None:
            bars.update(bar, description=what, advance=count)

        result = world_scores.run(model, setup, baselines=not arguments.no_baselines, progress=told)
        bars.update(bar, description="answered")
    result = {"model": str(path), **result}
    print_json(result) if arguments.json else print(world_scores.report(result))


def _model(arguments: argparse.Namespace) -> tuple[str | Path, dict]:
    """Where the model is, and what its config says of the worlds."""
    if arguments.config is None:
        if arguments.model is None:
            raise OptionError("--model is missing; give it, or --config.")
        if arguments.workdir is not None:
            raise OptionError("--workdir is of a config's run; give --config with it, or --model alone.")
        return arguments.model, {}
    from longvid_jax.train import config as configs

    config = configs.load(arguments.config)
    chosen = configs.plain(config.benchmark)
    for name in chosen:
        if name not in KNOWN:
            raise OptionError(f"config.benchmark has no {name!r}; known are {', '.join(KNOWN)}.")
    if isinstance(chosen.get("size"), int):
        chosen["size"] = (chosen["size"], chosen["size"])
    if arguments.model is not None:
        if arguments.workdir is not None:
            raise OptionError("--model and --workdir are both given, but only one can be the model; leave one out.")
        return arguments.model, chosen
    return _made(arguments, config.assets), chosen


def _made(arguments: argparse.Namespace, name: str) -> Path:
    """The folder of the model that a config's run has made, or that is shipped as what it makes."""
    if arguments.workdir is not None:
        path = Path(arguments.workdir).expanduser() / "model"
        if not path.is_dir():
            raise OptionError(f"{path} is not there: the run in --workdir has made no model yet; train to the end.")
        return path
    if not name:
        raise OptionError(f"no model of {arguments.config} is shipped; give --workdir of a run, or --model.")
    from longvid_jax.evaluate import assets

    return assets.path(name)
