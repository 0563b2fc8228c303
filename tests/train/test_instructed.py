"""One step of AdaCM2's recipe against plain PyTorch, and what of the frames teaches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longvid_jax import convert
from longvid_jax.memory.adacm2 import Policy
from longvid_jax.models.instructblip import InstructBlip, InstructBlipConfig
from longvid_jax.models.layers import Embed
from longvid_jax.models.paths import leaves
from longvid_jax.scale.mesh import make_mesh
from longvid_jax.train import instructed, losses, optimizer
from longvid_jax.train.feed import on_device
from longvid_jax.train.instructed import instructed_tokens
from longvid_jax.train.parameters import split
from longvid_jax.train.state import init, make_train_step

TRAINED = ("qformer/.*", "query_tokens", "projection/.*", "frames/.*")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
VIDEOS, ASKED, FRAMES, QUERIES, POSITIONS = 8, 2, 3, 4, 8
EVICTING = Policy((0.3, 0.4), (0.3, 0.6))  # of a Q-Former with two layers that look at frames
HOW = {"policy": Policy((0.3,), (0.3,)), "carry_queries": False, "stop_gradient": False, "remat": "none"}


def batch(videos: int = VIDEOS, shown=((1, 1, 1), (1, 1, 0))) -> dict[str, np.ndarray]:
    """Questions of several lengths, answers at their ends; every second video is shorter, and stands later."""
    rng = np.random.default_rng(0)
    words = np.full((videos, ASKED, 8), -1, np.int32)
    tokens, places = (np.full((videos, ASKED, 16), -1, np.int32) for _ in range(2))
    weights = np.zeros(tokens.shape, np.float32)
    for row in np.ndindex(videos, ASKED):
        before, length, read = rng.integers(0, 3), rng.integers(10, 17), rng.integers(3, 9)
        words[*row, :read] = rng.integers(1, 50, read)
        tokens[*row, :length] = rng.integers(3, 59, length)
        tokens[*row, before : before + QUERIES] = 0
        places[*row, before : before + QUERIES] = np.arange(QUERIES)
        weights[*row, length - 4 : length - 1] = 1
    targets = np.maximum(np.roll(tokens, -1, axis=-1), 0)
    number = np.stack([np.arange(FRAMES) if n % 2 == 0 else 2 + 3 * np.arange(FRAMES) for n in range(videos)])
    return {
        "frames": rng.integers(0, 256, (videos, FRAMES, 28, 28, 3), dtype=np.uint8),
        "number": number.astype(np.int32),
        "shown": np.array([shown[n % 2] for n in range(videos)], bool),
        "words": words,
        "tokens": tokens,
        "places": places,
        "targets": targets,
        "weights": weights,
    }


def loss_and_gradients(params, frozen, given, *, structure, **how):
    """The mean loss of the answers' tokens, and its gradient by path."""

    def loss(params):
        module = structure.module({**params, **frozen})
        each, _ = instructed_tokens(module, given, **how, mean=MEAN, std=STD)
        weights = given["weights"].reshape(each.shape)
        return (each * weights).sum() / weights.sum()

    return jax.value_and_grad(loss)(params)


STATIC = ("structure", "policy", "carry_queries", "stop_gradient", "remat")
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # it runs only once
compiled = jax.jit(loss_and_gradients, static_argnames=STATIC, compiler_options=QUICKLY)


def step(module, given, run=compiled, **how) -> tuple[float, dict[str, np.ndarray]]:
    """What loss_and_gradients gives of the module's trained parameters, for HOW and other choices than those."""
    structure, params, frozen = split(module, TRAINED)
    value, gradient = run(params, frozen, given, structure=structure, **{**HOW, **how})
    return float(value), {path: np.asarray(array) for path, array in gradient.items()}


def assert_same(one: tuple, other: tuple, atol: float) -> None:
    assert one[0] == pytest.approx(other[0], abs=atol)
    assert one[1].keys() == other[1].keys()
    for path, expected in other[1].items():
        np.testing.assert_allclose(one[1][path], expected, atol=atol * max(1, np.abs(expected).max()), err_msg=path)


