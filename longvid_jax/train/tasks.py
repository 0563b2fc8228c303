"""What a stage of a training does: a table from its name to its batches and its loss."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from longvid_jax.data.batches import Batch, Batches, Shapes
from longvid_jax.data.contrast import ContrastBatches
from longvid_jax.data.facts import FactBatches
from longvid_jax.data.instructed import InstructedBatches
from longvid_jax.data.naming import THINGS, WorldMoments
from longvid_jax.data.telling import TellingBatches
from longvid_jax.data.text import TextBatches
from longvid_jax.data.tokenizer import INSTRUCTION
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.memory.adacm2 import Policy
from longvid_jax.models.instructblip import InstructBlipConfig
from longvid_jax.models.rewind import RewindConfig
from longvid_jax.models.towers import TowersConfig
from longvid_jax.train import losses, sources
from longvid_jax.train.config import plain, unknown
from longvid_jax.train.instructed import instructed_tokens, telling
from longvid_jax.train.models import Model
from longvid_jax.train.rewound import Looking, contrast, noting, rewound_tokens
from longvid_jax.video.synthetic import HELD_OUT


@dataclasses.dataclass(frozen=True)
class Task:
    """batches(stage, model, seed=, process=, processes=): an object whose [b] is a data.batches.Batch.

    loss(model, remat): what state.make_train_step takes. tokens(model): a function of (module, batch) that gives the
    losses of tokens and which are right, both [B, N], for evaluations; None: it has no answers to be judged.
    """

    batches: Callable[..., Any]
    loss: Callable[[Model, str], Callable]
    tokens: Callable[[Model], Callable] | None


def _answer_batches(stage, model: Model, *, seed: int, process: int = 0, processes: int = 1):
    examples = sources.examples(stage, seed)
    share = {"process": process, "processes": processes}
    text = _buckets(stage, "text")
    if model.vision is None:
        return TextBatches(examples, model.tokenizer, text, stage.batch_size, axes=model.text.rope.axes, **share)
    vision = model.vision
    shapes = Shapes(_buckets(stage, "frames"), text, vision.temporal, vision.patch * vision.merge)
    if odd := [frames for frames in shapes.frames if frames % vision.temporal]:
        raise OptionError(f"a bucket has {odd[0]} frames, but must have a multiple of {vision.temporal}.")
    return Batches(examples, model.tokenizer, model.video_token, shapes, stage.batch_size, **share)


def _answer_tokens(model: Model, remat: str = "none"):
    if model.vision is None:
        return partial(losses.text_tokens, remat=remat)
    return partial(losses.answer_tokens, mean=model.mean, std=model.std, remat=remat)


def _answer_loss(model: Model, remat: str):
    tokens = _answer_tokens(model, remat)
    return lambda module, batch: losses.sums(*tokens(module, batch), batch)


def _moments(stage, model: Model, *, seed: int, process: int = 0, processes: int = 1):
    if model.vision is None or len(stage.sources) != 1:
        raise OptionError("a stage of the task 'naming' needs a model that sees, and one source; change the stage.")
    return _moments_of(plain(stage.sources)[0], stage.batch_size, model, seed, process, processes)


def _moments_of(source: Mapping, batch_size: int, model: Model, seed: int, process: int, processes: int):
    share = {"seed": seed, "process": process, "processes": processes}
    make = partial(WorldMoments, batch_size, temporal=model.vision.temporal, **share)
    return make(**sources.checked(source, {"moments": make}, "a stage with moments"))


def _naming(model: Model) -> dict:
    """What losses.naming is told. Its words must be tokens: of the world's own tokenizer they are."""
    encoded = [model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for thing in THINGS for word in thing]
    if any(len(ids) != 1 for ids in encoded):
        raise OptionError("the task 'naming' needs a tokenizer with a token for each colour and shape; leave it out.")
    words = np.array(encoded).reshape(-1, 2)
    known = [thing not in HELD_OUT for thing in THINGS]
    return {"words": words, "known": known, "mean": model.mean, "std": model.std}


