"""A tiny decoder on random tokens, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from longvid_jax.errors import OptionError
from longvid_jax.models import lora
from longvid_jax.models.llama import Decoder, DecoderConfig, forward
from longvid_jax.models.paths import leaves
from longvid_jax.ops.rope import Rope
from longvid_jax.scale.mesh import make_mesh
from longvid_jax.train import optimizer as optimizers
from longvid_jax.train.state import init, make_train_step, state_shardings

CONFIG = DecoderConfig(
    vocab_size=32, width=16, depth=1, heads=4, kv_heads=2, ff_width=32, norm_eps=1e-6, qkv_bias=True, o_bias=False,
    tied=False, rope=Rope(head_dim=4),
)  # fmt: skip
ROWS, LENGTH = 8, 12


@functools.cache
def parameters() -> dict[str, np.ndarray]:
    return {leaf.path: np.asarray(leaf.value) for leaf in leaves(Decoder(CONFIG, rngs=nnx.Rngs(0)))}


def decoder(stacked=False):
    """Always of the same parameters, in arrays of its own."""
    module = jax.eval_shape(lambda: Decoder(CONFIG, stacked=stacked, rngs=nnx.Rngs(0)))
    parts = [[parameters()[path] for path in leaf.part_paths] for leaf in leaves(module)]
    arrays = [
        jnp.array(np.stack(part) if leaf.stacked else part[0]) for leaf, part in zip(leaves(module), parts, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(module), arrays)


def tokens(seed=0) -> dict[str, np.ndarray]:
    """Random tokens; rows have from none to all of them as targets."""
    rng = np.random.default_rng(seed)
    targets = np.arange(LENGTH - 1) < np.array([0, 11, 1, 9, 0, 10, 2, 11])[:, None]
    return {"ids": rng.integers(0, 32, (ROWS, LENGTH)).astype(np.int32), "targets": targets}


def loss_fn(module, batch):
    logits = forward(module, batch["ids"][:, :-1])
    following, weights = batch["ids"][:, 1:], batch["targets"].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    right = (logits.argmax(-1) == following) * weights
    return (losses * weights).sum(), weights.sum(), {"right": right.sum()}


ADAMW = {"lr": 0.02, "warmup": 2, "schedule": "constant"}


def start(module=None, config=ADAMW, loss_fn=loss_fn, **how):
    """The state before the first step, and the jitted step."""
    options = {name: how.pop(name) for name in ("compute_dtype", "accumulate") if name in how}
    optimizer, schedule = optimizers.make(config, 100) if isinstance(config, dict) else (config, None)
    dtype = {"compute_dtype": options.get("compute_dtype", jnp.float32)}
    structure, state = init(decoder() if module is None else module, optimizer, **how, **dtype)
    return state, jax.jit(make_train_step(structure, loss_fn, optimizer, schedule, **options), donate_argnums=0)


def numpy(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_loss_falls_and_nothing_compiles_twice():
    state, step = start()
    measured = []
    for _ in range(40):
        state, metrics = step(state, tokens())
        measured.append(numpy(metrics))
    assert step._cache_size() == 1
    first, last = measured[0], measured[-1]
    assert first["loss"] == pytest.approx(np.log(32), rel=0.05)
    assert last["loss"] < 0.3 * first["loss"]
    assert last["right"] > 0.9 * last["weight"] > first["right"]
    assert {m["weight"].item() for m in measured} == {tokens()["targets"].sum()}
    assert [m["learning_rate"].item() for m in measured[:4]] == pytest.approx([0, 0.01, 0.02, 0.02])
    assert all(m["finite"] for m in measured)
    assert int(state.step) == 40 and not state.halted
    assert set(first) == {"loss", "weight", "grad_norm", "learning_rate", "finite", "right"}


def test_one_step_is_that_of_the_mean_loss():
    """Against jax.grad of the mean over all target tokens, taken by optax without any of this."""
    module, batch = decoder(), tokens()

    @jax.jit
    @jax.value_and_grad
    def mean(module):
        loss, weight, _ = loss_fn(module, batch)
        return loss / weight

    loss, grads = mean(module)
    grads = {leaf.path: leaf.value for leaf in leaves(grads)}
    before = {leaf.path: np.array(leaf.value) for leaf in leaves(module)}
    state, step = start(module, optax.sgd(1.0))
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    for path, value in state.trainable.items():
        np.testing.assert_allclose(value, before[path] - grads[path], rtol=1e-5, atol=1e-7, err_msg=path)


def test_micro_batches_equal_one_big_batch():
    """Rows of unequal numbers of targets, so that the mean of the micro-batches' means would be another."""
    results, batch = {}, tokens()
    for accumulate in (1, 4):
        state, step = start(config=optax.sgd(1.0), accumulate=accumulate)
        before = numpy(state.trainable)
        state, metrics = step(state, batch)
        results[accumulate] = numpy(metrics), {path: before[path] - value for path, value in state.trainable.items()}
    metrics, grads = results.pop(1)
    scale = max(np.abs(grad).max() for grad in grads.values())
    for got, got_grads in results.values():
        for name in metrics:
            np.testing.assert_allclose(got[name], metrics[name], rtol=1e-6, err_msg=name)
        for path, grad in grads.items():
            np.testing.assert_allclose(
                got_grads[path], grad, rtol=1e-6, atol=1e-6 * scale, err_msg=f"{accumulate} {path}"
            )
    means = []
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        loss, weight, _ = loss_fn(decoder(), {name: value[rows] for name, value in batch.items()})
        means.append(loss / weight)
    assert abs(np.mean(means) / metrics["loss"] - 1) > 1e-4


