"""What a training step minimises: sums over target tokens, so that batches of any shape add up."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from longvid_jax.models.llama import Decoder
from longvid_jax.models.qwen2_vl import Qwen2VL
from longvid_jax.video.preprocess import patchify

CHUNK = 4096  # tokens whose logits are in memory at a time


def token_losses(decoder: Decoder, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy float32 [B, N] of targets int32 [B, N], the next tokens of hidden [B, N, D], and which lead.

    Logits [tokens, V] are made for a chunk of tokens at a time, and again for the gradient.
    """

    @jax.checkpoint
    def chunk(xs):
        hidden, targets = xs
        logits = decoder.logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, logits.argmax(-1) == targets

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = -(-flat[1].size // CHUNK)
    if count == 1:
        losses, right = chunk(flat)
    else:
        size = -(-flat[1].size // count)
        pieces = jax.tree.map(lambda x: _padded(x, count * size).reshape(count, size, *x.shape[1:]), flat)
        losses, right = (x.reshape(-1)[: flat[1].size] for x in jax.lax.map(chunk, pieces))
    return losses.reshape(targets.shape), right.reshape(targets.shape)


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def answer_tokens(
    model: Qwen2VL, batch: Mapping[str, jax.Array], *, mean, std, remat: bool | str = False
) -> tuple[jax.Array, jax.Array]:
    """The losses of the next tokens [B, N], and which of them lead, of conversations about videos.

    batch: the arrays of data.batches.Batch. mean, std: of the pixels, as the model's processor has them.
    """
    vision = model.config.vision
    patches = patchify(
        batch["frames"], patch=vision.patch, temporal=vision.temporal, merge=vision.merge, mean=mean, std=std
    )
    rows, columns = (size // vision.patch for size in batch["frames"].shape[2:4])
    hidden = model(
        batch["tokens"],
        batch["positions"],
        batch["groups"],
        batch["video_index"],
        patches,
        (rows, columns),
        remat=remat,
    )
    return token_losses(model.text, hidden, batch["targets"])


def text_tokens(
    decoder: Decoder, batch: Mapping[str, jax.Array], *, remat: bool | str = False
) -> tuple[jax.Array, jax.Array]:
    """The same for a decoder alone: tokens, groups, targets and weights [B, N], positions [B, N, A]."""
    hidden, _ = decoder(
        decoder.embed(batch["tokens"]), batch["positions"], batch["groups"] >= 0, groups=batch["groups"], remat=remat
    )
    return token_losses(decoder, hidden, batch["targets"])


def sums(losses: jax.Array, right: jax.Array, batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Sum of the losses of the answers' tokens and their number; how many of them are right, and of tokens in all."""
    weights, tokens = batch["weights"], (batch["groups"] >= 0).sum(dtype=jnp.float32)
    return (losses * weights).sum(), weights.sum(), {"right": (right * weights).sum(), "tokens": tokens}


def answers(model: Qwen2VL, batch: Mapping[str, jax.Array], **how) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """What answer_tokens gives, in `sums`: what a training step takes."""
    return sums(*answer_tokens(model, batch, **how), batch)


def text(decoder: Decoder, batch: Mapping[str, jax.Array], **how) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """What text_tokens gives, in `sums`."""
    return sums(*text_tokens(decoder, batch, **how), batch)
