"""AdaCM2's published claims (arXiv 2411.12593) put to the test: bounded memory, and what is lost by evicting.

Every setting sees the same worlds and is asked the same questions, so that differences are paired; intervals are
bootstraps over videos. Worlds are rendered and encoded once for all settings.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import jax
import numpy as np

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import adacm2_watch, world
from longvid_jax.evaluate.compare import TIMELESS, compare, verdict
from longvid_jax.evaluate.results import Results, fingerprint
from longvid_jax.evaluate.world import Asked, Rendered, Setup
from longvid_jax.memory import adacm2
from longvid_jax.memory.adacm2 import Policy
from longvid_jax.systems.adacm2 import AdaCM2Model

LENGTHS = (1, 4, 16)  # times the trained one
SHORT = 4  # the sweep and shared indices are looked at up to so many times
TENTH = (0.1, 0.1)  # the paper's alpha and beta
NONE, ATTENTION, GENERIC = "none", "attention", "generic"
GIVEN, OWN = "trained without eviction", "trained with its own"  # weights
WITHIN = 0.03  # of no eviction
GENERIC_PROMPT = "Describe the video."
FAMILIES = ("needle", "order", "count", "when", "state", "presence")  # a caption takes as long as all these together
ROWS = 80  # of a batch, at most
STEP = 8  # prompts and answers are padded to multiples
COSTS = 0.03  # of a frame that is watched once a video and looked at by nobody, beside one that is looked at


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to watch. memory, last: what the Q-Former reads with all frames but the last, and with the last one."""

    says: str
    scores: str = ATTENTION
    carry_queries: bool = False
    memory: str = "question"
    last: str = "question"


WAYS = {
    NONE: Way("nothing evicted"),
    ATTENTION: Way("AdaCM2"),
    "random": Way("random eviction", scores="random"),
    "recent": Way("recency only", scores="recent"),
    "shared": Way("one index set for all layers", scores="shared"),
    "carried": Way("AdaCM2, queries carried", carry_queries=True),
    GENERIC: Way("a generic prompt", memory=GENERIC, last=GENERIC),
    "empty": Way("an empty prompt", memory="empty", last="empty"),
    "generic memory": Way("a generic prompt, the question last", memory=GENERIC),
}
TRAINABLE = (ATTENTION, "random", "recent")  # ways of which there may be weights of their own


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way with alpha and beta, on weights trained without eviction or with this way."""

    way: str
    alpha: float
    beta: float
    weights: str = GIVEN

    @property
    def reference(self) -> Setting:
        """AdaCM2 at the same cache size, on weights of the same kind."""
        return dataclasses.replace(self, way=ATTENTION)

    def __str__(self) -> str:
        return f"{self.way} {self.alpha:g} {self.beta:g}" + " own" * (self.weights == OWN)


PLAIN = Setting(NONE, 1.0, 1.0)
PARTS = ("memory", "accuracy", "paper", "carried", "shared", "prompt", "sweep")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    alpha, beta: of the main comparison. sweep: their values in the sweep, on the first `sweep_seeds` seeds. frames: of
    the memory's curve. limit: bytes that the cache of a video may take where nothing is evicted; beyond it does not
    fit. own: ways of which there are weights of their own.
    """

    setup: Setup  # of the trained length
    seeds: int = 5
    lengths: Sequence[int] = LENGTHS
    alpha: float = 0.1
    beta: float = 0.9
    parts: Sequence[str] = PARTS
    sweep: Sequence[float] = (0.1, 0.5, 0.9)
    sweep_seeds: int = 1
    frames: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    limit: int = 128 << 20
    own: Sequence[str] = ()

    def at(self, seed: int, length: int) -> Setup:
        return dataclasses.replace(self.setup, seed=seed, seconds=self.setup.seconds * length)

    def comparisons(self, length: int) -> Iterator[tuple[str, int, list[Setting]]]:
        """(part, seeds, settings) at a length."""
        main = {way: Setting(way, self.alpha, self.beta) for way in WAYS}
        wanted = {
            "accuracy": [PLAIN, *(main[way] for way in TRAINABLE)],
            "paper": [Setting(way, *TENTH) for way in TRAINABLE],
            "carried": [main["carried"]] if "carried" in main else [],
            "shared": [main["shared"]] if length <= SHORT and "shared" in main else [],
            "prompt": [main[way] for way in (GENERIC, "empty", "generic memory") if way in main],
        }
        for part, settings in wanted.items():
            if part in self.parts and settings:
                yield part, self.seeds, settings
        if self.own:
            yield "own", self.seeds, [Setting(way, self.alpha, self.beta, OWN) for way in self.own]
        if "sweep" in self.parts and length <= SHORT:
            grid = [Setting(ATTENTION, alpha, beta) for alpha in self.sweep for beta in self.sweep]
            yield "sweep", min(self.seeds, self.sweep_seeds), grid

    def needed(self, length: int, seed: int) -> list[Setting]:
        """All settings that answer this seed's questions, references among them."""
        found = {PLAIN: None}
        for _, seeds, settings in self.comparisons(length):
            for setting in settings if seed < seeds else ():
                found[setting] = None
                if setting != PLAIN and (setting.weights == GIVEN or ATTENTION in self.own):
                    found[setting.reference] = None
        return list(found)

    def work(self, length: int, setting: Setting) -> int:
        """Of a seed's questions: frames that are looked at with a question, or what takes as long."""
        way, setup = WAYS[setting.way], self.at(0, length)
        frames = len(setup.times(setup.world(0)))
        if setting == PLAIN or (way.scores in adacm2_watch.BLIND and not way.carry_queries):
            return round(COSTS * frames * self.setup.examples)
        return frames * self.setup.examples // (self.setup.questions if way.memory != "question" else 1)

    def __len__(self) -> int:
        """All work there is."""
        pairs = [(length, seed) for length in self.lengths for seed in range(self.seeds)] if self.asks else []
        return sum(self.work(length, setting) for length, seed in pairs for setting in self.needed(length, seed))

    @property
    def asks(self) -> bool:
        """Whether any question is asked."""
        return bool(self.own) or any(part != "memory" for part in self.parts)


