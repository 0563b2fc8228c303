"""`longvid assemble rewind`: three checkpoints become one, whose parts are theirs to the bit."""

import json
import re
import shutil

import numpy as np
import pytest
import transformers

import longvid_jax as lv
from longvid_jax import convert
from longvid_jax.data.tokenizer import INSTRUCTION, bert_tokenizer, world_tokenizer
from longvid_jax.models.paths import leaves
from tests.models import blip

pytestmark = pytest.mark.parity
SIZES = "--width 24 --perceiver-layers 3 --heads 2 --ff-width 40 --num-queries 4"
NEW = f"{SIZES} --detail-tokens 4 --contrast-width 8".split()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A vision tower and Q-Former in an InstructBLIP, a BERT and a Llama, each with its tokenizer."""
    folder, vision = tmp_path_factory.mktemp("sources"), {"num_hidden_layers": 1}
    blip.make(vision=vision, qformer={"num_hidden_layers": 4}).save_pretrained(folder / "blip")
    words, tokens = bert_tokenizer(), world_tokenizer()
    about = {**blip.BERT, "vocab_size": len(words), "max_position_embeddings": 32}
    blip.randomise(transformers.BertModel(transformers.BertConfig(**about))).save_pretrained(folder / "bert")
    words.save_pretrained(folder / "bert")
    about = {**blip.LLAMA, "vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id}
    blip.randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**about))).save_pretrained(folder / "llama")
    tokens.save_pretrained(folder / "llama")
    return folder


def parts_of(sources, **changed):
    given = {"vision": sources / "blip", "text": sources / "bert", "llm": sources / "llama", **changed}
    return [word for name, path in given.items() for word in (f"--{name}", path)]


def arrays(module):
    return {leaf.path: np.asarray(leaf.value) for leaf in leaves(module)}


def test_the_parts_are_those_of_the_sources(sources, succeeds, tmp_path):
    target = tmp_path / "rewind"
    words = ["assemble", "rewind", target, *parts_of(sources), *NEW, "--json"]
    told = json.loads(succeeds(*words, "--perceiver", sources / "blip", "--seed", 1)[0])
    assert told["target"] == str(target) and told["bytes"] > 0
    made, source = convert.from_huggingface(target), convert.from_huggingface(sources / "blip")
    bert, llama = (convert.from_huggingface(sources / name) for name in ("bert", "llama"))
    for part, expected in ((made.vision, source.vision), (made.text, llama)):
        ours, theirs = arrays(part), arrays(expected)
        assert ours.keys() == theirs.keys()
        for path, array in ours.items():
            np.testing.assert_array_equal(array, theirs[path])
    theirs = {path: array for path, array in arrays(bert).items() if not path.startswith("pooler")}
    ours = arrays(made.bert)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in ours)

    held, qformer = arrays(made.perceiver), arrays(source)
    np.testing.assert_array_equal(held["query_tokens"], qformer["query_tokens"])
    for ours, theirs in ((0, 0), (1, 2)):  # every second layer of the Q-Former looks at the video
        for name in ("cross/q/kernel", "cross/o/bias", "mlp/fc1/kernel"):
            at = f"qformer/layers/{theirs:02d}/{name.replace('mlp', 'query_mlp')}"
            np.testing.assert_array_equal(held[f"layers/{ours:02d}/{name}"], qformer[at])
    assert held["layers/02/cross/q/kernel"].std() > 0 and not held["layers/02/cross/q/bias"].any()

    # It watches and answers, with the sources' tokenizers.
    model = lv.load(target, method=lv.ReWind(num_candidates=4, num_selected=2))
    frames = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 3), dtype=np.uint8)
    answer = model.ask(lv.Video(frames), "is it red?", max_new_tokens=3)
    assert answer.trace.frames == [9] and answer.tokens.shape[0] == 1
    assert (target / INSTRUCTION / "tokenizer.json").is_file()


def test_what_is_new_comes_from_the_seed(sources, succeeds, tmp_path):
    found = []
    for n, seed in enumerate((0, 0, 5)):
        succeeds("assemble", "rewind", tmp_path / str(n), *parts_of(sources), *NEW, "--seed", seed)
        found.append(arrays(convert.from_huggingface(tmp_path / str(n))))
    for path, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][path])
    assert not np.array_equal(found[0]["perceiver/query_tokens"], found[2]["perceiver/query_tokens"])


def test_parts_that_do_not_fit(sources, fails, tmp_path):
    target = tmp_path / "rewind"
    bare, larger = tmp_path / "bare", tmp_path / "larger"
    shutil.copytree(sources / "llama", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(sources / "bert", larger)
    shutil.copyfile(sources / "llama" / "tokenizer.json", larger / "tokenizer.json")
    faults = (
        ({"vision": sources / "llama"}, [], "is a llama model; give an InstructBLIP or BLIP-2"),
        ({"text": sources / "llama"}, [], "--text .*is a llama model; give a BERT"),
        ({"llm": sources / "bert"}, [], "--llm .*is a bert model; give a Llama or Vicuna"),
        ({"llm": bare}, [], "--llm .* has no tokenizer"),
        ({"text": larger}, [], "its tokenizer has tokens up to .*, but its embedding .* rows"),
        ({}, ["--perceiver", sources / "llama"], "has no Q-Former"),
        ({}, ["--perceiver", sources / "blip", "--width", 32], "would have the shape .*, but needs"),
        ({}, ["--heads", 5], "width is 24, which must be divisible by 5"),
    )
    for changed, more, fault in faults:
        line = fails("assemble", "rewind", target, *parts_of(sources, **changed), *NEW, *more)
        assert re.search(fault, line), line
        assert not target.exists()
