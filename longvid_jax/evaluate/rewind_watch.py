"""Several questions about each of several videos, watched by ReWind side by side; and what to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from longvid_jax.data import telling
from longvid_jax.memory import frame_selection
from longvid_jax.memory.frame_selection import Selection
from longvid_jax.memory.state import RewindMemory
from longvid_jax.systems.rewind import ReWind, RewindModel
from longvid_jax.video import Frames

TOGETHER = 64  # questions, at most
MAX_NEW_TOKENS = 24  # what is longer than all right answers is wrong
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
        chosen = selection.selected
        if self.frames in (UNIFORM, ORACLE):
            seen = np.asarray(valid)
            if self.frames == ORACLE:
                seen = np.pad(self.seen, [(0, 0), (0, valid.shape[1] - self.seen.shape[1])])
            chosen = _spread_over(seen, valid, count)
        elif self.frames == RELEVANT:
            chosen = _most_relevant(scores, valid, count)
        return scores, Selection(selection.candidates, chosen)

    def _placed(self, memory, written, selected):
        return super()._placed(memory, written if self.told else np.zeros_like(written), selected)


_spread_over = jax.jit(frame_selection.spread_over, static_argnums=2)
_most_relevant = jax.jit(frame_selection.most_relevant, static_argnums=2)


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


def memories(
    model: RewindModel, worlds: Sequence, asked: Sequence, times: Callable, size: tuple[int, int]
) -> Iterator[tuple[list[int], RewindMemory, np.ndarray]]:
    """Each world watched, side by side for up to TOGETHER of its questions.

    Gives the questions' numbers, the memory whose first rows are theirs, and bool [B, T] which frames show what each
    row is about. What was watched serves every variant of the model that has clips of as many frames.
    """
    of_video: dict[int, list[int]] = {}
    for i, one in enumerate(asked):
        of_video.setdefault(one.video, []).append(i)
    groups = [rows[n : n + TOGETHER] for rows in of_video.values() for n in range(0, len(rows), TOGETHER)]
    most = max(map(len, groups))
    for here in groups:
        seen = worlds[asked[here[0]].video]
        filled = here + here[-1:] * (most - len(here))  # so that one program serves all
        when = times(seen)
        memory = watched(model, seen, [asked[i].text for i in filled], when, size)
        yield here, memory, np.stack([shows(seen, asked[i].question, when) for i in filled])


def answers(
    model: RewindModel,
    worlds: Sequence,
    asked: Sequence,
    times: Callable,
    size: tuple[int, int],
    *,
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> list[str]:
    """What the model says to each question."""
    told = [""] * len(asked)
    for here, memory, _ in memories(model, worlds, asked, times, size):
        for i, text in zip(here, said(model, memory, max_new_tokens), strict=False):
            told[i] = text
        progress(len(here))
    return told


def said(model: RewindModel, memory: RewindMemory, max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    """An answer for each row of a memory."""
    text = model.answer(memory, max_new_tokens=max_new_tokens).text
    return [one.strip() for one in ([text] if isinstance(text, str) else text)]


def shows(world, question, times: np.ndarray) -> np.ndarray:
    """bool [T]: the frames that show what a question is about."""
    return np.any(
        [np.zeros(len(times), bool), *(telling.shows(one, times) for one in telling.relevant(world, question))], 0
    )
