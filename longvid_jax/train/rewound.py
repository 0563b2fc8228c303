"""The losses of ReWind's stages (arXiv 2411.15556): captions told apart, and answers from a memory and a few frames.

Letters: B videos, A questions about each, T frames, P patches of width W, N tokens of the decoder, S of the BERT.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from longvid_jax.memory import rewind
from longvid_jax.memory.frame_selection import Chosen, spread, spread_over
from longvid_jax.memory.rewind import TokenMemory
from longvid_jax.models.layers import FeedForward
from longvid_jax.models.perceiver import Instruction
from longvid_jax.models.rewind import Rewind, RewindConfig
from longvid_jax.ops.topk import compact
from longvid_jax.train.losses import token_losses
from longvid_jax.train.siglip import siglip
from longvid_jax.train.telling import distance_to_facts
from longvid_jax.video.preprocess import normalise

FRAMES = ("selected", "uniform", "oracle", "glimpses")
GLIMPSES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Looking:
    """How a video is watched and looked back at, as systems.rewind.ReWind has it; truncate: 0 for all clips; unroll as
    memory.rewind.watch takes it.

    relevance: weight, while telling is learned, of a loss that the paper does not have: how little of the question's
    attention the frames draw that show what it is about.

    To compare with: memory=False tells the decoder nothing of the memory. frames: "selected", or "uniform", spread over
    the video, or "oracle", over the frames that show what a question is about (of which data.telling knows), or
    "glimpses", of which as many show it as GLIMPSES has, in turns, and the others are spread over the rest.

    gaps: nothing is told that was written of the frames which show it, so that details have to be looked at.
    """

    clip_frames: int = 8
    num_candidates: int = 64
    num_selected: int = 8
    num_neighbors: int = 5
    truncate: int = 0
    unroll: int = 1
    relevance: float = 0.0
    memory: bool = True
    frames: str = "selected"
    gaps: bool = False

    def room(self, frames: int) -> int:
        """Frames of a memory for so many: whole clips."""
        return -(-frames // self.clip_frames) * self.clip_frames

    def vectors(self, config: RewindConfig, frames: int) -> int:
        """How many stand before the words for a video of so many frames; see Rewind.told."""
        written = self.room(frames) * config.perceiver.num_write if self.memory else 0
        return written + 1 + self.num_selected * config.detail_tokens


def rewound_tokens(
    model: Rewind, batch: Mapping[str, jax.Array], *, looking: Looking, mean, std, remat: bool | str = False
) -> tuple[jax.Array, jax.Array]:
    """The losses of the next tokens [B, A * N], and which of them lead: of data.instructed.InstructedBatches.

    Which frames are looked at in detail is no matter of gradients; that the memory can be asked is learned by reading.
    """
    memory, instruction, details = _watched(model, batch, looking=looking, mean=mean, std=std, remat=remat)
    if looking.frames == "selected":
        selected = _selected(model, *jax.lax.stop_gradient((memory, model.asked(instruction))), looking)[1].selected
    else:
        shown = jnp.repeat(batch["shown"], batch["tokens"].shape[1], axis=0)
        seen = shown if looking.frames == "uniform" else batch["seen"].reshape(shown.shape)
        choose = _glimpses if looking.frames == "glimpses" else spread_over
        selected = choose(seen, shown, looking.num_selected)
    details = jnp.take_along_axis(details, selected.indices[..., None, None], axis=1)
    written, told = memory.tokens, memory.valid
    if not looking.memory:  # what is not told is not made either: the compiler leaves out what nothing hangs on
        written, told = written[:, :0], told[:, :0]
    if looking.gaps:
        seen = batch["seen"].reshape(len(told), -1)
        told &= ~jnp.pad(seen, [(0, 0), (0, told.shape[1] - seen.shape[1])])
    vectors, there = model.told(written, told, details, selected.valid)
    return _said(model, vectors, there, batch, remat)


def noting(
    model: Rewind,
    batch: Mapping[str, jax.Array],
    *,
    facts: FeedForward,
    looking: Looking,
    mean,
    std,
    remat: bool | str = False,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """How well the projected memory tells what answers the questions, in the vectors that `facts` makes of it.

    batch: of data.telling.TellingBatches, noted down in as many slots a frame as tokens are written of it. Gives what
    telling.distance_to_facts does, with looking.relevance times -log of the share of attention that frames draw which
    show what a question is about, for each that there are such frames of.
    """
    memory, instruction, _ = _watched(model, batch, looking=looking, mean=mean, std=std, remat=remat)
    vectors = model.memory_projection(memory.tokens.reshape(len(memory.tokens), -1, memory.tokens.shape[-1]))
    slots = batch["facts"].shape[2]
    distance, count, sums = distance_to_facts(vectors[:, :slots], facts, batch)
    if looking.relevance:
        scores = _selected(model, memory, model.asked(instruction), looking)[0]
        seen = batch["seen"].reshape(len(scores), -1)
        share = (scores[:, : seen.shape[1]] * seen).sum(1) / model.config.perceiver.heads
        there = seen.any(1) & (batch["weights"].max(-1).reshape(-1) > 0)
        missed = jnp.where(there, -jnp.log(jnp.where(there, share, 1) + 1e-6), 0).sum()
        distance += looking.relevance * missed
    return distance, count, sums


def _watched(
    model: Rewind, batch: Mapping[str, jax.Array], *, looking: Looking, mean, std, remat
) -> tuple[TokenMemory, Instruction, jax.Array]:
    """The memory of B * A rows after all clips, what they ask, and their frames' detail tokens [B * A, T, m, W]."""
    asked = batch["tokens"].shape[1]
    pixels = normalise(batch["frames"], mean, std)
    patch = model.config.vision.patch
    grid = pixels.shape[2] // patch, pixels.shape[3] // patch
    features = model.features(pixels, remat=remat)  # [B, T, P, W]
    details = rewind.pool(features, grid, model.config.detail_tokens)
    features, details, shown = (jnp.repeat(x, asked, axis=0) for x in (features, details, batch["shown"]))
    words = batch["words"].reshape(-1, batch["words"].shape[-1])
    instruction = model.instruct(jnp.maximum(words, 0), words >= 0)

    config, room = model.config.perceiver, looking.room(shown.shape[1])
    memory = rewind.watch(
        rewind.empty(len(words), room, config.num_write, config.width, config.heads, features.dtype),
        rewind.in_clips(features, shown, looking.clip_frames),
        *model.cycle(instruction, remat=remat),
        truncate=looking.truncate or None,
        remat=remat,
        unroll=looking.unroll,
    )
    return memory, instruction, details


