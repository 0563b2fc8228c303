"""AdamW or Muon as an optax chain, from plain values of a config."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from longvid_jax.errors import OptionError
from longvid_jax.models.paths import select
from longvid_jax.train.parameters import decay_mask

SCHEDULES = ("cosine", "constant")
RULES = ("adamw", "muon")
MUON_RMS = 0.2  # of its updates, as AdamW's are about, so that one learning rate does for both (arXiv 2502.16982)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) or Muon, its learning rate and its clipping.

    Muon (kellerjordan.github.io/posts/muon, arXiv 2502.16982) orthogonalises the updates of kernels; embeddings, the
    output head, norms, biases and adapters are AdamW's then too.

    Patterns are regular expressions for whole paths without layer numbers, such as `vision/.*`.
    """

    rule: str = "adamw"  # or "muon"
    lr: float = 1e-3  # at the end of the warm-up
    schedule: str = "cosine"  # or "constant", after the warm-up
    warmup: int = 0  # steps from 0 to lr, linearly; of a training in epochs at most the first
    floor: float = 0.0  # what the cosine ends at, as a share of lr
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: tuple[str, ...] | None = None  # patterns of what decays; None: kernels and embeddings
    clip: float | None = 1.0  # the largest global norm of a gradient; None: whatever it has
    multipliers: tuple[tuple[str, float], ...] = ()  # (pattern, factor on lr), multiplied where several match

    def __post_init__(self):
        for name in ("lr", "eps"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and value > 0, "a number above 0")
        _check("rule", self.rule, self.rule in RULES, " or ".join(RULES))
        _check("schedule", self.schedule, self.schedule in SCHEDULES, " or ".join(SCHEDULES))
        _check("warmup", self.warmup, type(self.warmup) is int and self.warmup >= 0, "a whole number of at least 0")
        _check("floor", self.floor, _is_number(self.floor) and 0 <= self.floor <= 1, "a share from 0 to 1")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
        decay = self.weight_decay
        _check("weight_decay", decay, _is_number(decay) and decay >= 0, "a number of at least 0")
        _check("clip", self.clip, self.clip is None or (_is_number(self.clip) and self.clip > 0), "above 0, or None")
        _check("multipliers", self.multipliers, _are_multipliers(self.multipliers), "pairs of a pattern and a factor")

    @classmethod
    def of(cls, config) -> "OptimizerConfig":
        """Of a ConfigDict or another mapping, or of a dataclass; OptionError for a key that is not known."""
        values = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                said = f", but {near[0]}" if near else ""
                raise OptionError(f"the optimizer has no option {name!r}{said}; its options are {', '.join(known)}.")
        return cls(**values)


def make(config: OptimizerConfig | Mapping, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer for flat dicts of parameters by path, and its learning rate at a step, over `steps` steps in all.

    Clips by the global norm, then AdamW or Muon, then multipliers on what it makes (decay too). Raises OptionError for
    values out of range; its init does for patterns that match no trainable parameter.
    """
    config = OptimizerConfig.of(config)
    schedule = learning_rate(config, steps)
    parts = [_rule(config, schedule)]
    if config.clip is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip))
    if config.multipliers:
        parts.append(_multiply(config.multipliers))
    return optax.chain(*parts), schedule


def _rule(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    def mask(params):
        return decay_mask(params, config.decay)

    if config.rule == "adamw":
        moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
        return optax.adamw(schedule, **moments, weight_decay=config.weight_decay, mask=mask)
    # Only what moves: optax's muon would decay by its own masks, and give AdamW's share Nesterov's momentum too.
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    orthogonal = muon(-1.0, consistent_rms=MUON_RMS, muon_weight_dimension_numbers=_matrices)
    return optax.chain(
        optax.partition({"muon": orthogonal, "adam": adam}, _rules),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def _rules(params) -> dict[str, str]:
    """Muon for kernels, in stacks each layer's for itself, but not for the output head's."""

    def is_matrix(path: str, value) -> bool:
        return path.rsplit("/", 1)[-1] == "kernel" and "lm_head" not in path and value.ndim in (2, 3)

    return {path: "muon" if is_matrix(path, value) else "adam" for path, value in params.items()}


def _matrices(params):
    return jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at step 0, 1, ..., steps - 1: linear warm-up from 0, then as the schedule says."""
    _check("steps", steps, type(steps) is int and steps > 0, "a whole number of at least 1")
    if config.warmup >= steps:
        raise OptionError(f"warmup is {config.warmup}, but must be less than the {steps} steps of the training.")
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    else:
        after = optax.cosine_decay_schedule(config.lr, steps - config.warmup, alpha=config.floor)
    if not config.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, config.warmup), after], [config.warmup])


def _multiply(multipliers) -> optax.GradientTransformation:
    """Multiplies the updates of what each pattern matches by its factor."""

    def factors(params) -> dict[str, float]:
        factors = dict.fromkeys(params, 1.0)
        for pattern, factor in multipliers:
            for path in select(pattern, params, "multipliers"):
                factors[path] *= factor
        return factors

    def init(params):
        factors(params)  # raises for patterns that match nothing
        return optax.EmptyState()

    def update(updates, state, params=None):
        return jax.tree.map(lambda update, factor: update * factor, updates, factors(updates)), state

    return optax.GradientTransformation(init, update)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_multipliers(pairs) -> bool:
    return isinstance(pairs, tuple | list) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) and _is_number(pair[1])
        and pair[1] >= 0
        for pair in pairs
    )  # fmt: skip


def _check(name: str, value, fits: bool, expected: str) -> None:
    if not fits:
        raise OptionError(f"the optimizer's {name} is {value!r}, but must be {expected}.")
