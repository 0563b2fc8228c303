"""The training loop, from a config to a model in a folder."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from longvid_jax.errors import TrainError
from longvid_jax.train import evaluation, flops, models, optimizer, workdir
from longvid_jax.train.checkpoints import Checkpoints
from longvid_jax.train.config import resolve
from longvid_jax.train.export import export
from longvid_jax.train.feed import Feed
from longvid_jax.train.metrics import Log, Meter
from longvid_jax.train.profile import Profile
from longvid_jax.train.record import Record
from longvid_jax.train.skipped import Skipped
from longvid_jax.train.state import init
from longvid_jax.train.steps import Steps
from longvid_jax.train.stopping import Stopping
from longvid_jax.train.tasks import Curriculum


def train(
    config,
    folder: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int, dict], None] = lambda *_: None,
) -> dict:
    """Trains what the config describes (see train.config) in `folder`, or goes on with what was begun there.

    mesh: over which parameters and batches are spread; None: one device. say: takes a line for the user.
    progress: called with (steps done, steps in all, metrics of the last one) after each step. Both in process 0 alone.

    Gives folder, step, steps, stopped (the signal that ended it early, or None), best (its step and score), evaluation
    (the last one) and model (the folder of the finished model, of the best checkpoint, or None). A run that is
    interrupted and taken up again makes the same steps, to the bit, as one that never stopped.

    Raises LongvidError: for a config, a folder or data that do not do, and TrainError where it cannot go on.
    """
    config = resolve(config)
    if jax.process_index():
        say = progress = _nobody
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(workdir.opened(folder, config))
        stack.enter_context(contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh))
        stack.enter_context(_memory())

        # What is trained, on what, and how.
        model, module = models.build(config, mesh)
        batches = Curriculum(config, model, process=jax.process_index(), processes=jax.process_count())
        steps = len(batches)
        update, schedule = optimizer.make(batches.optim, steps)
        dtype, patterns = jnp.dtype(config.compute_dtype), (models.trainable(config), tuple(config.frozen))
        structure, state = init(module, update, *patterns, compute_dtype=dtype, mesh=mesh)
        del module  # the state has taken over its arrays
        compiled = Steps(config, model, structure, update, schedule)
        evaluate = evaluation.make(config, model, structure, mesh=mesh)

        # What has been done of it.
        checkpoints = Checkpoints(folder / workdir.CHECKPOINTS, config, say)
        stack.callback(checkpoints.close)
        state = checkpoints.resume(state)
        done, judged = int(state.step), None

        log = Log(folder, done)
        stack.callback(log.close)
        skipped = Skipped(folder, batches.examples(done), done, config.max_undecodable)
        meter = Meter(flops.peak(config.compute_dtype))
        record = Record(
            log, meter, skipped, checkpoints, config.log_every, lambda step, values: progress(step, steps, values)
        )
        with (
            Stopping() as stopping,
            Profile(config.profile_steps, folder / workdir.PROFILE) as profile,
            Feed(batches, done, mesh=mesh, workers=config.workers, ahead=config.ahead) as feed,
        ):
            while done < steps and not stopping.asked(done):
                profile.at(done, state)
                batch, waited = feed.next(state.step)
                state, metrics, cost = compiled.take(state, batch, batches.stage(done).task, compiling=record.paused)
                done += 1
                record.follow(done, batch, metrics, cost, waited)

                evaluating = evaluate is not None and (done % config.eval.every == 0 or done == steps)
                if evaluating or done % config.save.every == 0 or done == steps:
                    record.settle()
                    with record.paused():
                        if evaluating:
                            judged = evaluate(state)
                            record.evaluated(done, judged)
                            say(_line(done, steps, judged))
                        checkpoints.save(done, state, judged["best"] if evaluating else None)
            record.settle()
            checkpoints.save(done, state)

        checkpoints.wait()
        best, score = checkpoints.best
        finished = done == steps
        made = None
        if finished:
            state = state if best == done else checkpoints.restore(best, state)
            made = export(state.module(structure), model, config, folder)
        return {
            "folder": str(folder),
            "step": done,
            "steps": steps,
            "stopped": None if finished else stopping.signal.name,
            "best": {"step": best, "score": score},
            "evaluation": judged,
            "skipped": skipped.count,
            "model": None if made is None else str(made),
        }


def _nobody(*_) -> None:
    """Who listens to other processes than the first."""


def _line(step: int, steps: int, judged: dict) -> str:
    answers = ", ".join(f"{tag} {100 * share:.0f} %" for tag, share in judged["answers"].items())
    return f"step {step:,} of {steps:,}: loss {judged['loss']:.3f}, right to the last token: {answers}"


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """Says what to lower where an accelerator's memory is not enough."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainError(
            "the device's memory is not enough; lower batch_size of the stages or eval, raise accumulate, or set "
            "config.remat to dots or full."
        ) from error
