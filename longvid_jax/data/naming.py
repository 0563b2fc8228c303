"""Frames of the made-up world and the things in them: what a vision tower learns to see on, before it learns to talk.

A frame costs a thousandth of a question: there are no words to read, and every thing in sight is a target.
"""

from collections.abc import Sequence

import numpy as np

from longvid_jax.data.batches import Batch, Example
from longvid_jax.errors import OptionError
from longvid_jax.video.synthetic import COLOURS, HELD_OUT, SHAPES, Thing, World

THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
TRIES = 1000  # to find colours without names; a world of few things takes some


class WorldMoments:
    """A grain source of batches of moments from worlds, without an end; batch b is a function of (seed, b) alone.

    Args:
      batch_size: worlds of a batch.
      moments: of each world, at random times; each is what one temporal patch shows.
      temporal, fps: a moment has `temporal` frames, 1 / fps seconds apart.
      size: (H, W) of a frame.
      bare: the share of worlds in which nothing comes or changes, so that only one or two things are in sight.
      monochrome: the share of worlds that are shown in a single hue, so that shapes are learned without colours too.
      recoloured: the share that are shown in hues which have no names, so that shapes are learned in any colour.

    A batch has frames uint8 [B, moments * temporal, H, W, 3], and float32 [B, moments, len(THINGS)]: `things`, 1 for
    what is in all of a moment's frames, and `unsure`, 1 for what is in some of them only. `coloured` float32
    [B, moments] is 0 for what is not shown in its own colours.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int,
        moments: int = 8,
        temporal: int = 2,
        level: str = "clear",
        split: str = "train",
        seconds: float = 16.0,
        fps: float = 2.0,
        size: Sequence[int] = (56, 56),
        bare: float = 0.5,
        monochrome: float = 0.0,
        recoloured: float = 0.0,
        process: int = 0,
        processes: int = 1,
    ):
        if batch_size % processes:
            raise OptionError(f"batch_size is {batch_size}, but must be a multiple of the {processes} processes.")
        self.batch_size, self.seed, self.moments, self.temporal = batch_size, seed, moments, temporal
        self.bare, self.monochrome, self.recoloured = bare, monochrome, recoloured
        self.world, self.fps, self.size = {"level": level, "split": split, "seconds": seconds}, fps, tuple(size)
        share = batch_size // processes
        self.mine = range(process * share, (process + 1) * share)

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, b: int) -> Batch:
        numbers = range(b * self.batch_size, (b + 1) * self.batch_size)
        rows = [self._row(numbers[n]) for n in self.mine]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return Batch(b, arrays, tuple(map(self._example, numbers)), {})

    def _example(self, n: int) -> Example:
        id = f"{self.world['level']}/{self.world['split']}/moments/{n}"
        return Example(id, (), self.moments * self.temporal, self.size, frames=lambda: self._row(n)["frames"])

    def _row(self, n: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, n])
        events = {"visits": 0, "changes": 0} if rng.random() < self.bare else {}
        world = World(int(rng.integers(1 << 62)), **self.world, **events)
        length = (self.temporal - 1) / self.fps
        starts = rng.uniform(0, world.seconds - length, self.moments)
        times = np.minimum(starts[:, None] + np.linspace(0, length, self.temporal), world.seconds)
        seen = np.array([[_seen(world, time) for time in moment] for moment in times], np.float32)
        always, ever = seen.min(axis=1), seen.max(axis=1)
        frames, coloured = world.render(times.reshape(-1), self.size), np.ones(self.moments, np.float32)
        if (draw := rng.random()) < self.monochrome:
            frames, coloured = _in_one_hue(frames, rng), np.zeros_like(coloured)
        elif draw < self.monochrome + self.recoloured:
            things = [thing for thing, shown in zip(THINGS, ever.max(axis=0), strict=True) if shown]
            frames, coloured = (frames @ _other_hues(things, rng)).astype(np.uint8), np.zeros_like(coloured)
        return {"frames": frames, "things": always, "unsure": ever - always, "coloured": coloured}


def _in_one_hue(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [n, H, W, 3] as film of some sensitivity to red, green and blue, and some tint, would have them."""
    brightness = frames @ rng.dirichlet(np.ones(3))
    return (brightness[..., None] * rng.uniform(0.5, 1.0, 3)).astype(np.uint8)


def _other_hues(things: Sequence[Thing], rng: np.random.Generator) -> np.ndarray:
    """[3, 3], red, green and blue to others; none of the things comes to look most like one kept from training.

    Where no such colours are found, as may be of very many things, it is their own.
    """
    for _ in range(TRIES):
        mix = rng.dirichlet(np.full(3, 0.3), size=3).T * rng.uniform(0.75, 1.0)
        if HELD_OUT.isdisjoint(Thing(_nearest(COLOURS[colour] @ mix), shape) for colour, shape in things):
            return mix
    return np.eye(3)


def _nearest(rgb: np.ndarray) -> str:
    """The colour with a name that is the least far away."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - COLOURS[name])))


def _seen(world: World, time: float) -> list[bool]:
    visible = set(world.visible(time))
    return [thing in visible for thing in THINGS]
