"""What happens to a tensor between a Hugging Face file and a module's leaf; every operation goes both ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

BLOCK, PADDING = 256, 32  # the padding keeps a column of a block out of one set of the cache: four times as fast

Index = tuple[slice, ...]
Shape = tuple[int, ...]


class Op(Protocol):
    """An invertible change of layout, which can also read just a part of its result.

    axis: of the leaf, along which the Hugging Face tensor lies in the file one whole slice after the other.
    """

    axis: int

    def source_shape(self, target: Shape) -> Shape | None:
        """The shape on the Hugging Face side of a leaf of shape `target`, or None if no tensor can make that."""

    def read(self, read: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        """The part `index` of the leaf, through `read`, which reads a part of the Hugging Face tensor."""

    def invert(self, leaf: np.ndarray) -> np.ndarray:
        """The Hugging Face tensor of a whole leaf."""


@dataclass(frozen=True)
class Keep:
    """As it is: embeddings, biases, norms."""

    axis: ClassVar[int] = 0

    def source_shape(self, target):
        return target

    def read(self, read, index):
        return read(index)

    def invert(self, leaf):
        return leaf


@dataclass(frozen=True)
class Transpose:
    """torch's Linear weight [out, in] is our kernel [in, out]."""

    axis: ClassVar[int] = 1

    def source_shape(self, target):
        return target[::-1] if len(target) == 2 else None

    def read(self, read, index):
        return _turned(read(index[::-1]))

    def invert(self, leaf):
        return leaf.T


@dataclass(frozen=True)
class PatchKernel:
    """A Conv3d over patches: weight [D, channels, frames, patch, patch], kernel [channels * frames * patch^2, D].

    frames None: a Conv2d, whose weight has no axis for them.
    """

    axis: ClassVar[int] = 1
    channels: int
    frames: int | None
    patch: int

    def source_shape(self, target):
        frames = () if self.frames is None else (self.frames,)
        inner = (self.channels, *frames, self.patch, self.patch)
        return (target[1], *inner) if len(target) == 2 and target[0] == np.prod(inner) else None

    def read(self, read, index):
        rows, columns = index
        part = read((columns,))
        return _turned(part.reshape(part.shape[0], -1)[:, rows])

    def invert(self, leaf):
        return leaf.T.reshape(self.source_shape(leaf.shape))


@dataclass(frozen=True)
class Leading:
    """A parameter that has a further, leading axis of length 1 there: learned tokens and positions."""

    axis: ClassVar[int] = 0

    def source_shape(self, target):
        return (1, *target)

    def read(self, read, index):
        return read((slice(None), *index))[0]

    def invert(self, leaf):
        return leaf[None]


def _turned(x: np.ndarray) -> np.ndarray:
    """x.T in C order."""
    turned, block = np.empty(x.shape[::-1], x.dtype), np.empty((BLOCK, BLOCK + PADDING), x.dtype)
    for i in range(0, x.shape[0], BLOCK):
        for j in range(0, x.shape[1], BLOCK):
            part = x[i : i + BLOCK, j : j + BLOCK]
            padded = block[: part.shape[0], : part.shape[1]]
            padded[...] = part
            turned[j : j + BLOCK, i : i + BLOCK] = padded.T
    return turned
