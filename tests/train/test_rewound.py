"""ReWind's losses: answers as the system would give them, and SigLIP's against NumPy."""

import dataclasses
import functools
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longvid_jax as lv
from longvid_jax.errors import OptionError
from longvid_jax.evaluate.rewind_watch import Variant
from longvid_jax.models.layers import FeedForward, exact_gelu
from longvid_jax.models.paths import leaves
from longvid_jax.models.perceiver import Contrast
from longvid_jax.scale.mesh import make_mesh
from longvid_jax.systems.query_prompts import padded
from longvid_jax.train import config, tasks
from longvid_jax.train.parameters import split
from longvid_jax.train.rewound import GLIMPSES, Looking, _glimpses, contrast, noting, rewound_tokens
from longvid_jax.train.siglip import siglip
from tests.systems.small_adacm2 import QUESTIONS, batch_of
from tests.systems.small_rewind import CHOICES, make
from tests.train.runs import run

LOOKING = Looking(**CHOICES)
LENGTHS = (10, 3)  # frames of two videos: more than a clip, and fewer than are candidates
FRAMES = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lv.load(make(tmp_path_factory.mktemp("rewind")), method=lv.ReWind(**CHOICES))


def questions_about(model, pixels, looking=LOOKING) -> dict[str, np.ndarray]:
    """Two questions about each of two videos, whose answers are three tokens."""
    count = looking.vectors(model.model.config, FRAMES)
    words, rows = np.full((2, 2, 24), -1, np.int32), {}
    tokens, places = (np.full((2, 2, count + 48), -1, np.int32) for _ in range(2))
    weights = np.zeros(tokens.shape, np.float32)
    for v, a in np.ndindex(2, 2):
        question = QUESTIONS[v + a]
        ids, where = (x[0] for x in model._prompts([question]))
        at, end = int(np.argmax(where == 0)), int((ids >= 0).sum())
        row = [*ids[:at], *[0] * count, *ids[at + 1 : end], *(7, 8, 9)]
        tokens[v, a, : len(row)] = row
        places[v, a, at : at + count] = np.arange(count)
        weights[v, a, len(row) - 4 : len(row) - 1] = 1
        told = model.words(question)["input_ids"]
        words[v, a, : len(told)] = told
    frames = np.zeros((2, FRAMES, 28, 28, 3), np.uint8)
    for v, length in enumerate(LENGTHS):
        frames[v, :length] = pixels[10 * v : 10 * v + length]
    rows["targets"] = np.maximum(np.roll(tokens, -1, axis=-1), 0)
    shown = np.arange(FRAMES) < np.array(LENGTHS)[:, None]
    return (
        rows
        | {"frames": frames, "shown": shown, "words": words, "tokens": tokens, "places": places}
        | {"weights": weights}
    )


def tokens_of(module, batch, looking=LOOKING):
    return program(looking)(module, batch)


@functools.cache
def program(looking):
    return jax.jit(partial(rewound_tokens, looking=looking, mean=MEAN, std=STD))


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (45, 28, 28, 3), dtype=np.uint8)


