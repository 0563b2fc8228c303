"""The optimizer against PyTorch's AdamW and closed forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from longvid_jax.errors import OptionError
from longvid_jax.train.optimizer import OptimizerConfig, learning_rate, make

RNG = np.random.default_rng(0)
SHAPES = {
    "text/embed/embedding": (7, 4),
    "text/layers/attention/q/bias": (3, 4),
    "text/layers/mlp/up/kernel": (3, 4, 6),
    "text/norm/scale": (4,),
    "vision/patch_embed/kernel": (5, 4),
}
PARAMS = {path: RNG.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
STEPS = 12


def gradients(scale=1.0):
    rng = np.random.default_rng(1)
    return [
        {path: (scale * rng.normal(size=shape)).astype(np.float32) for path, shape in SHAPES.items()}
        for _ in range(STEPS)
    ]


def ours(config, grads):
    optimizer, _ = make(config, STEPS)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grad in grads:
        params, state = step(params, state, grad)
    return params


def test_a_step_by_hand():
    """The first of constant learning rate: the sign of the gradient, but for eps, and the decay."""
    (grad, *_) = gradients()
    config = {"lr": 0.1, "schedule": "constant", "eps": 0.01, "weight_decay": 0.3, "clip": None}
    for path, got in ours(config, [grad]).items():
        value, g = PARAMS[path].astype(np.float64), grad[path].astype(np.float64)
        decay = 0.3 * value if path.endswith(("kernel", "embedding")) else 0
        np.testing.assert_allclose(got, value - 0.1 * (g / (np.abs(g) + 0.01) + decay), rtol=1e-5, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("scale", [1e-3, 30.0], ids=["not clipped", "clipped"])
def test_training_as_with_pytorch(scale):
    """Twelve steps of warm-up, cosine, decay of some, another rate for some, clipping: torch.optim.AdamW."""
    import torch

    config = {
        "lr": 0.05, "warmup": 4, "floor": 0.2, "b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "clip": 2.0,
        "multipliers": (("vision/.*", 0.5), (".*/kernel", 3.0)),
    }  # fmt: skip
    rates = {"text/layers/mlp/up/kernel": 3.0, "vision/patch_embed/kernel": 1.5}
    theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in PARAMS.items()}
    groups = [
        {"params": [parameter], "weight_decay": 0.1 if path.endswith(("kernel", "embedding")) else 0.0}
        for path, parameter in theirs.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    for step, grad in enumerate(gradients(scale)):
        rate = step / 4 if step < 4 else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4))) / 2
        for group, (path, parameter) in zip(optimizer.param_groups, theirs.items(), strict=True):
            group["lr"] = 0.05 * rate * rates.get(path, 1.0)
            parameter.grad = torch.tensor(grad[path])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        optimizer.step()
    got = ours(config, gradients(scale))
    for path, parameter in theirs.items():
        np.testing.assert_allclose(got[path], parameter.detach().numpy(), rtol=1e-5, atol=1e-5, err_msg=path)


def test_clipping_is_by_the_global_norm():
    """With eps far above all gradients a step is linear in them."""
    (grad, *_) = gradients()
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grad.values()))
    config = {"lr": 1.0, "schedule": "constant", "eps": 1e3, "weight_decay": 0.0}
    moved = {
        clip: {path: 1e3 * (PARAMS[path] - value) for path, value in ours({**config, "clip": clip}, [grad]).items()}
        for clip in (None, norm / 4, norm * 4)
    }
    for path, g in grad.items():
        np.testing.assert_allclose(moved[None][path], g, atol=0.02)
        np.testing.assert_allclose(moved[norm / 4][path], g / 4, atol=0.02)
        np.testing.assert_array_equal(moved[norm * 4][path], moved[None][path])


def test_learning_rates():
    config = OptimizerConfig(lr=0.3, warmup=10, floor=0.1)
    schedule, theirs = learning_rate(config, 110), optax.warmup_cosine_decay_schedule(0, 0.3, 10, 110, 0.03)
    steps = np.arange(130)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), jax.vmap(theirs)(steps), rtol=1e-6)
    points = {0: 0, 5: 0.15, 10: 0.3, 35: 0.03 + 0.27 * (1 + 0.5**0.5) / 2, 60: 0.165, 110: 0.03, 129: 0.03}
    for step, value in points.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-5)
    constant = learning_rate(OptimizerConfig(lr=0.3, warmup=10, schedule="constant"), 110)
    assert [float(constant(step)) for step in (0, 5, 10, 109)] == pytest.approx([0, 0.15, 0.3, 0.3])
    at_once = learning_rate(OptimizerConfig(lr=0.3), 100)
    assert [float(at_once(step)) for step in (0, 50, 100)] == pytest.approx([0.3, 0.15, 0], abs=1e-7)


def test_configs_of_every_kind():
    values = {"lr": 0.02, "warmup": 3, "decay": [".*/kernel"], "multipliers": [("text/.*", 2)]}
    expected = OptimizerConfig(**values)

    @dataclasses.dataclass
    class Mine:
        lr: float = 0.02
        clip: float | None = None

    assert OptimizerConfig.of(ConfigDict(values)) == OptimizerConfig.of(values) == OptimizerConfig.of(expected)
    assert OptimizerConfig.of(Mine()) == OptimizerConfig(lr=0.02, clip=None)
    assert OptimizerConfig.of({}) == OptimizerConfig()
    _, schedule = make(ConfigDict(values), 10)
    assert float(schedule(3)) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": 1e-3}, "no option 'learning_rate'.*lr"),
        ({"warm_up": 3}, "no option 'warm_up', but warmup"),
        ({"lr": 0}, "lr is 0"),
        ({"lr": "1e-3"}, "lr is '1e-3'"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": True}, "lr is True"),
        ({"schedule": "linear"}, "'linear', but must be cosine or constant"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup": 2.5}, "warmup is 2.5"),
        ({"warmup": STEPS}, "warmup is 12, but must be less than the 12 steps"),
        ({"floor": 1.5}, "floor is 1.5"),
        ({"b1": 1.0}, "b1 is 1.0"),
        ({"b2": -0.1}, "b2 is -0.1"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"clip": 0}, "clip is 0"),
        ({"multipliers": ["vision/.*"]}, "multipliers is"),
        ({"multipliers": [("vision/.*", -1)]}, "multipliers is"),
        ({"multipliers": [("vision", 2)]}, "multipliers has 'vision'"),
        ({"decay": [".*/weight"]}, "decay has '.*/weight'"),
    ],
)
def test_bad_options(values, said):
    with pytest.raises(OptionError, match=said) as caught:
        make(values, STEPS)[0].init(jax.tree.map(jnp.asarray, PARAMS))
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("steps", [0, -3, 2.0, None])
def test_bad_steps(steps):
    with pytest.raises(OptionError, match="steps is"):
        make({}, steps)


def test_muon_makes_all_singular_values_alike():
    """By hand: the gradient's singular vectors, values near one (the coefficients' own band) times 0.2 sqrt(width)."""
    (grad, *_) = gradients()
    config = {"rule": "muon", "lr": 0.1, "schedule": "constant", "weight_decay": 0.3, "clip": None}
    got = ours(config, [grad])
    for path in ("text/layers/mlp/up/kernel", "vision/patch_embed/kernel"):
        change = (PARAMS[path] - np.asarray(got[path], np.float64)) / 0.1 - 0.3 * PARAMS[path]
        for g, moved in zip(grad[path].reshape(-1, *g_shape(path)), change.reshape(-1, *g_shape(path)), strict=True):
            left, _, right = np.linalg.svd(g, full_matrices=False)
            turned = left.T @ moved @ right.T / (0.2 * max(g.shape) ** 0.5)
            assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-4
            assert 0.65 < np.diag(turned).min() and np.diag(turned).max() < 1.25
    for path in PARAMS.keys() - {"text/layers/mlp/up/kernel", "vision/patch_embed/kernel"}:  # AdamW: sign by sign
        decay = 0.3 * PARAMS[path] if path.endswith("embedding") else 0
        np.testing.assert_allclose(got[path], PARAMS[path] - 0.1 * (np.sign(grad[path]) + decay), atol=1e-5)


def g_shape(path):
    return SHAPES[path][-2:]


@pytest.mark.parity
def test_a_step_of_muon_as_with_pytorch():
    """PyTorch orthogonalises in bfloat16, so 2 % of an update's size is as near as it comes."""
    import torch

    path, (grad, *_) = "vision/patch_embed/kernel", gradients()
    theirs = torch.nn.Parameter(torch.tensor(PARAMS[path]))
    theirs.grad = torch.tensor(grad[path])
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw").step()
    config = {"rule": "muon", "lr": 0.1, "schedule": "constant", "weight_decay": 0.3, "clip": None}
    got, wanted = ours(config, [grad])[path] - PARAMS[path], theirs.detach().numpy() - PARAMS[path]
    assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)
