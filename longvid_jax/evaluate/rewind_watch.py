"""Several questions about each of several videos, watched by ReWind side by side; and what to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longvid_jax.data.telling import relevant
from longvid_jax.memory import frame_selection
from longvid_jax.memory.frame_selection import Chosen, Selection
from longvid_jax.memory.state import RewindMemory
from longvid_jax.ops.topk import top_k
from longvid_jax.systems.rewind import ReWind, RewindModel
from longvid_jax.video import Frames

SELECTED, UNIFORM, ORACLE, RELEVANT = "selected", "uniform", "oracle", "relevant"


class Variant(RewindModel):
    """A ReWind with its memory told to the decoder or not, and other frames in detail.

    frames: as ReWind selects them; spread over the video ("uniform") or over `seen` ("oracle"), all frames where that
    has none; or the most relevant ("relevant").
    """

    def __init__(self, model: RewindModel, method: ReWind, *, memory: bool = True, frames: str = SELECTED):
        super().__init__(
            model.model, model.settings, method=method, tokenizer=model.tokenizer, words=model.words, mesh=model.mesh
        )
        self.told, self.frames = memory, frames
        self.seen: np.ndarray | None = None  # bool [B, T]

    def _look_back(self, memory: RewindMemory) -> tuple[jax.Array, Selection]:
        scores, selection = super()._look_back(memory)
        valid, count = memory.written.valid, self.choices.num_selected
        if self.frames == UNIFORM:
            selection = Selection(selection.candidates, _spread(valid, count))
        elif self.frames == ORACLE:
            seen = np.zeros(valid.shape, bool)
            seen[:, : self.seen.shape[1]] = self.seen
            seen = valid & seen
            seen = jnp.where(seen.any(-1, keepdims=True), seen, valid)
            selection = Selection(selection.candidates, _spread(seen, count))
        elif self.frames == RELEVANT:
            selection = Selection(selection.candidates, _most_relevant(scores, valid, count))
        return scores, selection

    def _placed(self, memory, written, selected):
        return super()._placed(memory, written if self.told else np.zeros_like(written), selected)


_spread = jax.jit(frame_selection.spread, static_argnums=1)


def _most_relevant(scores: jax.Array, valid: jax.Array, count: int) -> Chosen:
    kept = top_k(scores, count, min(count, scores.shape[-1]), valid=valid)
    padding = count - kept.indices.shape[-1]
    return Chosen(jnp.pad(kept.indices, [(0, 0), (0, padding)]), jnp.arange(count) < kept.count[:, None])


def watched(model: RewindModel, world, texts: Sequence[str], times: np.ndarray, size: tuple[int, int]) -> RewindMemory:
    """The memory of a world for several questions, a row each."""
    memory = model.begin(list(texts))
    for start in range(0, len(times), model.window):
        now = times[start : start + model.window]
        frames = Frames.empty(1, model.window, size)
        frames.pixels[0, : len(now)] = world.render(now, size)
        frames.times[0, : len(now)] = now
        frames.valid[0, : len(now)] = True
        memory = model.watch(memory, frames)
    return model.finish(memory)


def answers(
    model: RewindModel,
    worlds: Sequence,
    asked: Sequence,
    times: Callable,
    size: tuple[int, int],
    *,
    max_new_tokens: int,
    progress: Callable[[int], None],
    seen: Callable[[RewindMemory, Sequence[int]], None] = lambda memory, here: None,
) -> list[str]:
    """What the model says to each question; each world is watched once, side by side for all its questions.

    seen(memory, here) is told of each memory and of the numbers of the questions in its first rows.
    """
    of_video: dict[int, list[int]] = {}
    for i, one in enumerate(asked):
        of_video.setdefault(one.video, []).append(i)
    most = max(map(len, of_video.values()))
    told = [""] * len(asked)
    for video, here in of_video.items():
        filled = here + here[-1:] * (most - len(here))  # so that one program serves all
        when = times(worlds[video])
        memory = watched(model, worlds[video], [asked[i].text for i in filled], when, size)
        if isinstance(model, Variant):
            model.seen = np.stack([shows(worlds[video], asked[i].question, when) for i in filled])
        seen(memory, here)
        said = model.answer(memory, max_new_tokens=max_new_tokens).text
        for i, text in zip(here, [said] if isinstance(said, str) else said, strict=False):
            told[i] = text.strip()
        progress(len(here))
    return told


def shows(world, question, times: np.ndarray) -> np.ndarray:
    """bool [T]: the frames that show what a question is about."""
    found = np.zeros(len(times), bool)
    for event in relevant(world, question):
        found |= (event.start <= times) & (times < event.end)
    return found