class WithGaps(Variant):
    """Tells nothing that was written of the frames that are `seen`."""

    def _placed(self, memory, written, selected):
        each, kept = memory.written.tokens.shape[2], []
        for ids, places, seen in zip(*super()._placed(memory, written, selected), self.seen, strict=True):
            of_memory = (places >= 0) & (places < memory.written.capacity * each)
            hidden = of_memory & np.pad(seen, (0, memory.written.capacity))[np.maximum(places, 0) // each]
            kept.append((ids[~hidden], places[~hidden]))
        ids, places = zip(*kept, strict=True)
        return padded(ids), padded(places)


@pytest.mark.parametrize(
    ("frames", "memory", "gaps"),
    [
        ("selected", True, False),
        ("selected", False, False),
        ("uniform", False, False),
        ("oracle", True, False),
        ("oracle", True, True),
    ],
)
def test_answers_are_as_likely_as_the_system_says(model, pixels, frames, memory, gaps):
    """Of the first token of each answer, from the logits that answer() decodes from: whole and ragged."""
    assert (model.settings.mean, model.settings.std) == (MEAN, STD)
    looking = dataclasses.replace(LOOKING, memory=memory, frames=frames, gaps=gaps)
    batch = questions_about(model, pixels, looking)
    batch["seen"] = np.random.default_rng(1).random((2, 2, FRAMES)) < 0.4
    batch["seen"][1, 0] = False
    kind = WithGaps if gaps else Variant
    asked = (
        kind(model, model.choices, memory=memory, frames=frames) if (frames, memory) != ("selected", True) else model
    )
    each, _ = tokens_of(model.model, batch, looking)
    each = np.asarray(each).reshape(batch["tokens"].shape)
    for v, a in np.ndindex(2, 2):
        watched = asked.begin(QUESTIONS[v + a])
        asked.seen = batch["seen"][v, a][None]
        for window in batch_of([pixels[10 * v : 10 * v + LENGTHS[v]]], 6):
            watched = asked.watch(watched, window)
        out, _ = asked._decode(asked.finish(watched), max_new_tokens=1, keep_logits=True)
        expected = -np.asarray(jax.nn.log_softmax(out.logits[0, 0]))[7]
        first = int(np.argmax(batch["weights"][v, a]))
        # The system keeps details in bfloat16.
        np.testing.assert_allclose(each[v, a, first], expected, atol=5e-3)


LEARNED = {
    "detailed": {"memory": False, "frames": "oracle"},
    "glimpses": {"memory": False, "frames": "glimpses"},
    "gaps": {"gaps": True},
    "gaps_detailed": {"gaps": True, "frames": "oracle"},
    "gaps_glimpses": {"gaps": True, "frames": "glimpses"},
}


@pytest.mark.parametrize("name", LEARNED)
def test_what_teaches_to_look_at_details(model, pixels, name):
    """Other frames, while memory is neither told nor trained, or has gaps where it would tell the answer."""
    told = LEARNED[name]
    looking = dataclasses.replace(LOOKING, **told)
    batch = questions_about(model, pixels, looking)
    batch["seen"] = np.random.default_rng(1).random((2, 2, FRAMES)) < 0.4
    about = SimpleNamespace(rewind=dataclasses.asdict(LOOKING), mean=MEAN, std=STD)
    tokens = tasks.task(name).tokens(about)

    @partial(jax.grad, has_aux=True)
    def grads_of(module):
        each, right = tokens(module, batch)
        return each.sum(), (each, right)

    grads, (each, right) = jax.jit(grads_of)(model.model)
    expected = tokens_of(model.model, batch, looking)
    np.testing.assert_allclose(each, expected[0], atol=1e-5)
    np.testing.assert_array_equal(right, expected[1])
    if looking.memory:
        assert np.abs(np.asarray(each - tokens_of(model.model, batch)[0])).max() > 1e-3
    moved = {leaf.path for leaf in leaves(grads) if np.abs(np.asarray(leaf.value)).max() > 0}
    assert "detail_projection/kernel" in moved
    memory = {path for path in moved if path.startswith(("perceiver/", "memory/", "memory_projection/kernel"))}
    assert bool(memory) == told.get("memory", True)


def test_glimpses():
    """So many of the frames that show it as GLIMPSES has in turns, or all; the rest among the others, 8 in all."""
    valid = np.arange(30) < np.array([30] * 6 + [20, 5])[:, None]
    seen = np.zeros(valid.shape, bool)
    seen[:4, 10:22] = True
    seen[4, 3] = True
    seen[6:, :3] = True
    chosen = _glimpses(jnp.asarray(seen), jnp.asarray(valid), 8)
    counts = []
    for row, (indices, real) in enumerate(zip(*map(np.asarray, chosen), strict=True)):
        frames = indices[real]
        assert (np.diff(frames) > 0).all() and valid[row, frames].all()
        counts.append(int(seen[row, frames].sum()))
        turn = GLIMPSES[(row + 30 + int(seen[row].argmax())) % 4] if seen[row].any() else 0
        assert counts[-1] == min(turn, seen[row].sum())
        assert len(frames) == min(8 - turn, (valid[row] & ~seen[row]).sum()) + counts[-1]
    assert sorted(counts[:4]) == [1, 2, 4, 8]


def test_all_that_is_trained_has_a_gradient(model, pixels):
    """But what only the last clip's tokens would change if there were another: their keys."""
    batch = questions_about(model, pixels)
    trained = ("perceiver/.*", "memory/.*", "memory_projection/.*", "detail_projection/.*", "separator")
    structure, params, frozen = split(model.model, trained)

    @jax.jit
    def gradient(params):
        each, _ = rewound_tokens(
            structure.module({**params, **frozen}), batch, looking=LOOKING, mean=MEAN, std=STD, remat="full"
        )
        return (each * batch["weights"].reshape(each.shape)).sum()

    def loss(params):
        return gradient(params)

    grads = jax.grad(loss)(params)
    still = {path for path, g in grads.items() if not np.abs(np.asarray(g)).max() > 1e-7}
    assert all(path.endswith("/k/bias") for path in still), still  # which no softmax feels
    rng = np.random.default_rng(3)
    along = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in params.items()}
    step = 1e-3
    up, down = (float(gradient({p: x + s * along[p] for p, x in params.items()})) for s in (step, -step))
    slope = sum(float((np.asarray(g, np.float64) * along[path]).sum()) for path, g in grads.items())
    assert slope == pytest.approx((up - down) / (2 * step), rel=2e-2)


