"""The loss of telling: vectors that should say to a decoder what happened, as the made-up world's towers say it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from longvid_jax.models.layers import FeedForward

NOTHING = 0.05  # weight of a slot that has nothing to tell, beside one that has
NEAR = 0.1  # squared distance to a fact, as a share of its size, from which it counts as told


def distance_to_facts(
    vectors: jax.Array, facts: FeedForward, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """How far vectors [B * A, slots, width] are from those that `facts` makes of batch's facts [B, A, slots, ...].

    Slots with an event count, and others a little: each by its squared distance, as a share of what the vectors of all
    events have. Gives the sum, the number of slots with an event, and in how many of them the distance is below a
    tenth.
    """
    asked = batch["weights"].max(-1).reshape(-1, 1) > 0
    given = batch["facts"].reshape(*vectors.shape[:2], -1)
    wanted = jax.lax.stop_gradient(facts(given)).astype(jnp.float32)
    real = (given != 0).any(-1) & asked
    size = jnp.where(real[..., None], jnp.square(wanted), 0).sum() / jnp.maximum(real.sum(), 1)
    size = jnp.where(real.any(), size, 1.0)  # there is nothing to tell
    distance = jnp.square(vectors.astype(jnp.float32) - wanted).sum(-1) / size
    weight = real + NOTHING * (asked & ~real)
    count = real.sum(dtype=jnp.float32)
    tokens = (batch["groups"] >= 0).sum(dtype=jnp.float32)
    right = (real & (distance < NEAR)).sum(dtype=jnp.float32)
    return (distance * weight).sum(), count, {"right": right, "tokens": tokens}
