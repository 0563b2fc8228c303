"""The loss of AdaCM2's recipe (arXiv 2411.12593): answers to questions, each put to its video alone."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange

from longvid_jax.memory import adacm2
from longvid_jax.memory.adacm2 import Ask, Policy, Window
from longvid_jax.models.instructblip import InstructBlip
from longvid_jax.models.layers import FeedForward
from longvid_jax.ops.attention import Keys, attend
from longvid_jax.train.losses import token_losses
from longvid_jax.train.telling import distance_to_facts
from longvid_jax.video.preprocess import normalise


def instructed_tokens(
    model: InstructBlip,
    batch: Mapping[str, jax.Array],
    *,
    policy: Policy,
    carry_queries: bool,
    stop_gradient: bool,
    mean,
    std,
    remat: bool | str = False,
) -> tuple[jax.Array, jax.Array]:
    """The losses of the next tokens [B, A * N], and which of them lead: of data.instructed.InstructedBatches.

    policy, carry_queries, stop_gradient: as memory.adacm2.watch takes them.
    """
    how = {"policy": policy, "carry_queries": carry_queries, "stop_gradient": stop_gradient, "mean": mean, "std": std}
    return _said(model, _watched(model, batch, **how, remat=remat), batch, remat)


def telling(
    model: InstructBlip, batch: Mapping[str, jax.Array], *, facts: FeedForward, remat: bool | str = False, **how
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """How well the projected outputs tell what answers the questions, in the vectors that `facts` makes of it.

    batch: of data.telling.TellingBatches. how: as instructed_tokens takes it. Gives what distance_to_facts does.
    """
    return distance_to_facts(model.projection(_watched(model, batch, **how, remat=remat)), facts, batch)


def _watched(
    model: InstructBlip,
    batch: Mapping[str, jax.Array],
    *,
    policy: Policy,
    carry_queries: bool,
    stop_gradient: bool,
    mean,
    std,
    remat: bool | str = False,
) -> jax.Array:
    """The outputs [B * A, Q, C] of the queries after the last frame."""
    asked = batch["tokens"].shape[1]
    pixels = normalise(batch["frames"], mean, std)
    features = model.vision(pixels.reshape(-1, *pixels.shape[2:]), remat=remat)
    features = features.reshape(*pixels.shape[:2], *features.shape[1:])
    placed = model.placed(features, batch["number"])
    keys, values = model.qformer.keys_values(placed)  # [L, B, T, P, C]
    words = batch["words"].reshape(-1, batch["words"].shape[-1])
    ask, queries = Ask(*model.asker(words)), model.queries(words.shape[0])

    if policy.keeps_all and not carry_queries:
        # As adacm2.watch does it then, but with no copy of a video for each of its questions.
        if stop_gradient:
            keys, values = (
                jnp.moveaxis(adacm2.only_last(jnp.moveaxis(x, 2, 0), batch["shown"].T), 0, 2) for x in (keys, values)
            )
        look = _looking_at_all(keys, values, batch["shown"], asked)
        return ask.conclude(ask.look(queries, look, ())[0])
    rows = jnp.repeat(jnp.arange(keys.shape[1]), asked)
    window = Window(*(jnp.moveaxis(x[:, rows], 2, 0) for x in (keys, values)), *(
        batch[name][rows].T for name in ("number", "shown")
    ))  # fmt: skip
    tokens, width = keys.shape[3:]
    shares = zip(policy.alpha, policy.beta, strict=True)
    capacity = max(adacm2.largest(tokens, alpha, beta, keys.shape[2]) for alpha, beta in shares)
    cache = adacm2.empty(keys.shape[0], words.shape[0], capacity, width, keys.dtype)
    return adacm2.watch(
        cache,
        jnp.zeros_like(queries),
        window,
        ask,
        queries,
        policy,
        carry_queries=carry_queries,
        stop_gradient=stop_gradient,
        remat=remat not in (False, "none"),
        random=jax.random.key(0) if policy.scores == "random" else None,
    )[1]


def _looking_at_all(keys: jax.Array, values: jax.Array, shown: jax.Array, asked: int):
    """A look at all tokens [L, B, T, P, C] of shown [B, T] frames, by A rows of queries a video: none is copied."""
    valid = jnp.repeat(shown, keys.shape[3], axis=1)

    def look(index, q, carry):
        heads = q.shape[1]
        k, v = (rearrange(x[index], "b t p (h d) -> b h (t p) d", h=heads) for x in (keys, values))
        together = rearrange(q, "(b a) h q d -> b h (a q) d", a=asked)
        context = attend(together, Keys(k, v, valid))
        return rearrange(context, "b h (a q) d -> (b a) h q d", a=asked), carry

    return look


def _said(model: InstructBlip, outputs: jax.Array, batch, remat) -> tuple[jax.Array, jax.Array]:
    """What the decoder makes of the outputs [B * A, Q, C]."""
    tokens, places = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "places"))
    words = model.text.embed(jnp.maximum(tokens, 0))
    vectors = model.projection(outputs).astype(words.dtype)
    seen = jnp.take_along_axis(vectors, jnp.maximum(places, 0)[..., None], axis=1)
    x = jnp.where(places[..., None] >= 0, seen, words)
    shape = (*tokens.shape, model.config.text.rope.axes)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[:, None], shape)
    hidden, _ = model.text(x, positions, tokens >= 0, remat=remat)
    losses, right = token_losses(model.text, hidden, batch["targets"].reshape(tokens.shape))
    rows = batch["tokens"].shape[0]
    return losses.reshape(rows, -1), right.reshape(rows, -1)
