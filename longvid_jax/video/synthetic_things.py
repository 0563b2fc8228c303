"""What a made-up world is made of: colours, shapes, the pairs kept from training, and the levels of difficulty."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

COLOURS = {  # red, green, blue of 255; apart in brightness too, as video files halve the resolution of hue
    "red": (225, 30, 35),
    "green": (30, 165, 50),
    "blue": (40, 75, 240),
    "yellow": (250, 228, 45),
    "purple": (165, 45, 210),
    "orange": (252, 130, 15),
    "cyan": (60, 220, 230),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SPLITS = {"train": 0, "validation": 1, "test": 2}


class Thing(NamedTuple):
    """What questions name: "red star"."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


# Every colour once, every shape once or twice: in training they appear in no role.
HELD_OUT = frozenset(
    Thing(*words.split())
    for words in (
        "red star",
        "green circle",
        "blue cross",
        "yellow square",
        "purple triangle",
        "orange ring",
        "cyan star",
        "white circle",
    )
)


@functools.cache
def allowed(split: str) -> tuple[Thing, ...]:
    """The colour-shape pairs of a split."""
    every = (Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
    return tuple(thing for thing in every if split != "train" or thing not in HELD_OUT)


def stream(split: str, *key: int) -> np.random.Generator:
    """Random numbers of a split's own; a key is a purpose, then the seed."""
    return np.random.default_rng([SPLITS[split], *key])


@dataclasses.dataclass(frozen=True)
class Level:
    """How hard a world is to watch. Lengths are in parts of the frame's shorter side, of motion in parts of a frame."""

    radius: tuple[float, float]
    stay: tuple[float, float]  # seconds of a visit
    together: int  # visits at a time, at most
    apart: bool  # visits and changes keep clear of each other
    cast: tuple[int, int]  # actors of a scene
    cast_shapes: int  # shapes that the cast keeps to itself; 0: it may have those of visits
    alike: float  # how often a thing shares colour or shape with another of its world
    speed: float  # frames a second, at most
    spin: float  # radians a second, at most
    noise: float  # standard deviation at most, of 255; worlds differ, as video files take away some of it
    drift: float  # of the camera over the background
    waves: int  # of the background's texture
    clutter: int  # things on the background that have no colour
    movers: int  # the same, moving
    stripes: float  # how dark the stripes of things are, 0 to 1
    brightness: tuple[float, float]  # of the background, of 255


LEVELS = {
    "clear": Level(
        radius=(0.125, 0.145),
        stay=(1.5, 3.0),
        together=2,
        apart=True,
        cast=(1, 2),
        cast_shapes=1,
        alike=0.3,
        speed=0.2,
        spin=0.3,
        noise=5.0,
        drift=0.03,
        waves=0,
        clutter=0,
        movers=0,
        stripes=0.0,
        brightness=(25.0, 75.0),
    ),
    "busy": Level(
        radius=(0.105, 0.13),
        stay=(1.2, 2.4),
        together=3,
        apart=False,
        cast=(2, 3),
        cast_shapes=2,
        alike=0.5,
        speed=0.35,
        spin=1.2,
        noise=11.0,
        drift=0.08,
        waves=4,
        clutter=12,
        movers=0,
        stripes=0.3,
        brightness=(25.0, 95.0),
    ),
    "wild": Level(
        radius=(0.08, 0.105),
        stay=(1.0, 1.6),
        together=9,
        apart=False,
        cast=(2, 4),
        cast_shapes=0,
        alike=0.7,
        speed=0.6,
        spin=2.5,
        noise=20.0,
        drift=0.14,
        waves=5,
        clutter=20,
        movers=4,
        stripes=0.45,
        brightness=(25.0, 120.0),
    ),
}
