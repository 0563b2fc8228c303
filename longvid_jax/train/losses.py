"""What a training step minimises: sums over target tokens, so that batches of any shape add up."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from longvid_jax.models.bert import Bert
from longvid_jax.models.eva_vit import EvaViT
from longvid_jax.models.llama import Decoder
from longvid_jax.models.qwen2_vl import Qwen2VL
from longvid_jax.models.towers import Towers
from longvid_jax.video.preprocess import normalise, patchify

CHUNK = 4096  # tokens whose logits are in memory at a time
BIAS = -2.0  # of a word's logit before anything is learned, as most words name nothing in sight


@jax.named_scope("loss")
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
    patches, grid = _patches(model, batch["frames"], mean, std)
    hidden = model(
        batch["tokens"],
        batch["positions"],
        batch["groups"],
        batch["video_index"],
        patches,
        grid,
        packed=batch.get("packed"),
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


def naming(
    model: Qwen2VL, batch: Mapping[str, jax.Array], *, words, known, mean, std, remat: bool | str = False
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """How well the vision tower's tokens name what is in sight, in the decoder's own words; the decoder is not run.

    A token says a word as far as its product with the word's embedding goes, and a picture as far as its tokens do
    (log-sum-exp); losses are sigmoid ones, as in SigLIP (arXiv 2303.15343), for first words, second words and both in
    one token; first words only where there are colours. So vision arrives in the space of words before the decoder has
    to look there.

    batch: arrays of data.naming.WorldMoments, with K things. words: token numbers int [K, 2] of each thing's two words,
    the product of all first and all second ones in that order. known: bool [K], False for what is never told.
    Gives the sum of the losses of all moments, their number, and of how many every known thing is named right.
    """
    x = _seen(model, batch["frames"], mean, std, remat)  # [moments, N, D]
    embedding = model.text.embed.embedding[...]
    words, rows = np.asarray(words), len(dict.fromkeys(first for first, _ in words))
    table = words.reshape(rows, -1, 2)
    first, second = (x @ embedding[ids].T for ids in (table[:, 0, 0], table[0, :, 1]))
    both = first[..., :, None] + second[..., None, :]
    here = batch["things"].reshape(-1, *table.shape[:2])
    sure = 1 - batch["unsure"].reshape(here.shape)
    coloured = batch["coloured"].reshape(-1, 1)
    total, right = jnp.zeros(()), None
    for said, truth, told, bias, shown in (
        (first, here.max(2), sure.min(2), BIAS, coloured),
        (second, here.max(1), sure.min(1), BIAS, jnp.ones_like(coloured)),
        (both, here, sure * np.asarray(known, np.float32).reshape(table.shape[:2]), 2 * BIAS, coloured[..., None]),
    ):
        logits = jax.nn.logsumexp(said.astype(jnp.float32), axis=1) + bias
        told = jnp.maximum(told, truth) * shown  # what is in sight of a word is told, whatever else may be
        total += (optax.sigmoid_binary_cross_entropy(logits, truth) * told).sum()
        right = ((logits > 0) == (truth > 0)) | (told == 0)
    return total, jnp.float32(here.shape[0]), {"right": right.all((1, 2)).sum(dtype=jnp.float32)}


def _seen(model, frames: jax.Array, mean, std, remat: bool | str) -> jax.Array:
    """The vision tower's tokens [moments, N, D] of frames uint8 [B, F, H, W, 3]."""
    if isinstance(model.vision, EvaViT):
        pixels = normalise(frames.reshape(-1, *frames.shape[2:]), mean, std)
        return model.vision(pixels, remat=remat)
    patches, grid = _patches(model, frames, mean, std)
    return model.vision(patches.reshape(-1, *patches.shape[2:]), grid, remat=remat)


def fact_tokens(
    model: Towers, batch: Mapping[str, jax.Array], *, remat: bool | str = False
) -> tuple[jax.Array, jax.Array]:
    """As answer_tokens, of conversations about facts: see data.facts.FactBatches."""
    facts, at = model.told(batch["facts"]), batch["video_index"]
    text = model.text.embed(batch["tokens"])
    x = jnp.where(at[..., None] >= 0, jnp.take_along_axis(facts, jnp.maximum(at, 0)[..., None], axis=1), text)
    groups = batch["groups"]
    hidden, _ = model.text(x, batch["positions"], groups >= 0, groups=groups, packed=batch.get("packed"), remat=remat)
    return token_losses(model.text, hidden, batch["targets"])


def hidden_words(bert: Bert, ids: jax.Array, hidden: jax.Array, mask: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """BERT's masked language modelling (arXiv 1810.04805) with its own word embeddings as output layer.

    ids int32 [..., S] (-1: padding), hidden bool [..., S]: which are shown as the token `mask` and guessed. Gives the
    sum of the losses, the number of guesses, and how many are right.
    """
    ids, hidden = ids.reshape(-1, ids.shape[-1]), hidden.reshape(-1, ids.shape[-1])
    shown = jnp.where(hidden, mask, jnp.maximum(ids, 0))
    x, _ = bert(shown, ids >= 0)
    logits = jnp.einsum("bnd,vd->bnv", x, bert.words.embedding[...], preferred_element_type=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(ids, 0))
    right = logits.argmax(-1) == ids
    return (losses * hidden).sum(), hidden.sum(dtype=jnp.float32), (right * hidden).sum(dtype=jnp.float32)


def towers(
    model: Towers, batch: Mapping[str, Mapping[str, jax.Array]], *, mask: int, remat: bool | str = False, **naming_how
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Three towers side by side: the mean losses of naming, of answers from facts and of hidden words, added up.

    batch: `moments` as data.naming.WorldMoments and `facts` as data.facts.FactBatches give them.
    """
    seen, moments, names = naming(model, batch["moments"], remat=remat, **naming_how)
    facts = batch["facts"]
    told, weight, sums_ = sums(*fact_tokens(model, facts, remat=remat), facts)
    guessed, words, right = hidden_words(model.bert, facts["words"], facts["hidden"], mask)
    loss = seen / moments + told / jnp.maximum(weight, 1) + guessed / jnp.maximum(words, 1)
    found = {"named": names["right"] / moments, "told": sums_["right"] / jnp.maximum(weight, 1)}
    return loss, jnp.float32(1), {**found, "guessed": right / jnp.maximum(words, 1), "tokens": sums_["tokens"]}


def _patches(model: Qwen2VL, frames: jax.Array, mean, std) -> tuple[jax.Array, tuple[int, int]]:
    """Patches [B, T, P, inputs] of frames uint8 [B, F, H, W, 3], and the rows and columns of them."""
    vision = model.config.vision
    patches = patchify(frames, patch=vision.patch, temporal=vision.temporal, merge=vision.merge, mean=mean, std=std)
    rows, columns = (size // vision.patch for size in frames.shape[2:4])
    return patches, (rows, columns)
