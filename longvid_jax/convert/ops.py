"""What happens to a tensor between a Hugging Face file and a module's leaf; every operation goes both ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Index = tuple[slice, ...]
Shape = tuple[int, ...]


class Op(Protocol):
    """An invertible change of layout, which can also read just a part of its result."""

    def source_shape(self, target: Shape) -> Shape | None:
        """The shape on the Hugging Face side of a leaf of shape `target`, or None if no tensor can make that."""

    def read(self, read: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        """The part `index` of the leaf, through `read`, which reads a part of the Hugging Face tensor."""

    def invert(self, leaf: np.ndarray) -> np.ndarray:
        """The Hugging Face tensor of a whole leaf."""


@dataclass(frozen=True)
class Keep:
    """As it is: embeddings, biases, norms."""

    def source_shape(self, target):
        return target

    def read(self, read, index):
        return read(index)

    def invert(self, leaf):
        return leaf


@dataclass(frozen=True)
class Transpose:
    """torch's Linear weight [out, in] is our kernel [in, out]."""

    def source_shape(self, target):
        return target[::-1] if len(target) == 2 else None

    def read(self, read, index):
        return read(index[::-1]).T

    def invert(self, leaf):
        return leaf.T


@dataclass(frozen=True)
class PatchKernel:
    """A Conv3d over patches: weight [D, channels, frames, patch, patch], kernel [channels * frames * patch^2, D]."""

    channels: int
    frames: int
    patch: int

    def source_shape(self, target):
        inner = (self.channels, self.frames, self.patch, self.patch)
        return (target[1], *inner) if len(target) == 2 and target[0] == np.prod(inner) else None

    def read(self, read, index):
        rows, columns = index
        part = read((columns,))
        return part.reshape(part.shape[0], -1).T[rows]

    def invert(self, leaf):
        return leaf.T.reshape(self.source_shape(leaf.shape))
