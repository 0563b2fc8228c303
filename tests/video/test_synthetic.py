"""The made-up world: what happens in it, and how it looks."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from longvid_jax.errors import OptionError
from longvid_jax.video.synthetic import COLOURS, HELD_OUT, LEVELS, SHAPES, SPLITS, Thing, World

TWO_A_SECOND = np.arange(32) / 2


# Of World(3, split="test"): its events, and the mean red, green and blue of the frames at 0, 4, 8 and 12 seconds.
GOLDEN_EVENTS = [
    ("blue ring", None, 1.655, 3.422),
    ("purple square", None, 9.965, 11.897),
    ("blue triangle", None, 11.486, 12.998),
    ("orange circle", "yellow", 11.084, 15.268),
]
GOLDEN_MEANS = [[58.71, 68.85, 63.9], [58.34, 68.7, 63.76], [18.02, 22.61, 31.51], [35.0, 32.94, 37.25]]


def coloured(frames, colour):
    """How many pixels of each frame, float32 [n, H, W, 3], have a hue and brightness near a colour's."""
    distances = np.stack([((frames - rgb) ** 2).sum(-1) for rgb in np.array(list(COLOURS.values()), np.float32)])
    near = (distances.argmin(0) == list(COLOURS).index(colour)) & (distances.min(0) < 60**2)
    return near.sum((1, 2))


def seen_once(world):
    """Events whose colours nothing else in the world has."""
    for event in world.events:
        others = [t for t in world.script.things if t not in event.things]
        if event.kind == "visit" and all(thing.colour != event.colour for thing in others):
            if sum(other.thing == event.thing for other in world.events) == 1:
                yield event


def test_equal_arguments_give_equal_worlds():
    one, other = World(5, level="busy"), World(5, level="busy")
    assert one == other and hash(one) == hash(other)
    assert one.events == other.events and one.cuts == other.cuts and one.questions(9) == other.questions(9)
    np.testing.assert_array_equal(one.render([3, 1], (56, 56)), other.render([3, 1], (56, 56)))
    assert World(6, level="busy").events != one.events


def test_another_process_makes_the_same_world():
    code = (
        "import hashlib, numpy as np\nfrom longvid_jax.video.synthetic import World\nworld = World(7, level='wild')\n"
        "pixels = world.render(np.arange(32) / 2, (56, 56))\n"
        "print(hashlib.sha256(pixels.tobytes() + repr((world.events, world.questions(20))).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    world = World(7, level="wild")
    told = repr((world.events, world.questions(20))).encode()
    assert run.stdout.strip() == hashlib.sha256(world.render(TWO_A_SECOND, (56, 56)).tobytes() + told).hexdigest()


def test_the_world_of_a_seed_stays_the_same():
    """Shipped models and published numbers name seeds: what a seed means may not change unnoticed."""
    world = World(3, split="test")
    assert [(str(e.thing), e.becomes, e.start, e.end) for e in world.events] == GOLDEN_EVENTS
    means = world.render(TWO_A_SECOND[::8], (56, 56)).mean((1, 2))
    np.testing.assert_allclose(means, GOLDEN_MEANS, atol=0.1)  # other processors may round otherwise


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [(56, 56), (40, 88), (120, 80)])
def test_a_frame_depends_on_its_time_alone(level, size):
    world, times = World(11, level=level, seconds=20), np.random.default_rng(0).uniform(0, 20, 40)
    together = world.render(times, size)
    assert together.shape == (40, *size, 3) and together.dtype == np.uint8
    np.testing.assert_array_equal(
        together, np.concatenate([world.render(times[i : i + 7], size) for i in range(0, 40, 7)])
    )
    np.testing.assert_array_equal(together[[3, 17, 3]], world.render(times[[3, 17, 3]], size))
    np.testing.assert_array_equal(together[:1], World(11, level=level, seconds=20).render(times[:1], size))
    assert world.render([], size).shape == (0, *size, 3)


@pytest.mark.parametrize("level", LEVELS)
def test_it_looks_the_same_at_any_size(level):
    world = World(2, level=level)
    large = world.render(TWO_A_SECOND, (168, 168)).reshape(32, 56, 3, 56, 3, 3).mean((2, 4))
    small = world.render(TWO_A_SECOND, (56, 56)).astype(float)
    other = World(3, level=level).render(TWO_A_SECOND, (56, 56))
    assert np.abs(large - small).mean() < 4 < 20 < np.abs(other - small).mean()


