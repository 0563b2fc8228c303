"""Moments of the world and what is told of them."""

import numpy as np
import pytest

from longvid_jax.data.naming import THINGS, WorldMoments
from longvid_jax.video.synthetic import COLOURS, HELD_OUT

MADE = WorldMoments(16, seed=3, moments=6)


def test_what_is_told_is_what_is_drawn():
    """On the clear level a colour in sight has pixels of its own in every frame of a moment, and one out of sight none.

    Things may hide each other, so only most of those in sight must show; noise and shade leave what is absent unlike.
    """
    batch = MADE[0].arrays
    shown, absent = [], []
    for frames, things, unsure in zip(batch["frames"], batch["things"], batch["unsure"], strict=True):
        for n in range(6):
            pair = frames[2 * n : 2 * n + 2].astype(int)
            for colour, rgb in COLOURS.items():
                mine = [k for k, thing in enumerate(THINGS) if thing.colour == colour]
                if unsure[n, mine].any():
                    continue
                pixels = (np.abs(pair - rgb).max(-1) < 40).sum((1, 2)).min()
                (shown if things[n, mine].any() else absent).append(pixels >= 8)
    assert len(shown) > 60 and np.mean(shown) > 0.95
    assert len(absent) > 300 and np.mean(absent) < 0.02


def test_batches_are_functions_of_seed_and_number():
    again, other = WorldMoments(16, seed=3, moments=6), WorldMoments(16, seed=4, moments=6)
    for name, array in MADE[2].arrays.items():
        np.testing.assert_array_equal(array, again[2].arrays[name])
    assert (MADE[2].arrays["frames"] != other[2].arrays["frames"]).any()
    assert (MADE[2].arrays["frames"] != MADE[3].arrays["frames"]).any()
    np.testing.assert_array_equal(MADE[2].examples[1].frames(), MADE[2].arrays["frames"][1])


def test_processes_share_a_batch():
    halves = [WorldMoments(16, seed=3, moments=6, process=n, processes=2)[1] for n in range(2)]
    for name, array in MADE[1].arrays.items():
        np.testing.assert_array_equal(np.concatenate([half.arrays[name] for half in halves]), array)
    assert [example.id for example in halves[0].examples] == [example.id for example in MADE[1].examples]


def test_bare_worlds_show_few_things_and_training_never_what_is_held_out():
    bare, full = (WorldMoments(16, seed=0, bare=share)[0].arrays["things"].sum(-1) for share in (1.0, 0.0))
    assert set(np.unique(bare)) <= {0, 1, 2} and (bare > 0).mean() > 0.9  # none where a cut falls into the moment
    assert full.mean() > bare.mean() and full.max() > 2
    held = [thing in HELD_OUT for thing in THINGS]
    assert not MADE[0].arrays["things"][..., held].any()
    assert WorldMoments(16, seed=0, split="test")[0].arrays["things"][..., held].any()


def test_worlds_in_a_single_hue():
    """The same moments; of those without colours red, green and blue are one another's multiples."""
    mixed, plain = WorldMoments(16, seed=3, moments=6, monochrome=0.5)[0].arrays, MADE[0].arrays
    grey = mixed["coloured"][:, 0] == 0
    assert 2 < grey.sum() < 14 and plain["coloured"].all()
    np.testing.assert_array_equal(mixed["things"], plain["things"])
    np.testing.assert_array_equal(mixed["frames"][~grey], plain["frames"][~grey])
    for frames, before in zip(mixed["frames"][grey], plain["frames"][grey], strict=True):
        flat = frames.reshape(-1, 3).astype(float)
        for channel in (1, 2):
            assert np.corrcoef(flat[:, 0], flat[:, channel])[0, 1] > 0.999
        assert np.corrcoef(before.reshape(-1, 3).T)[0, 1] < 0.99


def test_worlds_in_other_hues():
    """The same moments in other colours, which make of nothing in sight the likeness of a pair kept from training."""
    mixed, plain = WorldMoments(16, seed=3, moments=6, recoloured=0.7)[0].arrays, MADE[0].arrays
    other = mixed["coloured"][:, 0] == 0
    assert 4 < other.sum() < 16
    np.testing.assert_array_equal(mixed["things"], plain["things"])
    np.testing.assert_array_equal(mixed["frames"][~other], plain["frames"][~other])
    for row in np.flatnonzero(other):
        before, after = (batch["frames"][row].reshape(-1, 3).astype(float) for batch in (plain, mixed))
        mix, *_ = np.linalg.lstsq(before, after + 0.5)
        assert np.abs(before @ mix - after).max() < 2  # one linear map of red, green and blue, rounded down
        assert np.abs(mix - np.eye(3)).max() > 0.1
        for k in np.flatnonzero((plain["things"] + plain["unsure"])[row].any(0)):
            apart = [np.linalg.norm(np.array(COLOURS[THINGS[k].colour]) @ mix - rgb) for rgb in COLOURS.values()]
            assert (list(COLOURS)[int(np.argmin(apart))], THINGS[k].shape) not in HELD_OUT


@pytest.mark.parametrize("temporal", [1, 3])
def test_frames_of_a_moment(temporal):
    batch = WorldMoments(2, seed=0, moments=4, temporal=temporal, size=(28, 56))[0].arrays
    assert batch["frames"].shape == (2, 4 * temporal, 28, 56, 3) and batch["things"].shape == (2, 4, len(THINGS))
    if temporal == 1:
        assert not batch["unsure"].any()