def _naming_loss(model: Model, remat: str):
    return partial(losses.naming, **_naming(model), remat=remat)


def _facts(stage, model: Model, *, seed: int, process: int = 0, processes: int = 1):
    _check_towers(model)
    share = {"process": process, "processes": processes}
    return FactBatches(
        sources.examples(stage, seed), model.tokenizer, model.video_token, _buckets(stage, "text"), stage.batch_size,
        words=model.words, **share,
    )  # fmt: skip


def _fact_tokens(model: Model, remat: str = "none"):
    return partial(losses.fact_tokens, remat=remat)


def _fact_loss(model: Model, remat: str):
    return lambda module, batch: losses.sums(*losses.fact_tokens(module, batch, remat=remat), batch)


def _check_towers(model: Model) -> None:
    if not isinstance(model.settings, TowersConfig):
        raise OptionError("the tasks 'facts' and 'towers' need a model of type world_towers; change the stage.")


def _instructed(stage, model: Model, *, seed: int, process: int = 0, processes: int = 1, kind=InstructedBatches):
    settings = _instructblip(model)
    if settings.qformer.words and model.words is None:
        raise CheckpointError(
            f"the Q-Former reads questions, but the checkpoint has no {INSTRUCTION}/ with its tokenizer; put it there."
        )
    return kind(
        sources.examples(stage, seed), model.tokenizer, model.words, model.video_token, stage.batch_size,
        frames=_buckets(stage, "frames"), text=_buckets(stage, "text"),
        queries=lambda frames: settings.num_queries,
        reads=settings.qformer.max_length, process=process, processes=processes,
    )  # fmt: skip


def _watching(model: Model) -> dict:
    """How AdaCM2 watches, as train.instructed takes it."""
    how = dict(model.adacm2)
    layers = _instructblip(model).qformer.cross_layers
    shares = []
    for name in ("alpha", "beta"):
        share = value if isinstance(value := how.pop(name), tuple) else (value,) * layers
        if len(share) != layers:
            raise OptionError(f"config.adacm2.{name} has {len(share)} values, but {layers} layers look at frames.")
        shares.append(share)
    policy = Policy(*shares, how.pop("scores"))
    return {"policy": policy, **how, "mean": model.mean, "std": model.std}


def _instructed_tokens(model: Model, remat: str = "none"):
    return partial(instructed_tokens, **_watching(model), remat=remat)


def _questioned_loss(tokens_of: Callable, model: Model, remat: str):
    """Of a task whose batches have questions and their videos' axis apart."""
    tokens = tokens_of(model, remat)

    def loss(module, batch):
        flat = {"weights": batch["weights"].reshape(batch["weights"].shape[0], -1), "groups": batch["groups"]}
        return losses.sums(*tokens(module, batch), flat)

    return loss


def _told_batches(stage, model: Model, **how):
    if not isinstance(model.settings, RewindConfig):
        return _instructed(stage, model, **how, kind=TellingBatches)
    wanted = {"clip_frames": model.rewind["clip_frames"], "slots": model.settings.perceiver.num_write}
    for source in plain(stage.sources):
        for name, value in wanted.items():
            if source.get(name) != value:
                raise OptionError(
                    f"a source of the task 'telling' has {name}={source.get(name)}, but this ReWind needs {value}; "
                    "change the stage."
                )
    return _rewound(stage, model, **how, kind=TellingBatches)


def _telling(model: Model, remat: str):
    if model.facts is None:
        raise OptionError("the task 'telling' needs the towers that tell facts; give config.towers.")
    if isinstance(model.settings, RewindConfig):
        return partial(noting, facts=model.facts, **_looking(model), remat=remat)
    return partial(telling, facts=model.facts, **_watching(model), remat=remat)