def test_noise_and_drift_never_stop():
    """In a long still stretch frames differ a little, all of them."""
    world = World(4, seconds=600, visits=0, changes=0)
    frames = world.render(np.arange(0, 600, 0.5), (24, 24)).astype(float)
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert steps.min() > 0.3 and (steps < 6).mean() > 0.5 and steps.max() > 15  # the last: a cut


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_pairs_are_never_in_training(split):
    worlds = [World(seed, level=level, split=split) for seed in range(60) for level in LEVELS]
    things = {thing for world in worlds for thing in world.script.things}
    assert HELD_OUT.isdisjoint(things) if split == "train" else things == {Thing(c, s) for c in COLOURS for s in SHAPES}
    asked = [question for world in worlds for question in world.questions(20)]
    assert any(question.held_out for question in asked) == (split != "train")
    if split == "train":
        texts = {" ".join([question.text, *question.choices]) for question in asked}
        assert not [text for text in texts for thing in HELD_OUT if str(thing) in text]


def test_every_colour_and_shape_is_trained():
    assert {thing.colour for thing in HELD_OUT} == set(COLOURS) and {thing.shape for thing in HELD_OUT} == set(SHAPES)
    assert len(HELD_OUT) == 8 and all(sum(t.shape == shape for t in HELD_OUT) <= 2 for shape in SHAPES)


def test_splits_share_nothing():
    events = [tuple(World(seed, split=split).events) for split in SPLITS for seed in range(200)]
    assert len(set(events)) == len(events)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seconds", [1, 2.5, 4, 8, 16, 90])
def test_events_are_in_order_and_long_enough_to_see(level, seconds):
    for seed in range(40):
        world = World(seed, level=level, seconds=seconds)
        assert list(world.events) == sorted(world.events, key=lambda event: event.moment)
        assert list(world.cuts) == sorted(world.cuts) and all(0 < cut < seconds for cut in world.cuts)
        grid = np.arange(np.ceil(seconds * 2)) / 2
        for event in world.events:
            assert 0 <= event.start < event.end <= seconds
            for start, end in (
                [(event.start, event.end)] if event.at is None else [(event.start, event.at), (event.at, event.end)]
            ):
                assert ((start <= grid) & (grid < end)).sum() >= 2
        visits = [event for event in world.events if event.kind == "visit"]
        assert all(
            later.start - early.end >= 0.749
            for early in visits
            for later in visits
            if early.thing == later.thing == world.script.counted and later.start > early.start
        )
        most = max(sum(event.start <= time < event.end for event in visits) for time in grid)
        assert most <= LEVELS[level].together


@pytest.mark.parametrize(("level", "part"), [("clear", 0.2), ("busy", 0.05), ("wild", 0.1)])
def test_what_is_said_is_seen(level, part):
    """The colour of a visit is there (in that part of its disc) at all times of its span, and at no other."""
    checked = 0
    for seed in range(12):
        world = World(seed, level=level, split="test")
        times = np.arange(0.01, world.seconds, 0.3)
        frames = world.render(times, (56, 56)).astype(np.float32)
        for event in seen_once(world):
            count, inside = coloured(frames, event.colour), (event.start <= times) & (times < event.end)
            least = part * np.pi * (56 * LEVELS[level].radius[0]) ** 2
            assert count[~inside].max() < max(least, 5) and np.mean(count[inside] >= least) > 0.9
            checked += 1
    assert checked >= 10


def test_a_change_is_seen():
    checked = 0
    for seed in range(30):
        world = World(seed, visits=0, changes=1)
        (event,) = world.events
        if {event.colour, event.becomes} & {thing.colour for thing in world.script.cast}:
            continue
        times = np.array([event.start - 0.01, event.start, event.at - 0.01, event.at, event.end - 0.01, event.end])
        frames = world.render(times.clip(0), (56, 56)).astype(np.float32)
        assert (coloured(frames, event.colour) > 20).tolist() == [event.start == 0, True, True, False, False, False]
        assert (coloured(frames, event.becomes) > 20).tolist() == [False, False, False, True, True, False]
        checked += 1
    assert checked >= 10


def test_visible_says_who_is_there():
    world = World(9, split="test")
    for event in world.events:
        assert event.things[0] in world.visible(event.start) and event.things[-1] in world.visible(event.end - 1e-6)
        assert set(event.things).isdisjoint(set(world.visible(event.end)) - set(world.script.cast)) or any(
            other is not event and other.start <= event.end < other.end and set(other.things) & set(event.things)
            for other in world.events
        )


