"""The state of a training run and the pure function that takes it one step on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from longvid_jax.errors import OptionError
from longvid_jax.models.sharding import parameter_sharding, parameter_spec
from longvid_jax.ops.sharding import BATCH, constrain
from longvid_jax.train.parameters import Params, Structure, cast, split

METRICS = ("loss", "weight", "grad_norm", "learning_rate", "finite")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step, and the frozen parameters.

    There is no random key: what is random in a step comes from (seed, step), by its batch.
    """

    step: jax.Array  # int32: steps done
    trainable: Params  # float32
    frozen: Params  # in the compute dtype
    opt_state: Any
    halted: jax.Array  # bool: a loss or gradient was not finite; no step changes anything any more

    def module(self, structure: Structure, dtype=None):
        """The module of these parameters; dtype: of the trainable ones, None for their own float32."""
        trainable = self.trainable if dtype is None else cast(self.trainable, dtype)
        return structure.module({**trainable, **self.frozen})


def init(
    module, optimizer: optax.GradientTransformation, trainable=None, frozen=(), *, compute_dtype=jnp.float32, mesh=None
) -> tuple[Structure, TrainState]:
    """The module's structure and its state before the first step; patterns as for parameters.split.

    mesh: the state is spread over it; None: on the device of the module. An abstract module (jax.eval_shape) gives an
    abstract state, with the mesh's shardings: to restore into, or to compile for.
    The state takes over the module's arrays that have their dtype already: a step that donates the state deletes them.
    """
    structure, masters, rest = split(module, trainable, frozen, dtype=compute_dtype)

    def make(masters, rest):
        return TrainState(jnp.zeros((), jnp.int32), masters, rest, optimizer.init(masters), jnp.zeros((), bool))

    abstract = jax.eval_shape(make, masters, rest)
    if mesh is not None:
        shardings = state_shardings(mesh, abstract)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in masters.values()):
        return structure, abstract
    if mesh is None:
        device = next(iter(masters.values())).sharding
        if not isinstance(device, SingleDeviceSharding):
            raise OptionError("the module is spread over several devices; give their mesh as well.")
        shardings = jax.tree.map(lambda _: device, abstract)
    masters, rest = jax.device_put((masters, rest), (shardings.trainable, shardings.frozen))
    # Only what is new is computed: parameters that lie where they should are not copied.
    fresh = jax.jit(
        lambda masters: dataclasses.replace(make(masters, {}), trainable={}),
        out_shardings=dataclasses.replace(shardings, trainable={}, frozen={}),
    )(masters)
    return structure, dataclasses.replace(fresh, trainable=masters, frozen=rest)


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where all of a state (or of an abstract one) lies: moments as their parameters, the rest whole on each device."""

    def place(keys, leaf):
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        path = next((name for name in reversed(names) if name in state.trainable or name in state.frozen), None)
        if path is None or leaf.shape != {**state.trainable, **state.frozen}[path].shape:
            return NamedSharding(mesh, PartitionSpec())
        return parameter_sharding(mesh, path, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, state)


def make_train_step(
    structure: Structure,
    loss_fn: Callable[[Any, Any], tuple[jax.Array, jax.Array, dict[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None = None,
    *,
    compute_dtype=jnp.float32,
    accumulate: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A pure step(state, batch) -> (state, metrics), for jax.jit with donate_argnums=0.

    loss_fn(module, batch): the sum of the losses of all target tokens, their number (or the sum of their weights), and
        a dict of further sums; all float32 scalars. The module's trainable parameters are in compute_dtype.
    schedule: the learning rate at a step, for the metrics.
    accumulate: a batch is taken in so many micro-batches, one after the other, which needs the memory of one and a
        float32 gradient. Every leaf of a batch has a leading axis of rows, divisible by it; micro-batch i has the rows
        i, i + accumulate, ..., so that each is spread over all devices as the batch is. Gradients of sums are added and
        divided by the weight of the whole batch at the end, so rows of few targets count as in one big batch.

    metrics: loss (mean of the whole batch), weight, grad_norm (before clipping), learning_rate, finite, and the further
    sums. If loss or gradient are not finite, the state stays as it is but for `halted`, and so it does from then on:
    whenever the loop looks, state.step is the step that failed.
    """
    if type(accumulate) is not int or accumulate < 1:
        raise OptionError(f"accumulate is {accumulate!r}, but must be a whole number of at least 1.")

    def gradient(working: Params, frozen: Params, batch):
        """Gradient, loss, weight and further sums of a micro-batch, none divided by the weight."""

        def losses(working):
            loss, weight, sums = loss_fn(structure.module({**working, **frozen}), batch)
            if clash := sorted(set(sums) & set(METRICS)):
                raise OptionError(f"loss_fn returns a sum called {clash[0]!r}, which is a metric's name; rename it.")
            return loss.astype(jnp.float32), (weight.astype(jnp.float32), sums)

        (loss, (weight, sums)), grads = jax.value_and_grad(losses, has_aux=True)(working)
        return _as_parameters(cast(grads, jnp.float32)), loss, weight, sums

    def update(number, trainable, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        return number + 1, optax.apply_updates(trainable, updates), opt_state

    def step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.named_scope("gradient"):
            working = cast(state.trainable, compute_dtype)
            if accumulate == 1:
                grads, loss, weight, sums = gradient(working, state.frozen, batch)
            else:
                micro = micro_batches(batch, accumulate)
                first = jax.tree.map(lambda x: x[0], micro)
                shapes = jax.eval_shape(gradient, working, state.frozen, first)
                start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                start = (_as_parameters(start[0]), *start[1:])

                def add(total, batch):
                    return jax.tree.map(jnp.add, total, gradient(working, state.frozen, batch)), None

                (grads, loss, weight, sums), _ = jax.lax.scan(add, start, micro)
            count = jnp.where(weight > 0, weight, 1.0)  # a batch without targets has loss and gradient 0
            loss, grads = loss / count, jax.tree.map(lambda grad: grad / count, grads)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~state.halted
            # Chosen as a branch and not value by value, which would keep the old and the new parameters at once.
            number, trainable, opt_state = jax.lax.cond(
                good, update, lambda *old: old[:3], state.step, state.trainable, state.opt_state, grads
            )
        metrics = {"loss": loss, "weight": weight, "grad_norm": norm, "finite": good, **sums}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(number, trainable, state.frozen, opt_state, halted=~good), metrics

    return step


def micro_batches(batch, count: int):
    """The leaves [B, ...] of a batch as [count, B / count, ...]; OptionError if count does not divide B."""

    def split_rows(x):
        if x.ndim == 0 or x.shape[0] % count:
            raise OptionError(
                f"a batch has an array of shape {list(x.shape)}, whose rows cannot be taken in {count} equal parts; "
                "let accumulate divide the batch size."
            )
        parts = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        return constrain(parts, None, BATCH)

    return jax.tree.map(split_rows, batch)


def _as_parameters(grads: Params) -> Params:
    """Gradients lie on the mesh, where one is set (jax.set_mesh), as their parameters do."""
    if jax.sharding.get_abstract_mesh().empty:
        return grads
    return {path: constrain(grad, *parameter_spec(path, grad.ndim)) for path, grad in grads.items()}