# --- against PyTorch --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random InstructBLIP of transformers, and its folder."""
    from tests.models import blip

    small = {"num_hidden_layers": 1}
    model = blip.make(
        text=blip.LLAMA | small, vision=small, qformer={"num_hidden_layers": 2, "cross_attention_frequency": 1}
    )
    folder = tmp_path_factory.mktemp("blip")
    model.save_pretrained(folder)
    return model, folder


def positions() -> np.ndarray:
    """A row for each frame number."""
    return np.random.default_rng(1).normal(0, 0.2, (POSITIONS, 32)).astype(np.float32)


def ours(folder) -> InstructBlip:
    module = convert.from_huggingface(folder, stacked=True)
    module.frames = Embed(POSITIONS, 32, dtype=jnp.float32, rngs=nnx.Rngs(0))
    module.frames.embedding.set_value(jnp.asarray(positions()))
    module.config = dataclasses.replace(module.config, num_frames=POSITIONS)
    return module


def their_step(model, given, policy: Policy, *, carry_queries: bool, stop_gradient: bool):
    """Loss, and gradients by name: one question at a time, frame by frame, with a cache that grows and is cut."""
    import torch

    model.zero_grad()
    table = torch.tensor(positions(), requires_grad=True)
    total = weight = 0.0
    for video in range(len(given["frames"])):
        pixels = (given["frames"][video] / 255 - np.array(MEAN)) / np.array(STD)
        pixels = torch.tensor(pixels.astype(np.float32)).permute(0, 3, 1, 2)
        features = model.vision_model(pixel_values=pixels).last_hidden_state
        for question in range(ASKED):
            words = torch.tensor(given["words"][video, question], dtype=torch.long)
            seen = their_watch(
                model, features, table, given["number"][video][given["shown"][video]], words[words >= 0], policy,
                carry_queries=carry_queries, stop_gradient=stop_gradient,
            )  # fmt: skip
            row = {name: given[name][video, question] for name in ("tokens", "places", "targets", "weights")}
            length = int((row["tokens"] >= 0).sum())
            tokens, targets = (torch.tensor(row[name][:length], dtype=torch.long) for name in ("tokens", "targets"))
            x = model.language_model.get_input_embeddings()(tokens)
            projected = model.language_projection(seen)
            x = torch.stack([x[n] if at < 0 else projected[at] for n, at in enumerate(row["places"][:length])])
            logits = model.language_model(inputs_embeds=x[None], use_cache=False).logits[0]
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            total = total + (each * torch.tensor(row["weights"][:length])).sum()
            weight += float(row["weights"].sum())
    (total / weight).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return (total / weight).item(), gradients | {"frame_positions.weight": table.grad.numpy()}


def their_watch(model, features, table, numbers, words, policy: Policy, *, carry_queries: bool, stop_gradient: bool):
    """The outputs [Q, C] of the last frame (algorithm 1)."""
    import torch

    former, outputs = model.qformer, None
    crossing = [layer for layer in former.encoder.layer if layer.has_cross_attention]
    cache = [(torch.zeros(0, 24), torch.zeros(0, 24)) for _ in crossing]
    for frame, number in enumerate(numbers):
        f = features[frame] + table[min(int(number), POSITIONS - 1)]
        queries = model.query_tokens[0]
        if carry_queries and outputs is not None:
            queries = outputs.detach() if stop_gradient else outputs
        x = former.embeddings(input_ids=words[None], query_embeds=queries[None])[0]
        layers = iter(range(len(crossing)))
        for layer in former.encoder.layer:
            maps = layer.attention.attention
            context, _ = attention(maps.query(x), maps.key(x), maps.value(x), maps.num_attention_heads)
            x = layer.attention.output(context, x)
            q, said = x[:QUERIES], x[QUERIES:]
            if layer.has_cross_attention:
                n, maps = next(layers), layer.crossattention.attention
                past = [part.detach() if stop_gradient else part for part in cache[n]]
                k, v = (torch.cat([old, new(f)]) for old, new in zip(past, (maps.key, maps.value), strict=True))
                context, probabilities = attention(maps.query(q), k, v, maps.num_attention_heads)
                q = layer.crossattention.output(context, q)
                kept = survivors(probabilities.sum((0, 1)), policy.alpha[n], policy.beta[n])
                cache[n] = k[kept], v[kept]
            q = layer.output_query(layer.intermediate_query(q), q)
            x = torch.cat([q, layer.output(layer.intermediate(said), said)])
        outputs = x[:QUERIES]
    return outputs