def test_frozen_parameters_stay_and_the_rest_is_donated():
    state, step = start(module=decoder(True), trainable="layers/mlp/.*", compute_dtype=jnp.bfloat16)
    frozen = numpy(state.frozen)
    places = {path: value.unsafe_buffer_pointer() for path, value in state.frozen.items()}
    assert set(state.trainable) == {f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")}
    first = state
    for seed in range(3):
        state, _ = step(state, tokens(seed))
    assert_same(numpy(state.frozen), frozen)
    assert {path: value.unsafe_buffer_pointer() for path, value in state.frozen.items()} == places
    assert all(value.is_deleted() for value in jax.tree.leaves((first.trainable, first.opt_state)))
    assert jax.tree.leaves(state.opt_state)[1].shape in {value.shape for value in state.trainable.values()}


def test_adapters_are_trained_alone():
    plain = decoder()
    values = {leaf.path: np.array(leaf.value) for leaf in leaves(plain)}
    module = lora.add(plain, ["layers/.*", "lm_head"], 4, 8, key=jax.random.key(0))
    optimizer, schedule = optimizers.make({"lr": 0.05, "weight_decay": 0.0}, 60)
    structure, state = init(module, optimizer, ".*/lora_[ab]")
    step = jax.jit(make_train_step(structure, loss_fn, optimizer, schedule), donate_argnums=0)
    losses = []
    for _ in range(60):
        state, metrics = step(state, tokens())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    tuned = state.module(structure)
    assert_same({path: np.array(x) for path, x in state.frozen.items()}, values)
    merged = lora.merge(tuned)
    assert jax.tree.structure(merged) == jax.tree.structure(decoder())
    np.testing.assert_allclose(loss_fn(merged, tokens())[0], loss_fn(tuned, tokens())[0], rtol=1e-4)


SPOILT = {
    "loss": lambda x, scale: jnp.exp(1000 * (1 - x)) - 1,
    "gradient": lambda x, scale: jnp.sqrt(x * scale),  # whose derivative by scale is not a number at x = 0
}


@pytest.mark.parametrize("where", SPOILT)
def test_a_loss_that_is_not_finite_halts(where):
    """Nothing changes from then on, good batches or not, and state.step stays that of the bad batch."""

    def spoilt(module, batch):
        loss, weight, sums = loss_fn(module, batch)
        return loss + SPOILT[where](batch["good"].min(), module.norm.scale[0]), weight, sums

    def batch(good):
        return {**tokens(), "good": np.full(ROWS, good, np.float32)}

    state, step = start(loss_fn=spoilt)
    for _ in range(2):
        state, metrics = step(state, batch(1))
        assert metrics["finite"]
    before = numpy(state)
    state, metrics = step(state, batch(0))
    assert not metrics["finite"] and state.halted and int(state.step) == 2
    assert np.isfinite(metrics[{"loss": "grad_norm", "gradient": "loss"}[where]])
    for good in (1, 0):
        state, metrics = step(state, batch(good))
        assert not metrics["finite"]
    assert_same((state.step, state.trainable, state.opt_state), (before.step, before.trainable, before.opt_state))
    assert step._cache_size() == 1


def test_a_batch_without_targets_teaches_nothing():
    state, step = start(config=optax.sgd(1.0))
    before = numpy(state.trainable)
    state, metrics = step(state, {**tokens(), "targets": np.zeros((ROWS, LENGTH - 1), bool)})
    assert metrics["finite"] and metrics["loss"] == 0 and metrics["weight"] == 0 and metrics["grad_norm"] == 0
    assert_same(numpy(state.trainable), before)


@functools.cache
def unsharded():
    state, step = start()
    measured = []
    for seed in range(4):
        state, metrics = step(state, tokens(seed))
        measured.append(numpy(metrics))
    return numpy(state.trainable), measured


def test_bfloat16_compute_with_float32_masters():
    seen = set()

    def watched(module, batch):
        seen.update(leaf.value.dtype for leaf in leaves(module))
        return loss_fn(module, batch)

    state, step = start(loss_fn=watched, compute_dtype=jnp.bfloat16)
    expected, measured = unsharded()
    for seed in range(4):
        state, metrics = step(state, tokens(seed))
        for name, value in measured[seed].items():
            np.testing.assert_allclose(metrics[name], value, rtol=0.02, atol=1 if name == "right" else 0, err_msg=name)
    assert seen == {jnp.dtype(jnp.bfloat16)}
    assert {value.dtype for value in state.trainable.values()} == {jnp.dtype(jnp.float32)}
    moments = jax.tree.leaves((optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")))
    assert {value.dtype for value in moments} == {jnp.dtype(jnp.float32)}
    before = parameters()
    moved, theirs = ({path: params[path] - before[path] for path in before} for params in (state.trainable, expected))
    assert optax.tree.vdot(moved, theirs) > 0.98 * optax.tree.norm(moved) * optax.tree.norm(theirs)
    for value in state.trainable.values():  # finer than bfloat16
        assert not np.array_equal(value, value.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(
    ("shape", "accumulate", "stacked"),
    [({"data": 2, "fsdp": 2, "tensor": 2}, 2, True), ({"fsdp": 4, "tensor": 2}, 1, False), ({"data": 8}, 1, False)],
    ids=str,
)
def test_sharded_equals_unsharded(shape, accumulate, stacked):
    mesh = make_mesh(**shape)
    optimizer, schedule = optimizers.make(ADAMW, 100)
    structure, state = init(decoder(stacked), optimizer, mesh=mesh)
    shardings = state_shardings(mesh, state)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    step = jax.jit(
        make_train_step(structure, loss_fn, optimizer, schedule, accumulate=accumulate),
        donate_argnums=0,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, None),
    )
    expected, measured = unsharded()
    with jax.set_mesh(mesh):
        for seed in range(4):
            state, metrics = step(state, jax.device_put(tokens(seed), rows))
            for name, value in measured[seed].items():
                np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    assert step._cache_size() == 1
    for path, value in expected.items():
        got = state.trainable[path.replace("layers/00", "layers")][0] if stacked and "layers" in path else None
        np.testing.assert_allclose(state.trainable[path] if got is None else got, value, atol=2e-5, err_msg=path)
    path = "layers/mlp/up/kernel" if stacked else "layers/00/mlp/up/kernel"
    moments = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
    for array in (state.trainable[path], *(moment[path] for moment in moments)):
        (piece,) = {shard.data.shape[-2:] for shard in array.addressable_shards}
        assert piece == (16 // mesh.shape["fsdp"], 32 // mesh.shape["tensor"])


def test_an_abstract_module_gives_an_abstract_state():
    """Of the very shapes, dtypes and shardings that the real one has, without an array being made."""
    mesh, optimizer = make_mesh(fsdp=4, tensor=2), optimizers.make(ADAMW, 100)[0]
    how = {"frozen": "embed/.*", "compute_dtype": jnp.bfloat16, "mesh": mesh}
    structure, abstract = init(jax.eval_shape(decoder), optimizer, **how)
    real_structure, real = init(decoder(), optimizer, **how)
    assert structure == real_structure
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))

    def look(state):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), state)

    assert jax.tree.leaves(look(abstract)) == jax.tree.leaves(look(real))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)


def test_bad_options():
    optimizer = optimizers.make(ADAMW, 100)[0]
    structure, state = init(decoder(), optimizer)
    for accumulate in (0, 2.0, True):
        with pytest.raises(OptionError, match=f"accumulate is {accumulate}"):
            make_train_step(structure, loss_fn, optimizer, accumulate=accumulate)
    with pytest.raises(OptionError, match=r"shape \[8, 12\], whose rows cannot be taken in 3 equal parts"):
        make_train_step(structure, loss_fn, optimizer, accumulate=3)(state, tokens())
    clash = make_train_step(structure, lambda *given: (*loss_fn(*given)[:2], {"loss": jnp.zeros(())}), optimizer)
    with pytest.raises(OptionError, match="called 'loss'"):
        jax.eval_shape(clash, state, tokens())
    spread = jax.device_put(decoder(), NamedSharding(make_mesh(data=8), PartitionSpec()))
    with pytest.raises(OptionError, match="give their mesh"):
        init(spread, optimizer)
