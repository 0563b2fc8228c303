"""One training step of a tiny Qwen2-VL, whole and in packed conversations, against PyTorch: loss and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax import convert
from longvid_jax.data.packing import Turns, pack
from longvid_jax.models.paths import leaves
from longvid_jax.train import losses
from longvid_jax.video.preprocess import patchify

pytestmark = pytest.mark.parity

MEAN, STD, GRID, SIZE = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), (3, 2, 2), (16, 16)
VIDEO = 118


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A torch model with no parameter at its usual initial value, and its folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 64}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, video_token_id=VIDEO, image_token_id=117
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            around = 1.0 if "norm" in path and path.endswith("weight") or path.endswith("ln_q.weight") else 0.0
            torch.nn.init.normal_(parameter, around, 0.1)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def conversations(seed: int, count: int) -> list[Turns]:
    rng = np.random.default_rng(seed)
    before = tuple(map(int, rng.integers(3, 110, 4)))
    lengths = rng.integers(4, 9, count)
    return [
        Turns(before, tuple(map(int, rng.integers(3, 110, n))), tuple(i >= n // 2 for i in range(n))) for n in lengths
    ]


def their_step(model, rows, frames):
    """Loss, and gradients by parameter name, each conversation as a sequence of its own."""
    import torch

    model.zero_grad()
    total = weight = 0.0
    for turns, pixels in zip(rows, frames, strict=True):
        for turn in turns:
            arrays = pack([turn], GRID, 64, video_token=VIDEO)
            length = int((arrays["groups"] >= 0).sum())
            patches = patchify(pixels[None], patch=4, temporal=2, merge=2, mean=MEAN, std=STD)
            logits = model(
                input_ids=torch.tensor(arrays["tokens"][None, :length], dtype=torch.long),
                position_ids=torch.tensor(arrays["positions"][None, :length].transpose(2, 0, 1).astype(np.int64)),
                pixel_values_videos=torch.tensor(patches.reshape(-1, patches.shape[-1])),
                video_grid_thw=torch.tensor([[GRID[0], 2 * GRID[1], 2 * GRID[2]]]),
                mm_token_type_ids=torch.tensor(2 * (arrays["tokens"][None, :length] == VIDEO)),
                use_cache=False,
            ).logits[0]
            targets = torch.tensor(arrays["targets"][:length], dtype=torch.long)
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            total = total + (each * torch.tensor(arrays["weights"][:length])).sum()
            weight += float(arrays["weights"].sum())
    (total / weight).backward()
    return (total / weight).item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("stacked", "remat"), [(False, False), (True, True)])
def test_loss_and_gradients(model, stacked, remat):
    theirs, folder = model
    rows = [conversations(0, 3), conversations(1, 1)]
    frames = np.random.default_rng(2).integers(0, 256, (2, 6, *SIZE, 3), dtype=np.uint8)
    expected_loss, expected = their_step(theirs, rows, frames)

    packed = [pack(turns, GRID, 64, video_token=VIDEO) for turns in rows]
    batch = {name: jnp.stack([row[name] for row in packed]) for name in packed[0]} | {"frames": jnp.asarray(frames)}

    def loss(module, batch):
        total, weight, _ = losses.answers(module, batch, mean=MEAN, std=STD, remat=remat)
        return total / weight

    ours = convert.from_huggingface(folder, dtype="float32", stacked=stacked)
    value, gradient = jax.jit(jax.value_and_grad(loss))(ours, batch)
    np.testing.assert_allclose(value, expected_loss, atol=1e-4, rtol=0)

    table = convert.table_for(convert.open_source(folder).config)
    expected = {table.spelling(name): value for name, value in expected.items()}
    compared = set()
    for leaf in leaves(gradient):
        for n, path in enumerate(leaf.part_paths):
            key, op = table.source(path)
            got = op.invert(np.asarray(leaf.value[n] if leaf.stacked else leaf.value))
            largest = np.abs(expected[key]).max()
            assert largest > 0, key
            np.testing.assert_allclose(got, expected[key], atol=1e-4 * max(1, largest), rtol=0, err_msg=key)
            compared.add(key)
    assert compared == expected.keys()