def run(
    models: Mapping[str, AdaCM2Model], plan: Plan, results: Results, progress: Callable[[str, int], None]
) -> list[dict]:
    """Answers what `results` do not have yet and compares: rows of plain values, ready for JSON.

    models: by way those with weights of their own, and at "" the one trained without eviction.
    """
    rows = []
    keys = Keys(models)
    for length in plan.lengths if plan.asks else ():
        told: dict[tuple[int, Setting], list[str]] = {}
        clips = [Clips(plan.at(seed, length)) for seed in range(plan.seeds)]
        fits = _fits(models[""], plan, length)
        for seed, clip in enumerate(clips):
            for setting in plan.needed(length, seed):
                if setting == PLAIN and not fits:
                    progress("", plan.work(length, setting))
                    continue
                model = models[setting.way if setting.weights == OWN else ""]
                key = keys(length, seed, setting)
                if (have := results.get(key)) is None:
                    have = results.put(key, {"told": clip.answers(model, setting)})
                progress(f"{length}x {setting}", plan.work(length, setting))
                told[seed, setting] = have["told"]
            clip.forget()
        for part, seeds, settings in plan.comparisons(length):
            for setting in settings:
                if (0, setting) in told:
                    size = tokens_kept(models[""], setting, len(clips[0].times), plan.setup.size)
                    place = {"part": part, "length": length, **dataclasses.asdict(setting), "cache": size}
                    rows += [place | row for row in _compare(clips[:seeds], told, setting)]
    return rows


class Keys:
    """By what answers are known again, key(length, seed, setting); weights of their own belong to it."""

    def __init__(self, models: Mapping[str, AdaCM2Model]):
        self._weights = {way: fingerprint(model.model) for way, model in models.items() if way}

    def __call__(self, length: int, seed: int, setting: Setting) -> dict:
        key = {"benchmark": "claims adacm2", "length": length, "seed": seed, "setting": str(setting)}
        return key | ({"weights": self._weights[setting.way]} if setting.weights == OWN else {})


def left(models: Mapping[str, AdaCM2Model], plan: Plan, results: Results) -> int:
    """The work that `run` has still to do."""
    keys = Keys(models)
    return sum(
        plan.work(length, setting)
        for length in (plan.lengths if plan.asks else ())
        for seed in range(plan.seeds)
        for setting in plan.needed(length, seed)
        if results.get(keys(length, seed, setting)) is None and (setting != PLAIN or _fits(models[""], plan, length))
    )


