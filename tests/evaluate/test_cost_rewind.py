"""What ReWind's cycle costs, against closed forms and the goal."""

import numpy as np
import pytest

from longvid_jax.evaluate import cost_rewind
from longvid_jax.models.eva_vit import EvaConfig
from longvid_jax.models.perceiver import PerceiverConfig

CONFIG = PerceiverConfig(width=32, depth=2, heads=2, ff_width=48, num_queries=4, video_width=24, text_width=16)
VISION = EvaConfig(depth=2, width=24, heads=2, ff_width=32, patch=7, image_size=28)


@pytest.fixture(scope="module")
def found():
    return cost_rewind.run(CONFIG, VISION, clip_frames=4, words=5, frames=(16, 64, 256))


def products(*sizes) -> int:
    """FLOPs of a product of matrices."""
    return 2 * int(np.prod(sizes))


def test_flops_are_those_of_the_definition(found):
    """With the maps around an attention folded into its small side where one is: words, queries, what is written."""
    width, video, heads, queries, patches, frames, words = 32, 24, 2, 5, 16, 4, 5
    for row in found["rows"]:
        tokens, clips = 2 * row["frames"], row["frames"] // 4
        reading = 2 * products(queries, width, width) + 2 * products(queries, tokens, width)
        assert row["read_flops"] == clips * reading
        conditioned = (
            2 * products(words, width, width)
            + 2 * products(words, width, video)
            + products(words, width)
            + 2 * products(frames * patches, heads * words, video)
        )
        looking = (
            2 * products(frames * queries, width, width)
            + 2 * products(frames * queries, width, video)
            + 2 * products(frames * queries * heads, patches, video)
        )
        along = 4 * products(frames * queries, width, width) + 2 * products(frames * queries, frames, width)
        thinking = 2 * products(frames * queries, width, 48)
        writing = (
            2 * products(2, width, width)
            + 2 * products(2 * frames * heads, queries, width)
            + 4 * products(2 * frames, width, width)  # values, out, and to READ's keys and values
        )
        assert row["cycle_flops"] == clips * (reading + 2 * (conditioned + looking + along + thinking) + writing)
        embedded = products(frames * patches, 7 * 7 * 3, video)
        tower = 4 * products(frames * 17, video, video) + 2 * products(frames * 17, 17, video)
        tower += 2 * products(frames * 17, video, 32)
        assert row["flops"] - row["cycle_flops"] == clips * (embedded + 2 * tower)
        assert row["bytes"] > row["cycle_bytes"] > row["read_bytes"] > 0


def test_exponents(found):
    assert cost_rewind.exponent((1, 2, 4), (3, 12, 48)) == pytest.approx(2)
    for name, value in found["exponents"].items():
        frames, costs = (np.log([row[key] for row in found["rows"]]) for key in ("frames", name))
        slope = ((frames - frames.mean()) * (costs - costs.mean())).sum() / np.square(frames - frames.mean()).sum()
        assert value == pytest.approx(slope)
    assert "(goal: at most 1.03)" in cost_rewind.report(found)


@pytest.mark.slow
def test_full_size_is_linear():
    full = cost_rewind.run(PerceiverConfig(), EvaConfig(), clip_frames=8, words=12)
    assert full["exponents"]["flops"] <= 1.03 and full["exponents"]["bytes"] <= 1.03