def _glimpses(seen: jax.Array, valid: jax.Array, num_select: int) -> Chosen:
    """num_select of the valid entries [B, N], evenly; of them a row's number of GLIMPSES, or all, of those seen [B, N].

    The number changes from row to row, and with what is seen first, so that no kind of question has always the same.
    """
    seen = seen & valid
    each = [min(count, num_select) for count in GLIMPSES]
    mixed = [_mask(spread(seen, n), seen) | _mask(spread(valid & ~seen, num_select - n), seen) for n in each]
    rows = jnp.arange(len(seen))
    turn = (rows + seen.shape[1] + seen.argmax(-1)) % len(each)
    anywhere = _mask(spread(valid, num_select), seen)
    mask = jnp.where(seen.any(-1, keepdims=True), jnp.stack(mixed)[turn, rows], anywhere)
    return Chosen(compact(mask, num_select), jnp.arange(num_select) < mask.sum(-1, keepdims=True))


def _mask(chosen: Chosen, like: jax.Array) -> jax.Array:
    """Which entries, bool as `like` [B, N], were chosen."""
    rows = jnp.arange(len(like))[:, None]
    return jnp.zeros_like(like).at[rows, chosen.indices].max(chosen.valid)


def _selected(model: Rewind, memory: TokenMemory, q: jax.Array, looking: Looking):
    """Relevance and selection, see memory.rewind.select."""
    return rewind.select(
        memory,
        q,
        num_candidates=looking.num_candidates,
        num_select=looking.num_selected,
        num_neighbors=looking.num_neighbors,
    )


def _said(model: Rewind, vectors: jax.Array, there: jax.Array, batch, remat) -> tuple[jax.Array, jax.Array]:
    """What the decoder makes of vectors [B * A, V, width], those `there` [B * A, V], and words."""
    tokens, places = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "places"))
    words, at = model.text.embed(jnp.maximum(tokens, 0)), jnp.maximum(places, 0)
    seen = jnp.take_along_axis(vectors.astype(words.dtype), at[..., None], axis=1)
    x = jnp.where(places[..., None] >= 0, seen, words)
    valid = (tokens >= 0) & ((places < 0) | jnp.take_along_axis(there, at, axis=1))
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)[..., None]
    positions = jnp.broadcast_to(positions, (*tokens.shape, model.config.text.rope.axes))
    hidden, _ = model.text(x, positions, valid, remat=remat)
    losses, right = token_losses(model.text, hidden, batch["targets"].reshape(tokens.shape))
    rows = batch["tokens"].shape[0]
    return losses.reshape(rows, -1), right.reshape(rows, -1)


def contrast(
    model: Rewind, batch: Mapping[str, jax.Array], *, looking: Looking, mean, std, remat: bool | str = False
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """How well videos and captions find each other: what pre-training minimises, with no memory and no instruction.

    batch: frames uint8 [B, T, H, W, 3] and shown bool [B, T], captions int32 [B, S] in the BERT's tokens (-1: padding).
    Gives SigLIP's sum, the number of videos, and of how many the own caption is the nearest.
    """
    features = model.features(normalise(batch["frames"], mean, std), remat=remat)
    clips = rewind.in_clips(features, batch["shown"], looking.clip_frames)
    count, rows, frames = clips.valid.shape
    together = jax.tree.map(lambda x: x.reshape(count * rows, *x.shape[2:]), clips)
    numbers = jnp.arange(count * frames).reshape(count, 1, frames)
    numbers = jnp.broadcast_to(numbers, clips.valid.shape).reshape(count * rows, frames)
    queries = model.perceiver.queries(count * rows)
    seen = model.perceiver(queries, together.features, numbers, together.valid, remat=remat)
    seen = jnp.moveaxis(seen.reshape(count, rows, *seen.shape[1:]), 1, 0).reshape(rows, -1, *seen.shape[2:])
    valid = jnp.moveaxis(clips.valid, 1, 0).reshape(rows, -1)
    video = model.contrast.of_video(seen, valid)
    captions = batch["captions"]
    read, _ = model.bert(jnp.maximum(captions, 0), captions >= 0)
    caption = model.contrast.of_caption(read[:, 0])
    scale = [x[...].astype(jnp.float32)[0] for x in (model.contrast.temperature, model.contrast.offset)]
    right = ((video @ caption.T).argmax(1) == jnp.arange(rows)) & batch["shown"].any(1)
    tokens = (captions >= 0).sum(dtype=jnp.float32)
    return siglip(video, caption, *scale), jnp.float32(rows), {"right": right.sum(dtype=jnp.float32), "tokens": tokens}
