"""The machine behind ReTaKe's interface.

Chunks go in, the memory's bookkeeping is done on the host, compiled steps do the rest.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longvid_jax.errors import PromptError
from longvid_jax.generate import Generated
from longvid_jax.memory.dpselect import Lookback
from longvid_jax.memory.state import Chunk, Pending, RetakeMemory
from longvid_jax.models.qwen2_vl import Qwen2VL
from longvid_jax.systems import retake_steps as steps
from longvid_jax.systems import text_steps

ANSWER_ROOM = 256  # tokens of text and answer for which a cache of known length has room
TEXT_BUCKET = 16  # text is padded to this many tokens times a power of two, so that few lengths are compiled


class Reader:
    """Reads text and chunks of features into a memory, on one model with one method's choices.

    Which tokens stay is decided on the device; how many is worked out here, in float64, so nothing waits for the
    device.
    """

    def __init__(self, model: Qwen2VL, method, static: steps.Static, mesh=None):
        self.model, self.method, self.static, self.mesh = model, method, static, mesh
        self._text = steps.Static(reforge=static.reforge)  # all that reading and writing text depends on
        self.length = method.chunk_frames // model.config.vision.temporal  # temporal patches of a chunk

    def on_mesh(self):
        """The context in which steps run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def begin(
        self,
        before: Sequence[list[int]],
        behind: Sequence[list[int]],
        expected: np.ndarray,
        grid: tuple[int, int] | None,
    ) -> RetakeMemory:
        """A memory that has read the text `before` the video: token ids a row.

        `expected` [B] temporal patches (0: unknown).
        """
        batch = len(before)
        memory = RetakeMemory(
            cache=None,
            lookback=None,
            waiting=None,
            pending=None,
            grid=np.array(grid or (0, 0)),
            start=np.array([len(ids) for ids in before]),
            prompt=pad_text(behind),
            expected=np.asarray(expected),
            frames=np.zeros(batch, int),
            read=np.zeros(batch, int),
            dropped=np.zeros(batch, int),
            chunks=(),
        )
        text = pad_text(before)
        capacity = _bucket(max(text.shape[1], self._expected_length(memory)))
        cache = text_steps.new_cache(self.model.text, batch=batch, capacity=capacity)
        if memory.start.any():
            cache, _ = steps.read_text(self.model, cache, text, np.zeros(batch, int), static=self._text)
        return dataclasses.replace(memory, cache=cache)

    def look(self, memory: RetakeMemory, features: jax.Array, patches: np.ndarray, times: np.ndarray) -> RetakeMemory:
        """Takes in the features [B, length, N, D] of the next chunk; the decoder reads the one held back before it."""
        memory = self._read_pending(memory, features[:, 0], patches > 0)
        return dataclasses.replace(memory, pending=Pending(features, patches, times))

    def finish(self, memory: RetakeMemory) -> RetakeMemory:
        """The decoder reads what is held back: nothing follows."""
        return self._read_pending(memory, None, None)

    def read_all(
        self, memory: RetakeMemory, features: list[jax.Array], patches: np.ndarray, times: np.ndarray
    ) -> RetakeMemory:
        """Reads a whole video of which DPSelect drops temporal patches globally: features [B, length, N, D] a chunk."""
        # Chunks in a power-of-two number, so that few lengths are compiled.
        blank = [jnp.zeros_like(features[0])] * (_bucket(len(features), 1) - len(features))
        features = jnp.concatenate([*features, *blank], axis=1)
        times = np.pad(times, ((0, 0), (0, features.shape[1] - times.shape[1])))
        count = self._let_through(patches)
        marked = self._mark(memory, Pending(features, patches, times), None, count=count, width=features.shape[1])
        memory = dataclasses.replace(memory, dropped=patches - count)
        for start in range(0, int(count.max()), self.length):
            chunk = marked._replace(
                **{
                    field: getattr(marked, field)[:, start : start + self.length]
                    for field in ("features", "peak", "times", "share", "change")
                }
            )
            memory = self._read(memory, chunk, np.clip(count - start, 0, self.length))
        return memory

    def answer(
        self, memory: RetakeMemory, text: np.ndarray, *, max_new_tokens: int, **decoding
    ) -> tuple[Generated, np.ndarray]:
        """Reads text int32 [B, S] behind a finished memory and decodes; consumes the memory.

        Returns what was generated, and int [B] how many tokens each row's cache then held before its answer.
        """
        length, seen = (text >= 0).sum(1), memory.read + memory.dropped
        self.check_length(int(memory.start.max()), int(length.max()), max_new_tokens, int(self._span(memory).max()))
        memory = self._with_room(memory, text.shape[1] + max_new_tokens)
        # M-RoPE: text goes on behind the largest position of the video on any axis (ids of dropped patches are taken
        # back).
        start = memory.start + np.where(seen > 0, np.maximum(seen, memory.grid.max()), 0) - memory.dropped
        cache, logits = steps.read_text(self.model, memory.cache, text, start, static=self._text)
        out = steps.write_answer(
            self.model, cache, logits, start + length, static=self._text, max_new_tokens=max_new_tokens, **decoding
        )
        return out, memory.stored + length

    def _read_pending(
        self, memory: RetakeMemory, after: jax.Array | None, has_after: np.ndarray | None
    ) -> RetakeMemory:
        pending = memory.pending
        if pending is None:
            return memory
        memory = dataclasses.replace(memory, pending=None)
        patches = pending.patches
        if self.method.dpselect is None:
            chunk = steps.Marked(None, pending.features, None, pending.times, None, None)
        elif self.method.dpselect_ratio == 1:
            chunk = self._mark(memory, pending, after, has_after)
        else:
            patches, width = self._let_through(patches), int(self._let_through(np.array(self.length)))
            chunk = self._mark(memory, pending, after, has_after, count=patches, width=width)
            memory = dataclasses.replace(memory, dropped=memory.dropped + pending.patches - patches)
        return self._read(dataclasses.replace(memory, lookback=chunk.lookback), chunk, patches)

    def _mark(self, memory, pending: Pending, after, has_after=None, *, count=None, width=None) -> steps.Marked:
        features, lookback = pending.features, memory.lookback
        if lookback is None:
            per_patch = self.method.dpselect == "patch"
            one = Lookback.empty(*features.shape[2:], features.dtype, per_patch=per_patch)
            lookback = jax.tree.map(lambda x: jnp.broadcast_to(x, (features.shape[0], *x.shape)), one)
        if after is None:
            after, has_after = features[:, 0], np.zeros(features.shape[0], bool)
        return steps.mark(
            lookback, features, after, pending.patches, has_after, pending.times, count, static=self.static, width=width
        )

    def _read(self, memory: RetakeMemory, chunk: steps.Marked, patches: np.ndarray) -> RetakeMemory:
        """The decoder reads a chunk of which `patches` [B] temporal patches are real."""
        tokens = chunk.features.shape[1] * chunk.features.shape[2]
        memory = self._with_room(memory, tokens)
        kept = self._keep(memory, patches)
        cache = steps.read_chunk(
            self.model,
            memory.cache,
            chunk.features,
            chunk.peak,
            patches,
            memory.start,
            memory.read,
            kept,
            memory.prompt if self.method.prompt_guided else None,
            self._random(memory),
            grid=tuple(memory.grid.tolist()),
            static=self.static,
        )
        line = Chunk(np.array(memory.offset), patches, kept, chunk.times, chunk.share, chunk.change)
        return dataclasses.replace(memory, cache=cache, read=memory.read + patches, chunks=(*memory.chunks, line))

    def _random(self, memory: RetakeMemory) -> jax.Array | None:
        """The key of the next chunk's draws, where tokens are drawn."""
        if self.method.scores == "attention":
            return None
        return jax.random.fold_in(jax.random.key(self.method.seed), len(memory.chunks))

    def check_length(self, before: int, behind: int, max_new_tokens: int, video: int = 0) -> None:
        """Raises PromptError where text, video (positions in time) and answer exceed the positions the model counts."""
        rope = self.model.config.text.rope
        limit = int(rope.original_length * rope.factor)
        if before + video + behind + max_new_tokens > limit:
            raise PromptError(
                f"The prompt is too long: {before + behind} tokens of text, {video} temporal patches of video and "
                f"{max_new_tokens} new tokens exceed the model's {limit} positions; shorten the question, sample fewer "
                "frames, or use yarn_factor."
            )

    # --- counts, on the host ------------------------------------------------------------------------------------------

    def _ratio(self, memory: RetakeMemory) -> np.ndarray:
        """float64 [B]: the share of a chunk's tokens that stays."""
        if self.method.budget is None:
            return np.full(len(memory.start), float(self.method.keep_ratio))
        video = memory.expected * int(memory.grid.prod())
        length = memory.start + video + (memory.prompt >= 0).sum(1)
        return np.where(length <= self.method.budget, 1.0, self.method.budget / length)

    def _keep(self, memory: RetakeMemory, patches: np.ndarray) -> np.ndarray:
        """int [B]: how many tokens stay of a chunk of `patches` [B] temporal patches."""
        total = patches * int(memory.grid.prod())
        return np.where(total > 0, np.maximum(1, (self._ratio(memory) * total).astype(np.int64)), 0)

    def _span(self, memory: RetakeMemory) -> np.ndarray:
        """int [B]: at most so many positions in time the video takes; compressed chunks move together."""
        if not (self.static.compress and self.static.reforge):
            return memory.read + memory.dropped
        tokens = int(memory.grid.prod())
        spans = [(c.patches - 1) * c.kept // np.maximum(c.patches * tokens, 1) + 1 for c in memory.chunks]
        return sum(spans, np.zeros_like(memory.start))

    def _let_through(self, patches: np.ndarray) -> np.ndarray:
        """How many temporal patches DPSelect lets through; halves go to the even number, as in the authors' round()."""
        count = np.maximum(1, np.rint(self.method.dpselect_ratio * patches).astype(np.int64))
        return np.minimum(count, patches)

    def _expected_length(self, memory: RetakeMemory) -> int:
        """Tokens a row for which the cache should have room from the start."""
        if not memory.grid.any() or not memory.expected.any():
            return 0
        full, rest = divmod(int(memory.expected.max()), self.length)
        chunk = self._keep(memory, np.full_like(memory.start, self.length)).max()
        return (
            int(memory.start.max() + (full + (rest > 0) + 1) * chunk)
            + self.length * int(memory.grid.prod())
            + ANSWER_ROOM
        )

    def _with_room(self, memory: RetakeMemory, tokens: int) -> RetakeMemory:
        """The memory with room for so many more tokens: a full cache is copied into the next bucket."""
        capacity = memory.cache.capacity
        if memory.offset + tokens <= capacity:
            return memory
        return dataclasses.replace(
            memory, cache=steps.grow_cache(memory.cache, capacity=_bucket(memory.offset + tokens))
        )


def pad_text(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Token ids int32 [B, S] of rows of different lengths, -1 behind their end."""
    text = np.full((len(rows), _bucket(max(map(len, rows)), TEXT_BUCKET)), -1, np.int32)
    for row, ids in zip(text, rows, strict=True):
        row[: len(ids)] = ids
    return text


def _bucket(size: int, least: int = 256) -> int:
    """The next power of two, `least` at the least."""
    return max(least, 1 << (size - 1).bit_length()) if size > 1 else least
