"""Qwen2-VL against transformers: the vision tower's modules to 1e-5, the whole model's logits to 1e-4."""

import json

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLModel,
    get_vision_attention_seqlens,
    get_vision_position_ids,
)

import longvid_jax as lv
from longvid_jax.models.qwen2_vl import vision_angles

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
PATCH_WIDTH = 3 * 2 * 4 * 4
VIDEO, START, END = 118, 115, 116
ROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]}


def released_rope_index(self, input_ids, mm_token_type_ids, video_grid_thw=None, attention_mask=None, **_):
    """M-RoPE's positions as Qwen2-VL was released with (transformers 4.48, which the golden vectors come from).

    Text goes on behind the largest position of the video on any axis. transformers 5.23 forgets the time axis there
    (`current_pos += max(grid_thw[1], grid_thw[2])`), so videos of more temporal patches than rows and columns differ.
    """
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    deltas = []
    for row, grid in enumerate(video_grid_thw.tolist()):
        real = mask[row].bool()
        video = (mm_token_type_ids[row][real] == 2).nonzero()[:, 0]
        first, last, length = int(video[0]), int(video[-1]), int(real.sum())
        assert last + 1 - first == len(video)
        size = (grid[0], grid[1] // 2, grid[2] // 2)
        where = np.stack(np.unravel_index(np.arange(np.prod(size)), size)) + first
        behind = where.max() + 1 + np.arange(length - 1 - last)
        parts = [np.tile(np.arange(first), (3, 1)), where, np.tile(behind, (3, 1))]
        positions[:, row, real] = torch.tensor(np.concatenate(parts, axis=1))
        deltas.append(positions[:, row, real].max() + 1 - length)
    return positions, torch.tensor(deltas)[:, None]


def test_released_positions_are_the_golden_ones(golden_dir):
    for case in ("pivotkv_r50", "chunked_prefill"):
        golden = np.load(golden_dir / "retake" / case / "golden.npz")
        video_token = json.loads((golden_dir / "retake" / case / "config.json").read_text())["video_token_id"]
        ids, grid = torch.tensor(golden["input_ids"]), torch.tensor(golden["video_grid_thw"])
        positions, _ = released_rope_index(None, ids, 2 * (ids == video_token), grid)
        np.testing.assert_array_equal(positions, golden["position_ids"])


@pytest.fixture(scope="module", autouse=True)
def positions_as_released():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2VLModel, "get_rope_index", released_rope_index)
        yield


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("Qwen2VLForConditionalGeneration", rope_parameters=ROPE, eos_token_id=119)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


GRIDS = [(1, 4, 4), (3, 4, 6), (2, 8, 2), (5, 2, 10), (4, 12, 12)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_features(model, grid):
    """Frames do not see each other; grids that are not square; one temporal patch and several."""
    frames, rows, columns = grid
    patches = normal(frames, rows * columns, PATCH_WIDTH)
    with torch.no_grad():
        flat = torch.tensor(patches.reshape(-1, PATCH_WIDTH))
        expected = model.torch.model.visual(flat, grid_thw=torch.tensor([grid])).pooler_output.numpy()
    tower = jax.jit(lambda model, patches: model.vision(patches, (rows, columns)))
    got = tower(model.ours(), patches)
    assert got.shape == (frames, rows * columns // 4, 64)
    np.testing.assert_allclose(got, expected.reshape(got.shape), atol=1e-5, rtol=0)
    if grid == GRIDS[1]:
        np.testing.assert_allclose(tower(model.ours(stacked=True), patches), got, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 6, 2), (1, 2, 8)], ids=str)
def test_angles(model, grid):
    rotary = model.torch.model.visual.rotary_pos_emb
    positions = get_vision_position_ids(torch.tensor([grid]), 2)
    cos, sin = rotary(torch.zeros(1), positions)
    angles = vision_angles(model.ours().config.vision, grid[1:])
    half = angles.shape[1]
    np.testing.assert_allclose(np.cos(angles), cos.numpy()[:, :half], atol=1e-6)
    np.testing.assert_allclose(np.sin(angles), sin.numpy()[:, :half], atol=1e-6)


def test_modules(model):
    theirs, ours = model.torch.model.visual, model.ours().vision
    grid, x, patches = (4, 6), normal(24, 32), normal(24, PATCH_WIDTH)
    grid_thw = torch.tensor([[1, *grid]])
    embedding = theirs.rotary_pos_emb(torch.tensor(x), get_vision_position_ids(grid_thw, 2))
    lengths, longest = get_vision_attention_seqlens(grid_thw, theirs.config)
    block, their_block = ours.blocks[0], theirs.blocks[0]
    with torch.no_grad():
        tensor = torch.tensor(x)
        pairs = {
            "patch embedding": (ours.patch_embed(patches), theirs.patch_embed(torch.tensor(patches))),
            "norm": (block.norm1(x), their_block.norm1(tensor)),
            "attention": (
                block.attention(x[None], vision_angles(ours.config, grid))[0],
                their_block.attn(tensor, cu_seqlens=lengths, max_seqlen=longest, position_embeddings=embedding),
            ),
            "mlp": (block.mlp(x), their_block.mlp(tensor)),
            "merger": (ours.merger(x[None])[0], theirs.merger(tensor)),
        }
    for part, (got, expected) in pairs.items():
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-5, rtol=0, err_msg=part)