def attention(q, k, v, heads: int):
    import torch

    q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))
    probabilities = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
    return (probabilities @ v).transpose(0, 1).reshape(q.shape[1], -1), probabilities


def survivors(importance, alpha: float, beta: float):
    """Indices of the tokens that stay: the newest, and of the older ones those that drew the most attention."""
    import torch

    length = len(importance)
    recent = max(1, math.floor(alpha * length + 0.5))
    older = length - recent
    kept = max(1, math.ceil(beta * older)) if older else 0
    best = torch.argsort(importance[:older], descending=True, stable=True)[:kept]
    return torch.cat([best.sort().values, torch.arange(older, length)])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("carry_queries", "stop_gradient"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["learned", "learned-stopped", "carried", "carried-stopped"],
)
def test_loss_and_gradients(theirs, carry_queries, stop_gradient):
    model, folder = theirs
    how, given = {"carry_queries": carry_queries, "stop_gradient": stop_gradient}, batch(2)
    expected_loss, expected = their_step(model, given, EVICTING, **how)
    remat = "full" if carry_queries else "none"
    value, gradient = step(ours(folder), given, policy=EVICTING, **how, remat=remat)
    assert value == pytest.approx(expected_loss, abs=1e-4)

    table, source = convert.table_for(convert.open_source(folder).config), {}
    for path, array in gradient.items():
        key, op = table.source(path)
        source[key] = op.invert(array)
    expected = {table.spelling(key): array for key, array in expected.items()}
    assert not any(key.startswith(("vision_model", "language_model")) for key in source)
    if (
        carry_queries and stop_gradient
    ):  # then no gradient reaches the learned queries, with which the first frame began
        expected["query_tokens"] = np.zeros_like(source["query_tokens"])
    for key, array in source.items():
        largest = np.abs(expected[key]).max()
        np.testing.assert_allclose(array, expected[key], atol=1e-4 * max(1, largest), rtol=0, err_msg=key)
    alive = {key for key in source if np.abs(expected[key]).max() > 1e-5}
    # All but the last layer's words, which no query sees any more, and biases of keys, which no softmax feels.
    unseen = {key for key in source if key.endswith("key.bias") or ".layer.1.output." in key}
    unseen |= {key for key in source if ".layer.1.intermediate." in key}
    unseen |= {"query_tokens"} if carry_queries and stop_gradient else set()
    assert source.keys() - alive <= unseen


# --- without PyTorch --------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
QFORMER = {"vocab_size": 50, "max_position_embeddings": 32}
ALL = Policy((1.0,), (1.0,))
CONFIG = {
    "model_type": "instructblip",
    "num_query_tokens": QUERIES,
    "num_frame_positions": POSITIONS,
    "vision_config": SIZES | {"image_size": 28, "patch_size": 7},
    "qformer_config": SIZES | QFORMER,
    "text_config": SIZES | {"model_type": "llama", "vocab_size": 60},
}


@pytest.fixture(scope="module")
def module():
    """One in which no parameter is small, so that all have gradients that can be told apart."""
    settings, rng = InstructBlipConfig.from_huggingface(CONFIG), np.random.default_rng(2)
    structure, params, _ = split(jax.eval_shape(lambda: InstructBlip(settings, stacked=True, rngs=nnx.Rngs(0))))
    around = {path: float(path.endswith("/scale")) for path in params}
    return structure.module(
        {path: jnp.asarray(rng.normal(around[path], 0.15, x.shape), jnp.float32) for path, x in params.items()}
    )


