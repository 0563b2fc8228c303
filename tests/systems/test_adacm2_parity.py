"""AdaCM2 as a system against transformers' InstructBLIP: logits to 1e-4, answers token for token."""

import dataclasses
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import longvid_jax as lv
from longvid_jax.models.layers import Embed
from tests.models import blip

pytestmark = pytest.mark.parity

TOKENS = 17  # of a frame: 4 x 4 patches and the class
WORDS, PROMPTS = (7, 4, 1), (9, 4, 6)  # lengths of the instructions and of the prompts behind the queries
NEW = 6  # tokens of an answer


@pytest.fixture(scope="module")
def original():
    """A random InstructBLIP."""
    model = blip.make()
    model.qformer.config._attn_implementation = "eager"  # gives attention weights, too
    return model


@pytest.fixture(scope="module")
def stops(original):
    """Two tokens at which its answers to what `given` asks end now here, now there."""
    tokens, _ = generated(original, given("left"), [blip.LLAMA["vocab_size"]])
    for pair in itertools.combinations(sorted(set(tokens[:, 1:-1].ravel())), 2):
        ends = [end(row, pair) for row in tokens]
        if len(set(ends)) == len(ends):
            return [int(token) for token in pair]
    raise AssertionError("no two tokens end all answers at places of their own")


def end(answer, stops):
    """How many tokens of an answer are real, a stop token among them."""
    return next((n for n, token in enumerate(answer, 1) if token in stops), len(answer))


@pytest.fixture(scope="module")
def folder(original, stops, tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructblip")
    original.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


@pytest.fixture(scope="module")
def load(folder):
    """load(**choices): the model with a method of its own, or the plain one."""
    plain = lv.load(folder)

    def load(**choices):
        method = lv.AdaCM2(**choices) if choices else None
        return type(plain)(plain.model, plain.settings, method=method)

    return load


def tensors(given):
    return {name: torch.tensor(value) for name, value in given.items()}


def given(layout="processor", seed=0):
    """What generate() takes of three images: instructions padded on the right, prompts on the left.

    layout: of the prompts. "processor": image tokens, padding, words; "left": padding, image tokens, words; "words":
    as the latter, but without image tokens, which only we take.
    """
    rng = np.random.default_rng(seed)
    batch, longest = len(PROMPTS), max(PROMPTS)
    told = rng.integers(1, blip.QFORMER["vocab_size"], (batch, max(WORDS)))
    valid = np.arange(max(WORDS)) < np.array(WORDS)[:, None]
    ids = rng.integers(3, blip.IMAGE, (batch, longest))
    padding = np.arange(longest) < longest - np.array(PROMPTS)[:, None]
    ids, mask, image = np.where(padding, 0, ids), ~padding, np.full((batch, blip.QUERIES), blip.IMAGE)
    if layout != "words":
        ids, mask = np.concatenate([image, ids], axis=1), np.concatenate([image > 0, mask], axis=1)
    if layout == "left":  # stable: padding first, all else in order
        order = np.argsort(mask, axis=1, kind="stable")
        ids, mask = np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)
    return {
        "pixel_values": rng.normal(size=(batch, 3, 28, 28)).astype(np.float32),
        "qformer_input_ids": np.where(valid, told, 0),
        "qformer_attention_mask": valid.astype(np.int64),
        "input_ids": ids,
        "attention_mask": mask.astype(np.int64),
    }


def generated(model, given, stops, **how):
    """New tokens [B, n] of transformers' generate, 0 behind a stop token, and logits [B, n, V]."""
    out = model.generate(
        **tensors(given),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=stops,
        pad_token_id=0,
        **how,
    )
    sequences = out.sequences.numpy()
    start = given["input_ids"].shape[1] if sequences.shape[1] > NEW else 0
    tokens = sequences[:, start:].copy()
    for row in tokens:  # searching, transformers fills up with a stop token where the padding is token 0
        row[end(row, stops) :] = 0
    return tokens, torch.stack(out.logits, dim=1).numpy()


