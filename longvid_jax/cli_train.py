"""The sub-command `longvid train`."""

from __future__ import annotations

import argparse
import signal

from longvid_jax.terminal import keep_compiled, print_json, progress, say


def add_arguments(train: argparse.ArgumentParser) -> None:
    """Words that are not known here change the config: `--config.optim.lr=3e-4`."""
    train.set_defaults(run=run, overrides=[])
    train.usage = "longvid train --config FILE:VARIANT --workdir DIR [--config.KEY=VALUE ...] [--json]"
    train.add_argument(
        "--config",
        metavar="FILE:VARIANT",
        required=True,
        help="a Python file with get_config(variant), or the name of one of the package's: qwen2vl_world, finetune",
    )
    train.add_argument(
        "--workdir",
        metavar="DIR",
        required=True,
        help="of the run, which is taken up again if it has begun",
    )
    train.epilog = "--config.KEY=VALUE changes a key of the config, say --config.optim.lr=3e-4."


def run(arguments: argparse.Namespace) -> int:
    """Trains; the exit code is that of the signal if one ended it."""
    from longvid_jax.train import config as configs

    config = configs.load(arguments.config, arguments.overrides)
    keep_compiled()
    from longvid_jax.train.loop import train

    with progress() as bars:
        bar = bars.add_task("starting", total=None)

        def done(step: int, steps: int, metrics: dict) -> None:
            bars.update(bar, description=f"loss {metrics['loss']:.3f}", completed=step, total=steps)

        result = train(config, arguments.workdir, mesh=_mesh(config), say=say, progress=done)
    if arguments.json:
        print_json(result)
    if result["stopped"]:
        say(f"stopped after step {result['step']:,} of {result['steps']:,}; give the same command again to go on")
        return 128 + signal.Signals[result["stopped"]]
    if not arguments.json:
        print(f"{result['model']}  the model after step {result['best']['step']:,} of {result['steps']:,}")
    return 0


def _mesh(config):
    """The mesh that the config asks for; None where that is one device."""
    from longvid_jax.scale.mesh import make_mesh

    mesh = make_mesh(**{axis: config.mesh[axis] for axis in config.mesh})
    return mesh if mesh.size > 1 else None
