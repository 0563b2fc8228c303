"""Random weights to begin a training from."""

from collections import Counter

import jax.numpy as jnp

from longvid_jax.models.paths import leaves, without_layers
from longvid_jax.train.parameters import split

RESIDUAL = ("attention/o", "attention/proj", "mlp/down", "mlp/fc2")  # what a layer adds to the stream it reads


def scaled(module):
    """The module with kernels whose products keep the variance of what they take: a deviation of 1 / sqrt(in).

    What layers add to the residual stream is divided by sqrt(2 depth), as in GPT-2. The networks' own deviation of 0.02
    suits the width of released models; at a width of 128 it lets hardly anything through.
    """
    structure, params, _ = split(module)
    kernels = [leaf for leaf in leaves(module) if leaf.path.endswith("/kernel")]
    depth = Counter()
    for leaf in kernels:
        depth[without_layers(leaf.path)] += len(leaf.part_paths)
    for leaf in kernels:
        kernel, name = params[leaf.path], without_layers(leaf.path)
        gain = kernel.shape[-2] ** -0.5 / jnp.std(kernel, axis=(-2, -1), keepdims=True)
        if name.removesuffix("/kernel").endswith(RESIDUAL):
            gain /= (2 * depth[name]) ** 0.5
        params[leaf.path] = kernel * gain
    return structure.module(params)