def prompt(before: int, grid, behind: int, seed: int) -> list[int]:
    """Text, a video between its marks, text."""
    rng = np.random.default_rng(seed)
    tokens = int(np.prod(grid)) // 4
    return [*rng.integers(3, 110, before), START, *[VIDEO] * tokens, END, *rng.integers(3, 110, behind)]


def inputs(grids, before, behind, *, left: bool = True) -> dict[str, np.ndarray]:
    """What the processors make of a batch: shorter rows padded on one side."""
    rows = [prompt(b, grid, a, seed) for seed, (grid, b, a) in enumerate(zip(grids, before, behind, strict=True))]
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), int), np.zeros((len(rows), length), int)
    for row, tokens in enumerate(rows):
        where = slice(length - len(tokens), None) if left else slice(len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    total = sum(int(np.prod(grid)) for grid in grids)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": np.random.default_rng(5).normal(size=(total, PATCH_WIDTH)).astype(np.float32),
        "video_grid_thw": np.array(grids),
        "mm_token_type_ids": 2 * (ids == VIDEO),
    }


def their_generate(model, inputs, new_tokens, **how):
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        out = model.torch.generate(
            **tensors,
            do_sample=False,
            max_new_tokens=new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
            **how,
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :].numpy(), torch.stack(out.logits, dim=1).numpy()


def compare(out, tokens, logits):
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_allclose(out.logits, logits, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def plain(model):
    """Stacked layers: they compile faster."""
    return lv.load(model.folder, stacked=True)


LENGTHS = ([(5, 4, 6), (9, 4, 6), (1, 4, 6)], [4, 1, 9], [6, 11, 3])  # grids, text before, text behind


def test_generate_over_500_positions(model):
    """In chunks of 16 temporal patches, cached, the same greedy tokens and logits as in one pass of transformers."""
    batch = inputs([(18, 12, 10)], [20], [30])
    assert batch["input_ids"].shape[1] >= 500
    loaded = lv.load(model.folder)
    out = loaded.generate(**batch, max_new_tokens=8)
    compare(out, *their_generate(model, batch, 8))
    without = {name: value for name, value in batch.items() if name not in ("attention_mask", "mm_token_type_ids")}
    np.testing.assert_array_equal(loaded.generate(**without, max_new_tokens=8).logits, out.logits)


def test_generate_with_left_padding_and_videos_of_different_lengths(model, plain):
    batch = inputs(*LENGTHS)
    compare(plain.generate(**batch, max_new_tokens=8), *their_generate(model, batch, 8))


def test_right_padding_gives_what_each_row_gives_alone(model, plain):
    grids, batch = LENGTHS[0], inputs(*LENGTHS, left=False)
    out = plain.generate(**batch, max_new_tokens=8)
    ends = np.cumsum([int(np.prod(grid)) for grid in grids])
    for row, grid in enumerate(grids):
        real = batch["attention_mask"][row] == 1
        alone = {
            name: batch[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        alone["pixel_values_videos"] = batch["pixel_values_videos"][ends[row] - int(np.prod(grid)) : ends[row]]
        alone["video_grid_thw"] = np.array([grid])
        tokens, logits = their_generate(model, alone, 8)
        np.testing.assert_array_equal(out.tokens[row : row + 1], tokens)
        np.testing.assert_allclose(out.logits[row : row + 1], logits, atol=1e-4, rtol=0)


def test_text_alone(model, plain):
    ids = np.random.default_rng(3).integers(3, 110, (3, 13))
    compare(plain.generate(input_ids=ids, max_new_tokens=8), *their_generate(model, {"input_ids": ids}, 8))


def test_stop_tokens_of_the_folder(model, plain, tmp_path):
    """generation_config.json says when to stop; rows that have are padded with 0, as by transformers."""
    batch = inputs(*LENGTHS)
    free = np.asarray(plain.generate(**batch, max_new_tokens=8).tokens)
    stop = [int(free[0, 2]), int(free[1, 4]), int(free[2, 5])]
    model.torch.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": stop}))
    tokens, _ = their_generate(model, batch, 8, eos_token_id=stop, pad_token_id=0)
    out = lv.load(tmp_path, stacked=True).generate(**batch, max_new_tokens=8)
    np.testing.assert_array_equal(out.tokens, tokens)


def test_generate_with_another_config(tiny):
    """YaRN, tied embeddings, no grouped queries, another tower."""
    model = tiny(
        "Qwen2VLForConditionalGeneration",
        rope_parameters={**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        tie_word_embeddings=True,
        num_key_value_heads=4,
        eos_token_id=119,
        vision={"embed_dim": 48, "num_heads": 3, "mlp_ratio": 4, "depth": 3},
    )
    batch = inputs([(18, 4, 6)], [5], [9])
    out = lv.load(model.folder, stacked=True).generate(**batch, max_new_tokens=4)
    compare(out, *their_generate(model, batch, 4))


def test_patches_of_a_frame_in_the_processors_order(model):
    """Merge blocks: the tower's token (r, c) is made of the 2 x 2 patches around it and of nothing else's position."""
    ours, grid = model.ours(), (4, 6)
    patches = normal(1, 24, PATCH_WIDTH)
    x = ours.vision.patch_embed(patches)
    blocks = rearrange(np.asarray(x), "f (r c m n) d -> f (r c) (m n) d", r=2, c=3, m=2, n=2)
    got = ours.vision.merger(x)
    for token in range(6):
        np.testing.assert_allclose(got[:, token], ours.vision.merger(blocks[:, token])[:, 0], atol=1e-5)
    assert ours.vision(patches, grid).shape == (1, 6, 64)