def test_truncation_and_unrolling_change_no_value(model, pixels):
    batch = questions_about(model, pixels)
    late, along = (dataclasses.replace(LOOKING, **how) for how in ({"truncate": 1}, {"unroll": 2}))
    values = []
    for looking in (LOOKING, late, along):
        values.append(np.asarray(tokens_of(model.model, batch, looking)[0]))
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    np.testing.assert_allclose(values[0], values[2], atol=1e-5)


def test_what_is_noted_is_far_from_facts_as_numpy_says(model, pixels):
    """From the memory that the system writes, alone for each question, in float64."""
    config = model.model.config
    facts = FeedForward(6, 8, config.text.width, exact_gelu, dtype=jnp.float32, rngs=nnx.Rngs(3))
    batch, rng = questions_about(model, pixels), np.random.default_rng(5)
    batch["groups"] = np.where(batch["tokens"] >= 0, 1, -1).reshape(2, -1)
    batch["facts"] = rng.normal(size=(2, 2, 2 * FRAMES, 6)) * (rng.random((2, 2, 2 * FRAMES, 1)) < 0.2)
    batch["seen"] = rng.random((2, 2, FRAMES)) < 0.3
    batch["weights"][1, 1] = 0  # was not asked
    found = {}
    for weight in (0.0, 0.5):
        looking = dataclasses.replace(LOOKING, relevance=weight)
        run = jax.jit(partial(noting, facts=facts, looking=looking, mean=MEAN, std=STD))
        found[weight] = jax.tree.map(float, run(model.model, jax.tree.map(jnp.asarray, batch)))

    wanted = np.asarray(facts(jnp.asarray(batch["facts"], jnp.float32)), np.float64)
    real = batch["facts"].any(-1) & (batch["weights"].max(-1) > 0)[..., None]
    size = np.square(wanted)[real].sum() / real.sum()
    total, right, missed = 0.0, 0, 0.0
    for v, a in [(0, 0), (0, 1), (1, 0)]:
        memory = model.begin(QUESTIONS[v + a])
        for frames in batch_of([pixels[10 * v : 10 * v + LENGTHS[v]]], 6):
            memory = model.watch(memory, frames)
        written = model.finish(memory).written
        tokens = np.zeros((FRAMES, 2, config.perceiver.width), np.float32)
        tokens[: LENGTHS[v]] = written.tokens[0, : LENGTHS[v]]
        told = np.asarray(model.model.memory_projection(tokens), np.float64).reshape(2 * FRAMES, -1)
        distance = np.square(told - wanted[v, a]).sum(-1) / size
        total += (distance * np.where(real[v, a], 1, 0.05)).sum()
        right += (real[v, a] & (distance < 0.1)).sum()
        seen = batch["seen"][v, a, : LENGTHS[v]]
        share = model.answer(memory).trace.relevance[0][seen].sum() / config.perceiver.heads
        missed -= math.log(share) if seen.any() else 0
    assert found[0.0][0] == pytest.approx(total, rel=1e-4)
    assert found[0.0][1:] == (real.sum(), {"right": right, "tokens": (batch["tokens"] >= 0).sum()})
    assert found[0.5][0] == pytest.approx(total + 0.5 * missed, rel=1e-4)