def test_shapes_can_be_told_apart_at_ten_pixels():
    """A nearest-template reader of cut-out silhouettes gets them all right, at the size that the busy level has."""
    from longvid_jax.video.synthetic_render import DISTANCE

    def silhouette(shape, dy, dx, radius=5.0):
        y, x = np.mgrid[:13, :13].astype(np.float32) - 6
        return np.clip(0.5 - DISTANCE[shape]((x - dx) / radius, (y - dy) / radius) * radius, 0, 1).ravel()

    templates = np.stack([silhouette(shape, 0, 0) for shape in SHAPES])
    areas = templates.sum(1)
    assert areas.min() > 25
    rng = np.random.default_rng(0)
    for i, shape in enumerate(SHAPES):
        for _ in range(20):
            seen = silhouette(shape, *rng.uniform(-0.4, 0.4, 2)) + rng.normal(0, 0.05, 169)
            assert np.linalg.norm(templates - seen, axis=1).argmin() == i


def test_levels_are_harder_one_after_the_other():
    """By the difference that a still scene's texture, clutter and noise make from pixel to pixel."""
    rough = []
    for level in LEVELS:
        frames = np.concatenate([World(s, level=level, visits=0).render([1.0, 9.0], (56, 56)) for s in range(20)])
        rough.append(np.median(np.abs(np.diff(frames.astype(float), axis=2)), axis=(1, 2, 3)).mean())
    assert rough[0] * 1.5 < rough[1] and rough[1] * 1.5 < rough[2]


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("seconds", [1, 8, 3600])
def test_a_needle_is_where_it_is_put(depth, seconds):
    world = World.needle(3, seconds=seconds, depth=depth, split="test")
    (event,) = world.events
    assert event.start == pytest.approx(depth * (seconds - (event.end - event.start)), abs=2e-3)
    assert {question.family for question in world.questions()} >= {"needle", "caption"}
    colours = {World.needle(seed, seconds=8, depth=0.5).events[0].colour for seed in range(60)}
    assert colours == set(COLOURS)


def test_numbers_and_places_of_events_can_be_chosen():
    world = World(1, seconds=300, visits=40, changes=2)
    assert [sum(e.kind == kind for e in world.events) for kind in ("visit", "change")] == [40, 2]
    assert World(1, visits=0, changes=0).events == ()
    spans = [(10.0, 12.5), (3.25, 4.75)]
    placed = World(1, visits=spans, changes=0)
    assert [(event.start, event.end) for event in placed.events] == sorted(spans)
    assert len({event.thing for event in placed.events}) == 2 and placed == World(1, visits=tuple(spans), changes=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"level": "easy"}, "level is 'easy', expected one of clear, busy, wild."),
        ({"split": "dev"}, "split is 'dev', expected one of train, validation, test."),
        ({"seconds": 0.5}, "seconds is 0.5"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": "8"}, "seconds is '8'"),
        ({"visits": 30}, "visits is 30, expected 0 to 21 in a world of 16 seconds"),
        ({"visits": -1}, "visits is -1"),
        ({"visits": "many"}, "visits is 'many'"),
        ({"visits": [(1, 1.5)]}, r"a visit is \(1, 1.5\)"),
        ({"visits": [(15, 17)]}, r"a visit is \(15, 17\)"),
        ({"visits": [3]}, "a visit is 3"),
        ({"visits": [("a", "b")]}, r"a visit is \('a', 'b'\)"),
        ({"changes": 3}, "changes is 3, expected 0 to 2"),
        ({"changes": 1, "seconds": 1.5}, "changes is 1, expected 0 to 0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(OptionError, match=text):
        World(**{"seed": 0, **options})


@pytest.mark.parametrize(
    ("times", "size", "text"),
    [
        ([16.5], (56, 56), "seconds from 0 to 16"),
        ([-0.1], (56, 56), "seconds from 0 to 16"),
        (0.5, (56, 56), "seconds from 0 to 16"),
        ([1], (16, 56), r"size is \(16, 56\)"),
        ([1], (56, 300), r"size is \(56, 300\)"),
        ([1], (56,), r"size is \(56,\)"),
        ([1], (56.0, 56.5), r"size is \(56.0, 56.5\)"),
    ],
)
def test_bad_frames(times, size, text):
    with pytest.raises(OptionError, match=text):
        World(0).render(times, size)


def test_bad_depth():
    with pytest.raises(OptionError, match="depth is 1.5"):
        World.needle(0, seconds=8, depth=1.5)
