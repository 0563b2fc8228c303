"""ReTaKe against what the authors' own PyTorch code gives for tiny random Qwen2-VL models."""

import functools

import numpy as np
import pytest

import longvid_jax as lv
from tests.systems import golden


@functools.cache
def run(name: str, stacked: bool):
    model = lv.load(golden.FOLDER / name, method=golden.method(name), stacked=stacked)
    return model.generate(**golden.inputs(golden.vectors(name)), max_new_tokens=6, return_cache=True)


def close(ours, theirs):
    """Within 1e-3 of the largest magnitude, the project's bound (seen: 1e-6)."""
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stack"])
@pytest.mark.parametrize("name", golden.CASES)
class TestGenerate:
    def test_kept_indices_are_the_authors(self, name, stacked):
        out, vectors = run(name, stacked), golden.vectors(name)
        expected = {key: value for key, value in vectors.items() if key.startswith("kept_l")}
        assert len(expected) == len(out.trace.kept) * len(out.trace.kept[0])
        for layer, chunks in enumerate(out.trace.kept):
            for chunk, kept in enumerate(chunks):
                np.testing.assert_array_equal(kept[0], expected[f"kept_l{layer}_c{chunk}"])
                assert out.trace.kept_count[layer][chunk] == [len(kept[0])]

    def test_tokens_and_logits(self, name, stacked):
        out, vectors = run(name, stacked), golden.vectors(name)
        np.testing.assert_array_equal(out.tokens[0], vectors["new_tokens"])
        close(np.asarray(out.logits[0]), vectors["logits"])

    def test_caches_and_positions(self, name, stacked):
        out, vectors = run(name, stacked), golden.vectors(name)
        cache, valid = out.cache, np.asarray(out.cache.valid[0])
        for layer, length in enumerate(vectors["cache_len"]):
            assert valid.sum() == length
            close(np.asarray(cache.keys[layer][0])[:, valid], vectors[f"key_cache_{layer}"])
            close(np.asarray(cache.values[layer][0])[:, valid], vectors[f"value_cache_{layer}"])
            positions = np.asarray(cache.positions[layer][0])[valid].T[:, None]
            np.testing.assert_array_equal(positions, vectors[f"position_cache_{layer}"])


@pytest.mark.parametrize("length", [2, 3, 6, 32])
@pytest.mark.parametrize("name", golden.CASES)
def test_watching_in_windows_gives_the_same(name, length):
    """begin / watch / answer with any window, the odd one too, is generate."""
    model, vectors = lv.load(golden.FOLDER / name, method=golden.method(name)), golden.vectors(name)
    question = golden.with_tokenizer(model, vectors)
    pixels = golden.frames(vectors)
    memory = model.begin(question, expected_frames=len(pixels))
    for frames in golden.windows(pixels, length):
        memory = model.watch(memory, frames)
    answer = model.answer(memory, max_new_tokens=6)
    np.testing.assert_array_equal(answer.tokens[0], vectors["new_tokens"])
    for layer, chunks in enumerate(answer.trace.kept):
        for chunk, kept in enumerate(chunks):
            np.testing.assert_array_equal(kept[0], vectors[f"kept_l{layer}_c{chunk}"])
    assert answer.trace.frames == [len(pixels)]
    assert answer.text == " ".join(f"t{token}" for token in vectors["new_tokens"])


@pytest.mark.parametrize("name", [case for case in golden.CASES if "dpselect" in case])
def test_keyframes_of_the_stream_are_the_authors(name):
    out, vectors = run(name, False), golden.vectors(name)
    tokens = len(vectors["keypatches_mask"]) // len(out.trace.keyframes[0])
    shares = vectors["keypatches_mask"].reshape(-1, tokens).mean(-1)
    np.testing.assert_allclose(out.trace.keyframes[0], shares, atol=1e-6)


def test_features_are_the_authors():
    name = "pivotkv_r50"
    from longvid_jax.systems import retake_steps as steps

    model, vectors = lv.load(golden.FOLDER / name).model, golden.vectors(name)
    t, h, w = vectors["video_grid_thw"][0]
    patches = vectors["pixel_values_videos"].astype(np.float32).reshape(1, t, h * w, -1)
    features = steps.encode_patches(model, patches, grid=(int(h), int(w)))
    close(np.asarray(features[0]).reshape(-1, features.shape[-1]), vectors["video_embeds"])


def test_yarn_was_off_in_the_authors_case_and_is_on_in_ours():
    """The case named after YaRN holds keys of plain rotation; YaRN in force makes them 1.1386 times as long."""
    name = "pivotkv_dynamic_yarn"
    vectors = golden.vectors(name)
    model = lv.load(golden.FOLDER / name, method=golden.method(name, yarn_factor=4))
    cache = model.generate(**golden.inputs(vectors), max_new_tokens=1, return_cache=True).cache
    text = np.flatnonzero(vectors["input_ids"][0] == model.settings.video_token)[0]
    ours, theirs = np.asarray(cache.keys[0][0])[:, :text], vectors["key_cache_0"][:, :text]
    np.testing.assert_allclose(np.linalg.norm(ours) / np.linalg.norm(theirs), 0.1 * np.log(4) + 1, rtol=1e-5)