def _instructblip(model: Model):
    if not isinstance(model.settings, InstructBlipConfig):
        raise OptionError("the task 'instructed' needs an InstructBLIP; change the stage or the model.")
    return model.settings


def _looking(model: Model, **told) -> dict:
    """How ReWind looks, as train.rewound takes it; told: fields of Looking that a task has otherwise."""
    return {"looking": Looking(**{**model.rewind, **told}), "mean": model.mean, "std": model.std}


def _rewind(model: Model) -> RewindConfig:
    if not isinstance(model.settings, RewindConfig):
        raise OptionError(
            "the tasks 'contrast', 'rewound', 'detailed', 'glimpses' and 'gaps' need a model of type rewind; "
            "change the stage."
        )
    if model.words is None:
        raise CheckpointError(
            f"the BERT reads questions, but the checkpoint has no {INSTRUCTION}/ with its tokenizer; put it there."
        )
    return model.settings


def _rewound(stage, model: Model, *, seed: int, process: int = 0, processes: int = 1, kind=InstructedBatches, **told):
    settings, looking = _rewind(model), _looking(model, **told)["looking"]
    kind = TellingBatches if looking.frames in ("oracle", "glimpses") else kind
    return kind(
        sources.examples(stage, seed), model.tokenizer, model.words, model.video_token, stage.batch_size,
        frames=_buckets(stage, "frames"), text=_buckets(stage, "text"), queries=partial(looking.vectors, settings),
        reads=settings.bert.max_length, process=process, processes=processes,
    )  # fmt: skip


def _rewound_tokens(model: Model, remat: str = "none", **told):
    return partial(rewound_tokens, **_looking(model, **told), remat=remat)


def _detailed(**told) -> Task:
    """Answers from other frames and less of the memory, so that details are read where memory would do."""

    def batches(stage, model: Model, **how):
        _rewind(model)
        return _told_batches(stage, model, **how, **told)

    tokens = partial(_rewound_tokens, **told)
    return Task(batches, partial(_questioned_loss, tokens), tokens)


def _contrasted(stage, model: Model, *, seed: int, process: int = 0, processes: int = 1):
    settings = _rewind(model)
    if not settings.contrast_width:
        raise OptionError("the task 'contrast' needs a model with contrast_width; assemble one with --contrast-width.")
    return ContrastBatches(
        sources.examples(stage, seed), model.words, stage.batch_size, frames=_buckets(stage, "frames"),
        reads=settings.bert.max_length, process=process, processes=processes,
    )  # fmt: skip


def _contrast_loss(model: Model, remat: str):
    return partial(contrast, **_looking(model), remat=remat)


class _Towers:
    """Batches of both kinds side by side: moments, as many worlds as facts' rows, and facts."""

    def __init__(self, moments, facts):
        self._moments, self._facts = moments, facts

    def __len__(self) -> int:
        return len(self._facts)

    def __getitem__(self, b: int) -> Batch:
        batch = self._facts[b]
        return dataclasses.replace(batch, arrays={"moments": self._moments[b].arrays, "facts": batch.arrays})


def _tower_batches(stage, model: Model, *, seed: int, process: int = 0, processes: int = 1):
    """The stage's first source is of moments, of `worlds` at a time if it says so; the others are of facts."""
    _check_towers(model)
    if len(stage.sources) < 2:
        raise OptionError("a stage of the task 'towers' needs a source of moments and one of facts; change the stage.")
    first, *others = plain(stage.sources)
    first = dict(first)
    worlds = first.pop("worlds", stage.batch_size)
    facts = ConfigDict({**plain(stage), "sources": tuple(others)})
    return _Towers(
        _moments_of(first, worlds, model, seed, process, processes),
        _facts(facts, model, seed=seed, process=process, processes=processes),
    )


def _tower_loss(model: Model, remat: str):
    return partial(losses.towers, **_naming(model), mask=model.words.mask_token_id, remat=remat)


