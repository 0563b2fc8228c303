"""SigLIP's loss (arXiv 2303.15343): each pair of a video and a caption for itself, over one device or many."""

import jax
import jax.numpy as jnp

from longvid_jax.ops.sharding import BATCH


def siglip(video: jax.Array, caption: jax.Array, temperature: jax.Array, offset: jax.Array) -> jax.Array:
    """-sum over pairs of log sigmoid(y (exp(t') <v, u> + b0)), y = 1 for a video's own caption and -1 for others.

    video, caption float32 [B, E] of length 1; temperature (t') and offset (b0) []. The paper's loss is this / B. On a
    mesh with more than one device along the batch, captions go around from device to device and no device ever holds
    more of them than its share (section 3.3).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in BATCH if not mesh.empty and mesh.shape.get(name, 1) > 1)
    count = 1
    for name in axes:
        count *= mesh.shape[name]
    if count == 1 or video.shape[0] % count:
        return _pairs(video, caption, temperature, offset, own=True)
    spread, whole = jax.sharding.PartitionSpec(axes), jax.sharding.PartitionSpec()
    around = [(n, (n + 1) % count) for n in range(count)]

    def share(video, caption, temperature, offset):
        def meet(state, _):
            total, caption = state
            caption = jax.lax.ppermute(caption, axes, around)
            return (total + _pairs(video, caption, temperature, offset, own=False), caption), None

        own = _pairs(video, caption, temperature, offset, own=True)
        (total, _), _ = jax.lax.scan(meet, (own, caption), length=count - 1)
        return jax.lax.psum(total, axes)

    mapped = jax.shard_map(share, in_specs=(spread, spread, whole, whole), out_specs=whole)
    return mapped(video, caption, temperature, offset)


def _pairs(video, caption, temperature, offset, own: bool) -> jax.Array:
    """Of all pairs of these; own: the n-th caption is the n-th video's, else none is any's."""
    logits = jnp.exp(temperature) * (video @ caption.T) + offset
    label = 2 * jnp.eye(len(video)) - 1 if own else -1.0
    return -jax.nn.log_sigmoid(label * logits).sum()
