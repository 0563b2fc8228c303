"""The steps of all tasks of a run, compiled when their shapes first come, and what each costs."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import optax

from longvid_jax.data.batches import Batch
from longvid_jax.train import flops
from longvid_jax.train.models import Model
from longvid_jax.train.parameters import Structure
from longvid_jax.train.state import TrainState, make_train_step
from longvid_jax.train.tasks import task


class Steps:
    """The steps of a run, whichever task they are of."""

    def __init__(
        self,
        config,
        model: Model,
        structure: Structure,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
    ):
        def step(name: str, remat: str):
            loss = task(name).loss(model, remat)
            options = {"compute_dtype": jnp.dtype(config.compute_dtype), "accumulate": config.accumulate}
            return jax.jit(make_train_step(structure, loss, optimizer, schedule, **options), donate_argnums=0)

        names = {stage.task for stage in config.stages}
        self._steps = {name: step(name, config.remat) for name in names}
        self._plain = {name: step(name, "none") for name in names}  # never run: work done twice does not count
        self._flops: dict[tuple, float] = {}

    def take(
        self, state: TrainState, batch: Batch, name: str, compiling: Callable[[], AbstractContextManager]
    ) -> tuple[TrainState, dict[str, jax.Array], float]:
        """The state after a step of the task `name`, its metrics and how many operations it takes.

        The given state's arrays are used up. compiling(): entered while a step is traced and compiled, which is when
        its shapes are new.
        """
        leaves, structure = jax.tree.flatten(batch.arrays)
        key = name, structure, *(leaf.shape for leaf in leaves)
        if key in self._flops:
            return *self._steps[name](state, batch.arrays), self._flops[key]
        with compiling():
            self._flops[key] = flops.count(self._plain[name].trace(state, batch.arrays).jaxpr.jaxpr)
            return *self._steps[name](state, batch.arrays), self._flops[key]