def test_nothing_to_tell(model, pixels):
    """A batch of questions about what never happens has a loss all the same."""
    facts = FeedForward(6, 8, model.model.config.text.width, exact_gelu, dtype=jnp.float32, rngs=nnx.Rngs(3))
    batch = questions_about(model, pixels)
    batch |= {"groups": np.zeros((2, 4), np.int32), "facts": np.zeros((2, 2, 2 * FRAMES, 6))}
    run = jax.jit(partial(noting, facts=facts, looking=LOOKING, mean=MEAN, std=STD))
    total, count, _ = run(model.model, jax.tree.map(jnp.asarray, batch))
    assert np.isfinite(total) and total > 0 and count == 0


# --- SigLIP -----------------------------------------------------------------------------------------------------------


def by_pairs(video, caption, temperature, offset):
    """Each pair for itself, float64."""
    total = 0.0
    for a, v in enumerate(video):
        for b, u in enumerate(caption):
            logit = (1 if a == b else -1) * (math.exp(temperature) * float(v @ u) + offset)
            total += math.log1p(math.exp(-logit))
    return total


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    both = rng.normal(size=(2, 16, 6))
    return both / np.linalg.norm(both, axis=-1, keepdims=True)


@pytest.mark.parametrize(("temperature", "offset"), [(math.log(10), -10.0), (0.3, 0.5)])
def test_siglip(vectors, temperature, offset):
    given = [jnp.asarray(x, jnp.float32) for x in (*vectors, temperature, offset)]
    assert float(siglip(*given)) == pytest.approx(by_pairs(*vectors, temperature, offset), rel=1e-5)
    alone = jax.jit(jax.value_and_grad(siglip, argnums=(0, 1, 2, 3)))(*given)
    for axes in ({"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 4}):
        with jax.set_mesh(make_mesh(**axes)):
            spread = jax.jit(jax.value_and_grad(siglip, argnums=(0, 1, 2, 3)))(*given)
        assert float(spread[0]) == pytest.approx(float(alone[0]), rel=1e-6)
        for one, other in zip(spread[1], alone[1], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_no_device_holds_all_captions(vectors):
    given = [jax.ShapeDtypeStruct((16, 6), jnp.float32)] * 2 + [jax.ShapeDtypeStruct((), jnp.float32)] * 2
    with jax.set_mesh(make_mesh(data=8)):
        text = jax.jit(jax.grad(siglip)).lower(*given).compile().as_text()
    assert "collective-permute" in text and "all-gather" not in text


def test_contrast(model, pixels):
    """Frames that are not shown, and clips of none, change nothing; the n-th caption is the n-th video's."""
    module = nnx.merge(*nnx.split(model.model))
    module.contrast = nnx.data(Contrast(module.config.perceiver, 8, rngs=nnx.Rngs(0)))
    captions = np.full((2, 24), -1, np.int32)
    for row, text in zip(captions, QUESTIONS, strict=False):
        told = model.words(text)["input_ids"]
        row[: len(told)] = told
    batch = questions_about(model, pixels)
    given = {"frames": batch["frames"], "shown": batch["shown"], "captions": captions}

    @jax.jit
    def of(given):
        return contrast(module, given, looking=LOOKING, mean=MEAN, std=STD)

    total, count, more = of(given)
    assert count == 2 and more["tokens"] == (captions >= 0).sum()
    longer = {**given, "shown": np.pad(given["shown"], ((0, 0), (0, 4)))}
    longer["frames"] = np.pad(given["frames"], ((0, 0), (0, 4), (0, 0), (0, 0), (0, 0)), constant_values=9)
    longer["captions"] = np.pad(captions, ((0, 0), (0, 8)), constant_values=-1)[:, :24]
    np.testing.assert_allclose(of(longer)[0], total, rtol=1e-5)
    turned = {name: x[::-1] for name, x in given.items()}
    np.testing.assert_allclose(of(turned)[0], total, rtol=1e-5)


def test_a_model_of_another_kind(tmp_path):
    for name in ("contrast", "rewound", *LEARNED):
        with pytest.raises(OptionError, match="the tasks 'contrast', .* need a model of type rewind; change the stage"):
            tasks.task(name).batches(None, SimpleNamespace(settings=None), seed=0)
    wanted = config.load("rewind:smoke_pretrain")
    wanted.model.contrast_width = 0
    with pytest.raises(OptionError, match="needs a model with contrast_width"):
        run(wanted, tmp_path / "run")
