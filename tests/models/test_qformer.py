"""The Q-Former against transformers': InstructBLIP's with an instruction, BLIP-2's without, to 1e-5."""

import jax
import numpy as np
import pytest
import torch
import transformers

from longvid_jax import convert
from longvid_jax.errors import CheckpointError
from longvid_jax.models.qformer import QFormerConfig, looking_at
from tests.models import blip

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
FREQUENCY = 2


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(kind, cross-attention's frequency) -> transformers' Q-Former and ours."""

    def make(kind: str = "InstructBlip", frequency: int = FREQUENCY):
        qformer = {"cross_attention_frequency": frequency, "num_hidden_layers": 4}
        model, folder = blip.make(kind, text=blip.OPT, qformer=qformer), tmp_path_factory.mktemp("qformer")
        model.save_pretrained(folder)
        return model.qformer, convert.from_huggingface(folder, part="qformer")

    return make


@jax.jit
def run(qformer, queries, ids, valid, features, features_valid):
    look = looking_at(*qformer.keys_values(features), features_valid)
    return qformer(queries, qformer.embed(ids), valid, look, None)[0]


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_with_an_instruction(made, frequency):
    """Instructions of several lengths, padded ones among them; features of several lengths, padded too."""
    theirs, qformer = made(frequency=frequency)
    assert qformer.config.cross_layers == sum(layer.cross is not None for layer in qformer.layers)
    assert sum(leaf.size for leaf in jax.tree.leaves(qformer)) == sum(p.numel() for p in theirs.parameters())
    for words, real, seen in ((1, (1, 1), (5, 5)), (7, (7, 3), (17, 9)), (32, (2, 32), (1, 40))):
        queries, features = normal(2, 4, 24), normal(2, max(seen), 32)
        ids = RNG.integers(1, 50, (2, words))
        valid = np.arange(words) < np.array(real)[:, None]
        features_valid = np.arange(max(seen)) < np.array(seen)[:, None]
        with torch.no_grad():
            expected = theirs(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(np.concatenate([np.ones((2, 4), bool), valid], 1)).long(),
                query_embeds=torch.tensor(queries),
                encoder_hidden_states=torch.tensor(features),
                encoder_attention_mask=torch.tensor(features_valid).long(),
            ).last_hidden_state[:, :4]
        got = run(qformer, queries, ids, valid, features, features_valid)
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["InstructBlip", "Blip2"])
def test_without_an_instruction(made, kind):
    theirs, qformer = made(kind)
    assert (qformer.words is None) == (kind == "Blip2")
    queries, features = normal(2, 4, 24), normal(2, 17, 32)
    given = {"query_embeds": torch.tensor(queries), "encoder_hidden_states": torch.tensor(features)}
    if kind == "InstructBlip":
        given["input_ids"] = None
    with torch.no_grad():
        expected = theirs(**given).last_hidden_state.numpy()
    got = run(qformer, queries, None, None, features, None)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    if kind == "Blip2":  # it does not read
        np.testing.assert_array_equal(run(qformer, queries, np.ones((2, 3), int), None, features, None), got)


def test_blip2_that_takes_words(tmp_path):
    """It matches texts to images; its words are outside of its Q-Former, and its heads are of no use here."""
    model = blip.make("Blip2", head="ForImageTextRetrieval", text=blip.OPT, qformer={"use_qformer_text_input": True})
    model.save_pretrained(tmp_path)
    qformer = convert.from_huggingface(tmp_path, part="qformer")
    ids, queries, features = RNG.integers(1, 50, (2, 6)), normal(2, 4, 24), normal(2, 17, 32)
    valid = np.arange(6) < np.array([6, 2])[:, None]
    with torch.no_grad():
        embedded = model.embeddings(torch.tensor(ids), query_embeds=torch.tensor(queries))
        expected = model.qformer(
            query_embeds=embedded,
            query_length=4,
            attention_mask=torch.tensor(np.concatenate([np.ones((2, 4), bool), valid], 1)).long(),
            encoder_hidden_states=torch.tensor(features),
        ).last_hidden_state[:, :4]
    got = run(qformer, queries, ids, valid, features, None)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5, rtol=0)


def test_a_look_carries_what_it_remembers(made):
    """It is called once for each layer that cross-attends, with its number and what the one before returned."""
    _, qformer = made()
    queries, features = normal(1, 4, 24), normal(1, 10, 32)
    keys, values = qformer.keys_values(features)
    counted = []

    def look(index, q, carry):
        counted.append(index)
        context, _ = looking_at(keys, values)(index, q, None)
        return context, carry + 1

    got, carry = jax.jit(lambda qformer, queries: qformer(queries, None, None, look, 0))(qformer, queries)
    assert carry == qformer.config.cross_layers == 2
    assert counted == [0, 1]
    np.testing.assert_allclose(got, run(qformer, queries, None, None, features, None), atol=1e-6)


def test_config():
    for made in (transformers.InstructBlipQFormerConfig(), transformers.Blip2QFormerConfig()):
        assert QFormerConfig.from_huggingface(made.to_dict(), 1408) == QFormerConfig()
    assert QFormerConfig.from_huggingface({}, 1408) == QFormerConfig()
    with pytest.raises(CheckpointError, match="hidden_act is 'relu'"):
        QFormerConfig.from_huggingface({"hidden_act": "relu"}, 32)
