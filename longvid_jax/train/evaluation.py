"""Teacher-forced evaluation: how likely the right answers are, and which would have been said to the last token."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from longvid_jax.data.batches import batches_from
from longvid_jax.errors import OptionError
from longvid_jax.train.feed import on_device
from longvid_jax.train.models import Model
from longvid_jax.train.parameters import Structure
from longvid_jax.train.state import TrainState
from longvid_jax.train.tasks import task

SEED = 0  # the same examples each time and in every run
UNTAGGED = "answers"


class Evaluation:
    """The evaluation that a config describes, on its task; call it with a state."""

    def __init__(self, config, model: Model, structure: Structure, *, mesh=None):
        share = {"process": jax.process_index(), "processes": jax.process_count()}
        judged = task(config.eval.task)
        if judged.tokens is None:
            raise OptionError(f"config.eval.task is {config.eval.task!r}, which has no answers to judge; name another.")
        self._batches = judged.batches(config.eval, model, seed=SEED, **share)
        self._count, self._workers, self._mesh = config.eval.batches, config.workers, mesh
        tokens, dtype = judged.tokens(model), jnp.dtype(config.compute_dtype)

        def judge(state: TrainState, batch, conversations: int):
            losses, right = tokens(state.module(structure, dtype), batch)
            weights = batch["weights"].reshape(losses.shape)
            groups = jnp.where(weights > 0, batch["groups"], 0)
            count = jax.vmap(partial(jax.ops.segment_sum, num_segments=conversations + 1))
            sums = (losses * weights).sum(), (right * weights).sum(), weights.sum()
            return sums, count(weights, groups), count(weights * right, groups)

        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())  # every process sees all of it
        self._judge = jax.jit(judge, static_argnums=2, out_shardings=whole)

    def __call__(self, state: TrainState) -> dict:
        """loss and accuracy of the answers' tokens; answers: by tag the share that is right to the last token; best:
        the mean of those."""
        totals, told = np.zeros(3), defaultdict(list)
        batches = batches_from(self._batches, 0, workers=self._workers)
        for _, batch in zip(range(self._count), batches, strict=False):
            most = 1 << (max(len(example.conversations) for example in batch.examples) - 1).bit_length()
            sums, needed, right = jax.device_get(self._judge(state, on_device(batch.arrays, self._mesh), most))
            totals += sums
            for row, example in enumerate(batch.examples):
                tags = example.tags or (UNTAGGED,) * len(example.conversations)
                for n, tag in enumerate(tags, 1):
                    if needed[row, n]:  # 0 where the video could not be read
                        told[tag].append(right[row, n] == needed[row, n])
        answers = {tag: float(np.mean(told[tag])) for tag in sorted(told)}
        loss, right, weight = map(float, totals)
        return {
            "loss": loss / max(weight, 1.0),
            "accuracy": right / max(weight, 1.0),
            "answers": answers,
            "best": float(np.mean(list(answers.values()))) if answers else 0.0,
        }


def make(config, model: Model, structure: Structure, *, mesh=None) -> Callable[[TrainState], dict] | None:
    """The evaluation, or None if the config has none."""
    return Evaluation(config, model, structure, mesh=mesh) if config.eval.every and config.eval.sources else None