@pytest.fixture(scope="module")
def greedy(original, stops):
    """The layout of the prompts -> tokens and logits, and the length of each answer."""
    found = {layout: generated(original, given(layout), stops) for layout in ("processor", "left")}
    assert np.abs(found["left"][1]).max() > 0.5
    return {layout: (*made, [end(row, stops) for row in made[0]]) for layout, made in found.items()}


def same(out, tokens, logits, counts):
    """Token for token, and the logits as far as each answer goes."""
    np.testing.assert_array_equal(out.tokens, tokens)
    for row, count in enumerate(counts):
        np.testing.assert_allclose(out.logits[row, :count], logits[row, :count], atol=1e-4, rtol=0)


@pytest.mark.parametrize("choices", [{}, {"alpha": 0.1, "beta": 0.1}], ids=str)
@pytest.mark.parametrize("layout", ["processor", "left", "words"])
def test_one_frame_is_transformers(load, greedy, layout, choices):
    """The first frame is seen whole, whatever then stays of it; prompts and instructions of different lengths."""
    out = load(**choices).generate(**given(layout), max_new_tokens=NEW)
    same(out, *greedy["left" if layout == "words" else layout])


def test_frame_positions_of_zero_change_nothing(load, greedy):
    model = load(alpha=0.1, beta=0.1)
    model = type(model)(with_positions(model.model, np.zeros((5, 32))), model.settings, method=model.method)
    videos = given()
    videos["pixel_values"] = videos["pixel_values"][:, None]
    same(model.generate(**videos, max_new_tokens=NEW), *greedy["processor"])


def with_positions(module, table):
    """A copy of a network with embeddings [frames, width] of frame numbers."""
    graph, state = nnx.split(module)
    module = nnx.merge(graph, state)
    module.config = dataclasses.replace(module.config, num_frames=len(table))
    module.frames = Embed(*table.shape, dtype=jnp.float32, rngs=nnx.Rngs(0))
    module.frames.embedding.set_value(jnp.asarray(table, jnp.float32))
    return module


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 5},
        {"num_beams": 5, "length_penalty": -1.0},
        {"num_beams": 5, "length_penalty": 2.0, "min_new_tokens": 3},
        {"num_beams": 1, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_searched_answers_are_transformers(original, load, stops, how):
    for layout in ("processor", "left"):
        expected, _ = generated(original, given(layout), stops, **how)
        out = load(alpha=0.1, beta=0.1).generate(**given(layout), max_new_tokens=NEW, **how)
        np.testing.assert_array_equal(out.tokens, expected)
        assert out.logits is None


# --- many frames ----------------------------------------------------------------------------------------------------

LENGTHS = (19, 3, 17)
PLACES = np.random.default_rng(8).normal(size=(40, 32)) * 0.5


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(5)
    frames = rng.normal(size=(3, max(LENGTHS), 3, 28, 28)).astype(np.float32)
    return {**given("left"), "pixel_values": frames}


def seen(original, videos, row, places=None):
    """Features of the frames of one row [T, P, C], from transformers' tower, with their embeddings added."""
    with torch.no_grad():
        features = original.vision_model(torch.tensor(videos["pixel_values"][row, : LENGTHS[row]])).last_hidden_state
    return features if places is None else features + torch.tensor(places[: LENGTHS[row], None], dtype=torch.float32)


def instruction(videos, row):
    return torch.tensor(videos["qformer_input_ids"][row : row + 1, : WORDS[row]])


def said(original, videos, row, outputs):
    """transformers' logits [N, V] behind the prompt of one row, for outputs [1, Q, width] of the Q-Former."""
    ids = torch.tensor(videos["input_ids"][row : row + 1, -PROMPTS[row] :])
    words = original.get_input_embeddings()(ids)
    x = torch.cat([original.language_projection(outputs), words], dim=1)
    with torch.no_grad():
        return original.language_model(inputs_embeds=x).logits[0, -1].numpy()


@pytest.mark.parametrize(
    ("choices", "places"), [({}, None), ({"alpha": 1.0, "beta": 1.0}, PLACES)], ids=["plain", "ones"]
)
def test_where_nothing_is_evicted_it_looks_at_all_frames(original, load, videos, choices, places):
    """The plain model, and alpha = beta = 1: transformers' Q-Former looks at the features of all frames at once."""
    mask, model = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None], load(**choices)
    if places is not None:
        model = type(model)(with_positions(model.model, places), model.settings, method=model.method)
    out = model.generate(**videos, frame_mask=mask, max_new_tokens=1)
    for row in range(3):
        features = seen(original, videos, row, places).flatten(0, 1)[None]
        with torch.no_grad():
            outputs = original.qformer(
                input_ids=instruction(videos, row),
                query_embeds=original.query_tokens,
                encoder_hidden_states=features,
            ).last_hidden_state[:, : blip.QUERIES]
        expected = said(original, videos, row, outputs)
        np.testing.assert_allclose(out.logits[row, 0], expected, atol=1e-4, rtol=0)
    assert (np.asarray(out.trace.length) == np.array(LENGTHS) * TOKENS).all()


