"""BERT against transformers' BertModel, to 1e-5; and the forms in which its checkpoints come."""

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from longvid_jax import convert
from longvid_jax.errors import CheckpointError
from longvid_jax.models.bert import BertConfig
from tests.models import blip

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 50, (3, 20))
VALID = np.arange(20) < np.array([20, 13, 1])[:, None]
run = jax.jit(lambda bert, ids, valid: bert(ids, valid))


def make(name: str = "BertModel", seed: int = 0, **how):
    return blip.randomise(getattr(transformers, name)(transformers.BertConfig(**blip.BERT), **how), seed)


def check(model, bert, ids=IDS, valid=VALID):
    """Of tokens that are padding nothing is asked."""
    with torch.no_grad():
        theirs = getattr(model, "bert", model)(torch.tensor(ids), attention_mask=torch.tensor(valid).long())
    tokens, pooled = run(bert, ids, valid)
    np.testing.assert_allclose(tokens[valid], theirs.last_hidden_state.numpy()[valid], atol=1e-5, rtol=0)
    first = theirs.last_hidden_state[:, 0] if theirs.pooler_output is None else theirs.pooler_output
    np.testing.assert_allclose(pooled, first.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stacked", [False, True])
def test_tokens_and_pooled(tmp_path, stacked):
    model = make()
    model.save_pretrained(tmp_path)
    bert = convert.from_huggingface(tmp_path, stacked=stacked)
    check(model, bert)
    check(model, bert, IDS[:, :1], VALID[:, :1])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(bert)) == count


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM"])
def test_heads_of_pretraining_are_left_out(tmp_path, name):
    """BertForMaskedLM has no pooler."""
    model = make(name)
    model.save_pretrained(tmp_path)
    bert = convert.from_huggingface(tmp_path)
    assert (bert.pooler is None) == (name == "BertForMaskedLM")
    check(model, bert)
    again = convert.from_huggingface(convert.to_orbax(tmp_path, tmp_path / "converted"))
    jax.tree.map(np.testing.assert_array_equal, again, bert)


def test_a_classifier_is_not_left_out_silently(tmp_path):
    make("BertForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="classifier.weight: no parameter has this name"):
        convert.from_huggingface(tmp_path)


def test_old_names(tmp_path):
    """gamma and beta, and a buffer, as the first checkpoints have them."""
    model = make("BertForPreTraining")
    model.save_pretrained(tmp_path)
    file, old = tmp_path / "model.safetensors", {}
    for key, tensor in load_file(file).items():
        old[key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    save_file({**old, "bert.embeddings.position_ids": np.arange(32)[None]}, file, {"format": "pt"})
    check(model, convert.from_huggingface(tmp_path))


def test_a_folder_of_sentence_transformers(tmp_path):
    model = make(add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    for name in ("1_Pooling/config.json", "2_Normalize/config.json", "modules.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    check(model, convert.from_huggingface(tmp_path))
    converted = convert.to_orbax(tmp_path, tmp_path / "converted")
    assert sorted(path.name for path in converted.iterdir()) == [
        "config.json",
        "modules.json",
        "params",
        "provenance.json",
    ]


@pytest.mark.parametrize("pooler", [True, False])
def test_comes_and_goes(tmp_path, pooler):
    model = make(add_pooling_layer=pooler)
    model.save_pretrained(tmp_path / "torch")
    bert = convert.from_huggingface(tmp_path / "torch")
    config = convert.open_source(tmp_path / "torch").config
    folder = convert.save_huggingface(bert, config, tmp_path / "ours", convert.table_for(config))
    again, report = transformers.BertModel.from_pretrained(folder, add_pooling_layer=pooler, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        given = torch.tensor(IDS), torch.tensor(VALID).long()
        assert torch.equal(again(*given).last_hidden_state, model(*given).last_hidden_state)


def test_config():
    assert BertConfig.from_huggingface(transformers.BertConfig().to_dict()) == BertConfig()
    assert BertConfig.from_huggingface({"model_type": "bert"}) == BertConfig()
    with pytest.raises(
        CheckpointError, match="position_embedding_type is 'relative_key', but only 'absolute' is known"
    ):
        BertConfig.from_huggingface({"position_embedding_type": "relative_key"})
    with pytest.raises(CheckpointError, match="hidden_act is 'relu'"):
        BertConfig.from_huggingface({"hidden_act": "relu"})
