"""The tokenizer of the world: words and digits are tokens, anything can be said, transformers loads it."""

import pytest
from transformers import AutoTokenizer

from longvid_jax.data.tokenizer import SPECIAL, byte_tokenizer, save_tokenizer
from longvid_jax.video.synthetic import World, sentences, vocabulary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(byte_tokenizer(sentences()), folder, max_length=4096)
    return AutoTokenizer.from_pretrained(folder)


def test_words_are_tokens(tokenizer):
    for word in vocabulary():
        # Some words only begin sentences, and no space is before them.
        assert 1 in [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, f" {word}")], word
    ids = tokenizer("from 12 to 345 seconds", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["from", " ", "1", "2", " to", " ", "3", "4", "5", " seconds"]
    assert len(tokenizer) < 700


def test_what_is_written_is_read(tokenizer):
    texts = [text for q in World(3).questions(14) for text in (q.text, q.answer)]
    for text in [*texts, "Größe 10\n\tüber 語 🎬", "no such word: xylophone"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens(tokenizer):
    assert [len(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in SPECIAL] == [1] * len(SPECIAL)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "<|video_pad|>" in tokenizer.chat_template


def test_without_sentences_a_token_is_a_byte():
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() == 256 + len(SPECIAL)
    assert len(tokenizer.encode("red circle").ids) == 10
