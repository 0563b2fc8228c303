"""The tiny checkpoint is one that others can read, and is what it says."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import longvid_jax as lv
from longvid_jax.evaluate import tiny

SIZES = {"width": 64, "depth": 2, "vision_width": 32, "vision_depth": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", **SIZES)


def test_same_seed_same_weights(folder, tmp_path):
    first = load_file(folder / "model.safetensors")
    again = load_file(tiny.write_checkpoint(tmp_path / "again", **SIZES) / "model.safetensors")
    other = load_file(tiny.write_checkpoint(tmp_path / "other", seed=1, **SIZES) / "model.safetensors")
    assert first.keys() == again.keys() == other.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["lm_head.weight"], other["lm_head.weight"])


def test_tokenizer(folder):
    from transformers import AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    text = "Why? Où? 何？\n\x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config["video_token_id"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert len(tokenizer) == config["vocab_size"]
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "<|vision_start|><|video_pad|><|vision_end|>Why?<|im_end|>" in prompt


def test_says_printable_ascii_that_hangs_on_the_video(folder):
    model = lv.load(folder, method=lv.ReTaKe(keep_ratio=0.5, chunk_frames=4))
    rng = np.random.default_rng(0)
    texts = {
        model.ask(lv.Video(rng.integers(0, 256, (4, 56, 56, 3)).astype(np.uint8)), "Why?", max_new_tokens=8).text
        for _ in range(4)
    }
    assert len(texts) > 1
    assert all(" " <= c <= "~" for text in texts for c in text)


@pytest.mark.parity
def test_transformers_loads_it_whole(folder):
    from transformers import Qwen2VLForConditionalGeneration

    model, report = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == sum(
        tensor.size for tensor in load_file(folder / "model.safetensors").values()
    )


def test_does_not_overwrite(folder):
    with pytest.raises(lv.CheckpointError, match="already exists"):
        tiny.write_checkpoint(folder)