def test_one_look_at_all_frames_is_watching_without_forgetting(module, monkeypatch):
    whole, ragged = batch(shown=((1, 1, 1), (1, 1, 1))), batch(shown=((1, 1, 0), (1, 0, 0)))
    at_once = [step(module, given, policy=ALL) for given in (whole, ragged)]
    monkeypatch.setattr(instructed, "_looking_at_all", None)
    monkeypatch.setattr(instructed.adacm2, "ratio", lambda alpha, beta: 0.5)  # as if something were forgotten
    watching = jax.jit(
        lambda *given, **how: loss_and_gradients(*given, **how), static_argnames=STATIC, compiler_options=QUICKLY
    )
    for given, expected in zip((whole, ragged), at_once, strict=True):
        assert_same(step(module, given, watching, policy=ALL), expected, 1e-5)


def test_remat_changes_nothing(module):
    assert_same(step(module, batch(), remat="full"), step(module, batch()), 1e-6)


def test_frames_that_are_not_shown_do_not_matter(module):
    given, other = batch(), batch()
    other["frames"][1, 2], other["number"][1, 2] = 7, 6
    for carry_queries in (False, True):
        how = {"carry_queries": carry_queries}
        assert_same(step(module, other, **how), step(module, given, **how), 1e-7)


@pytest.mark.parametrize("policy", [HOW["policy"], ALL], ids=["evicting", "keeping"])
def test_stopped_only_the_last_frame_teaches(module, policy):
    """Without carried queries: of the frame positions those of each video's last frame alone."""
    given = batch()
    given["number"] = np.tile(np.array([[0, 1, 2], [3, 5, 6]], np.int32), (VIDEOS // 2, 1))  # the last is not shown
    rows = {}
    for stop in (False, True):
        _, gradient = step(module, given, policy=policy, stop_gradient=stop)
        rows[stop] = np.abs(gradient["frames/embedding"]).max(1)
    np.testing.assert_array_equal(rows[True] > 0, [0, 0, 1, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(rows[False] > 0, [1, 1, 1, 1, 0, 1, 0, 0])


def test_a_video_that_stands_later_begins_with_the_learned_queries(module):
    """With carried queries too, and whatever number its first frame has."""
    given = batch(shown=((1, 0, 0), (1, 0, 0)))
    assert given["number"][1, 0] > 0
    assert_same(step(module, given, carry_queries=True), step(module, given), 1e-6)


def test_a_step_over_devices(module):
    """Spread over eight, gradients are those of one; what is frozen stays to the bit, and what is trained moves."""
    mesh, how = make_mesh(data=2, fsdp=4), {"lr": 1e-2, "weight_decay": 0.0, "clip": None}
    update, schedule = optimizer.make(how, 2)

    def loss(module, given):
        flat = {"weights": given["weights"].reshape(VIDEOS, -1), "groups": jnp.zeros((VIDEOS, 1), jnp.int32)}
        return losses.sums(*instructed_tokens(module, given, **HOW, mean=MEAN, std=STD), flat)

    with jax.set_mesh(mesh):
        structure, state = init(jax.tree.map(jnp.array, module), update, TRAINED, mesh=mesh)
        assert {path.split("/")[0] for path in state.frozen} == {"vision", "text"}
        run = make_train_step(structure, loss, update, schedule)
        run = jax.jit(run, donate_argnums=0, compiler_options=QUICKLY)
        new, metrics = run(state, on_device(batch(), mesh))
    assert all(len(array.sharding.device_set) == 8 for array in new.trainable.values())
    assert metrics["finite"] and metrics["weight"] == 3 * VIDEOS * ASKED
    moments = optax.tree.get(new.opt_state, "mu")  # after one step a tenth of the gradient
    gradient = {path: 10 * np.asarray(array) for path, array in moments.items()}
    assert_same((float(metrics["loss"]), gradient), step(module, batch()), 1e-5)

    before = {leaf.path: np.asarray(leaf.value) for leaf in leaves(module)}
    assert new.frozen.keys() | new.trainable.keys() == before.keys()
    for path, array in new.frozen.items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)
    still = {path for path, array in new.trainable.items() if np.array_equal(array, before[path])}
    # The last layer's words, which no query sees any more, and at most biases of keys, which no softmax feels.
    unseen = {path for path in new.trainable if path.startswith("qformer/layers/00/mlp")}
    assert unseen <= still and all(path.endswith("k/bias") for path in still - unseen)