def _fits(model: AdaCM2Model, plan: Plan, length: int) -> bool:
    """Whether a video of this length can be watched without eviction."""
    frames = len(plan.at(0, length).times(plan.at(0, length).world(0)))
    return cache_bytes(model, frames, plan.setup.size) <= plan.limit


class Clips:
    """The worlds of a setup with the questions on them, rendered and encoded once for all settings."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.worlds, self.asked = world.ask(setup)
        self.times = setup.times(self.worlds[0])
        self._rendered = [Rendered(one, setup) for one in self.worlds]
        self._features: dict[str, dict[int, np.ndarray]] = {}

    @cached_property
    def batches(self) -> list[np.ndarray]:
        """int [V, A] each: questions, a row a video; short rows and the last batch repeat their last one."""
        of_video: dict[int, list[int]] = {}
        for n, one in enumerate(self.asked):
            of_video.setdefault(one.video, []).append(n)
        rows = [here + here[-1:] * (self.setup.questions - len(here)) for here in of_video.values()]
        size = max(1, ROWS // self.setup.questions)
        size = -(-len(rows) // -(-len(rows) // size))  # no more batches than needed, all of one size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [np.array(part + part[-1:] * (size - len(part))) for part in parts]

    def features(self, model: AdaCM2Model, videos: Sequence[int]) -> np.ndarray:
        """[V, T, P, C] of these worlds."""
        have = self._features.setdefault(fingerprint(model.model.vision), {})
        for video in videos:
            if video not in have:
                frames = self._rendered[video].render(self.times, self.setup.size)
                have[video] = adacm2_watch.encode(model, frames)
        return np.stack([have[video] for video in videos])

    def forget(self) -> None:
        """Lets the frames and their features go."""
        self._features, self._rendered = {}, [Rendered(one, self.setup) for one in self.worlds]

    def answers(self, model: AdaCM2Model, setting: Setting) -> list[str]:
        """What a model says to all questions."""
        way, told = WAYS[setting.way], [""] * len(self.asked)
        layers = model.model.config.qformer.cross_layers
        policy = Policy((setting.alpha,) * layers, (setting.beta,) * layers, way.scores)
        prompts = model.begin([one.text for one in self.asked])
        words = _words(model, prompts.instruction)
        ids, places = (_cut(x, prompts.ids) for x in (prompts.ids, prompts.places))
        right = model.tokenizer([one.answer for one in self.asked], add_special_tokens=False)["input_ids"]
        longest = -(-(max(map(len, right)) + 1) // STEP) * STEP  # what is longer than all right answers is wrong
        for number, here in enumerate(self.batches):
            rows, each = here.ravel(), here.shape[1]
            texts = {
                name: words[name][rows] if name == "question" else np.repeat(words[name], len(here), axis=0)
                for name in (way.memory, way.last)
            }
            random = jax.random.fold_in(jax.random.key(self.setup.seed), number) if way.scores == "random" else None
            seen = adacm2_watch.outputs(
                model.model,
                self.features(model, [self.asked[row[0]].video for row in here]),
                texts[way.last],
                texts[way.memory],
                policy=policy,
                carry_queries=way.carry_queries,
                random=random,
            )
            if way.last != "question":
                seen = seen.repeat(each, axis=0)
            for n, text in zip(rows, adacm2_watch.answers(model, seen, ids[rows], places[rows], longest), strict=True):
                told[n] = text
        return told


def _words(model: AdaCM2Model, questions: np.ndarray) -> dict[str, np.ndarray]:
    """What the Q-Former may read: the questions [N, S], and one row each of a generic and of an empty prompt."""
    found = {"question": _cut(questions, questions)}
    for name, text in ((GENERIC, GENERIC_PROMPT), ("empty", "")):
        ids = model.words(text)["input_ids"]
        found[name] = np.full((1, -(-len(ids) // STEP) * STEP), -1, np.int32)
        found[name][0, : len(ids)] = ids
    return found


def _cut(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Without the columns in which no row of ids has a token, but for a multiple."""
    return values[:, : -(-int((ids >= 0).sum(1).max()) // STEP) * STEP]


def tokens_kept(model: AdaCM2Model, setting: Setting, frames: int, size: tuple[int, int]) -> int:
    """Tokens that a layer's cache holds at most once reduced."""
    return adacm2.largest(_tokens(model, size), setting.alpha, setting.beta, frames)


def cache_bytes(model: AdaCM2Model, frames: int, size: tuple[int, int]) -> int:
    """Bytes of all layers' keys and values of a video of which nothing is evicted."""
    config, itemsize = model.model.config.qformer, model.model.query_tokens.dtype.itemsize
    return 2 * config.cross_layers * config.width * itemsize * frames * _tokens(model, size)


def _tokens(model: AdaCM2Model, size: tuple[int, int]) -> int:
    patch = model.model.config.vision.patch
    return (size[0] // patch) * (size[1] // patch) + 1


def check(model, name) -> None:
    """Raises OptionError for a model of which there is nothing to claim."""
    if not isinstance(model, AdaCM2Model):
        raise OptionError(f"{name} is no InstructBLIP, which --system adacm2 is about; give another --model.")
    if not model.asks_once or model.words is None or model.tokenizer is None:
        raise OptionError(f"{name} cannot read questions; give one with tokenizers for its Q-Former and its decoder.")


def seconds_a_frame(model: AdaCM2Model, plan: Plan) -> float:
    """What the work of a plan takes for each of its units, measured on a few frames."""
    config, frames = model.model.config, adacm2_watch.WINDOW
    rows = min(ROWS // plan.setup.questions, -(-plan.setup.examples // plan.setup.questions))
    features = np.zeros((rows, frames + 1, _tokens(model, plan.setup.size), config.vision.width), np.float32)
    text = np.ones((rows * plan.setup.questions, 3 * STEP), np.int32)
    layers = config.qformer.cross_layers
    policy = Policy((plan.alpha,) * layers, (plan.beta,) * layers)
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(adacm2_watch.outputs(model.model, features, text, policy=policy))
        took = time.perf_counter() - start
    return took / (frames * len(text))


# --- comparing --------------------------------------------------------------------------------------------------------


def _compare(clips: Sequence[Clips], told, setting: Setting) -> list[dict]:
    """A row for each measure: its mean, and the paired differences to no eviction and to AdaCM2 at this size."""
    asked: list[Asked] = [one for clip in clips for one in clip.asked]
    videos = [f"{seed}/{one.video}" for seed, clip in enumerate(clips) for one in clip.asked]

    def said(which: Setting) -> list[str] | None:
        if any((seed, which) not in told for seed in range(len(clips))):
            return None
        return [text for seed in range(len(clips)) for text in told[seed, which]]

    others = {"none": said(PLAIN), "attention": said(setting.reference) if setting != PLAIN else None}
    return compare(asked, videos, said(setting), others)


BETTER = {  # way -> what is claimed of AdaCM2 beside it
    "random": "better than random eviction",
    "recent": "better than recency only",
    "shared": "an index set a layer is better than a shared one",
    GENERIC: "the question is better than a generic prompt",
}


def verdicts(rows: Sequence[dict]) -> list[dict]:
    """The claims on accuracy, on all questions and those without absolute time.

    One holds, or does not, where all of the 95 % interval says so; else it is open.
    """
    found = []
    for row in rows:
        if row["measure"] not in ("all", TIMELESS) or row["part"] == "sweep":
            continue
        names = ("part", "length", "alpha", "beta", "cache", "weights", "measure")
        place = {name: row[name] for name in names}
        if row["way"] == ATTENTION and "to_none" in row:
            says = f"within {100 * WITHIN:g} points of no eviction"
            values = (row[f"to_none{end}"] for end in ("", "_low", "_high"))
            found.append({"claim": says, **place, **verdict(*values, -WITHIN)})
        elif row["way"] == "carried" and "to_attention" in row:
            values = (row[f"to_attention{end}"] for end in ("", "_low", "_high"))
            found.append({"claim": "better with carried queries", **place, **verdict(*values, 0.0)})
        elif row["way"] in BETTER and "to_attention" in row:
            values = (0.0 - row[f"to_attention{end}"] for end in ("", "_high", "_low"))
            found.append({"claim": BETTER[row["way"]], **place, **verdict(*values, 0.0)})
    return found