@pytest.fixture
def watching(original, monkeypatch):
    """watching(features [T, P, C], instruction, shares, carry): AdaCM2 on transformers' own Q-Former.

    Each cross-attention layer has a list of features of its own, which it looks at in place of those that it is given.
    """

    def watch(features, instruction, alpha, beta, carry):
        layers = [each.crossattention.attention for each in original.qformer.encoder.layer if each.has_cross_attention]
        held, sources, drawn = [[] for _ in layers], [[] for _ in layers], [None] * len(layers)
        for index, layer in enumerate(layers):

            def forward(hidden_states, *_, index=index, layer=layer, **__):
                features = torch.stack(held[index])[None]
                context, weights = type(layer).forward(layer, hidden_states, encoder_hidden_states=features)
                drawn[index] = weights.double().sum((0, 1, 2)).tolist()
                return context, weights

            monkeypatch.setattr(layer, "forward", forward)
        queries = original.query_tokens
        for number, frame in enumerate(features):
            for index in range(len(layers)):
                held[index] += list(frame)
                sources[index] += [(number, place) for place in range(len(frame))]
            with torch.no_grad():
                outputs = original.qformer(
                    input_ids=instruction, query_embeds=queries, encoder_hidden_states=frame[None]
                ).last_hidden_state[:, : blip.QUERIES]
            queries = outputs if carry else original.query_tokens
            for index, (a, b) in enumerate(zip(alpha, beta, strict=True)):
                length = len(held[index])
                older = length - max(1, math.floor(a * length + 0.5))
                count = max(1, math.ceil(b * older - 1e-9))
                best = sorted(sorted(range(older), key=lambda i: -drawn[index][i])[:count])
                keep = best + list(range(older, length))
                held[index], sources[index] = ([x[index][i] for i in keep] for x in (held, sources))
        return outputs, sources

    return watch


@pytest.mark.parametrize(("alpha", "beta", "carry"), [((0.1, 0.1), (0.1, 0.1), False), ((0.5, 0.2), (0.5, 0.4), True)])
def test_algorithm_1_on_transformers_own_networks(original, load, videos, watching, alpha, beta, carry):
    """The same tokens stay in each layer of each row, and the logits agree: 19, 3 and 17 frames side by side."""
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    model = load(alpha=alpha, beta=beta, carry_queries=carry)
    model = type(model)(with_positions(model.model, PLACES), model.settings, method=model.method)
    out = model.generate(**videos, frame_mask=mask, max_new_tokens=1)
    for row in range(3):
        outputs, sources = watching(seen(original, videos, row, PLACES), instruction(videos, row), alpha, beta, carry)
        for layer, kept in enumerate(sources):
            np.testing.assert_array_equal(out.trace.kept[layer][row], kept)
        np.testing.assert_allclose(out.logits[row, 0], said(original, videos, row, outputs), atol=1e-4, rtol=0)
    assert sources[0] != sources[1]