def _buckets(stage, name: str) -> Sequence[int]:
    sizes = tuple(stage[name])
    if not sizes or any(type(size) is not int or size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
        raise OptionError(f"{name} of a stage is {sizes}, but must be whole numbers in ascending order.")
    return sizes


TASKS = {
    "answers": Task(_answer_batches, _answer_loss, _answer_tokens),
    "naming": Task(_moments, _naming_loss, None),
    "facts": Task(_facts, _fact_loss, _fact_tokens),
    "towers": Task(_tower_batches, _tower_loss, None),
    "instructed": Task(_instructed, partial(_questioned_loss, _instructed_tokens), _instructed_tokens),
    "contrast": Task(_contrasted, _contrast_loss, None),
    "rewound": Task(_rewound, partial(_questioned_loss, _rewound_tokens), _rewound_tokens),
    "detailed": _detailed(memory=False, frames="oracle"),
    "glimpses": _detailed(memory=False, frames="glimpses"),
    "gaps": _detailed(gaps=True),
    "gaps_detailed": _detailed(gaps=True, frames="oracle"),
    "gaps_glimpses": _detailed(gaps=True, frames="glimpses"),
    "telling": Task(_told_batches, _telling, None),
}


def task(name: str) -> Task:
    if name not in TASKS:
        raise unknown(name, list(TASKS), "the table of tasks")
    return TASKS[name]


class Curriculum:
    """The batches of all stages: batch b is that of step b, a function of (seed, b) alone.

    Stages come one after the other, but neighbours of one `group` side by side, each spread evenly.
    """

    def __init__(self, config, model: Model, *, process: int = 0, processes: int = 1):
        share = {"process": process, "processes": processes}
        self._stages = config.stages
        self._optim = config.optim
        self.counts = [stage.steps or _steps(stage) for stage in config.stages]  # of steps
        self._numbers = _order(self.counts, [stage.group for stage in config.stages])
        self._sizes = np.array([stage.batch_size for stage in config.stages])[self._numbers]
        self._own = np.zeros_like(self._numbers)  # the number of a step in its stage
        for n, count in enumerate(self.counts):
            self._own[self._numbers == n] = np.arange(count)
        self.of_stages = tuple(
            task(stage.task).batches(stage, model, seed=_seed(config.seed, n), **share)
            for n, stage in enumerate(config.stages)
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def stage(self, b: int):
        return self._stages[self._numbers[b]]

    @property
    def optim(self) -> dict:
        """config.optim, its warm-up in a training in epochs at most the first one's steps, as LAVIS has it."""
        values, first = plain(self._optim), self._stages[0]
        if first.epochs:
            values["warmup"] = min(values["warmup"], max(1, self.counts[0] // first.epochs), len(self) - 1)
        return values

    def examples(self, b: int) -> int:
        """How many there are before batch b, in all processes."""
        return int(self._sizes[:b].sum())

    def __getitem__(self, b: int) -> Batch:
        batch = self.of_stages[self._numbers[b]][int(self._own[b])]
        return dataclasses.replace(batch, index=b)


def _steps(stage) -> int:
    """How many steps a stage's epochs are."""
    each = [{name: value for name, value in source.items() if name != "weight"} for source in plain(stage.sources)]
    return max(1, stage.epochs * sum(len(sources.source(one)) for one in each) // stage.batch_size)


def _order(steps: Sequence[int], groups: Sequence[str]) -> np.ndarray:
    """int [all steps]: the number of the stage that each step belongs to."""
    order = []
    for _, members in itertools.groupby(range(len(steps)), lambda n: groups[n] or n):
        turns = [((i + 0.5) / steps[n], n) for n in members for i in range(steps[n])]
        order += [n for _, n in sorted(turns)]
    return np.array(order)


def _seed(seed: int, n: int) -> int:
    """Another one for each stage, of 31 bits as Grain wants it."""
    return int(np.random.SeedSequence([seed, n]).generate_state(1)[0] >> 1)
