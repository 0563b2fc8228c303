"""AdaCM2 (arXiv 2411.12593) on InstructBLIP: a Q-Former watches frame after frame with a video cache that is bounded.

Its cross-attention layers remember keys and values of the frames, and after each frame forget what the queries, which
know the question, attended to least. The 32 queries' outputs after the last frame are what the decoder reads.
"""

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import numpy as np

from longvid_jax.convert.settings import Settings
from longvid_jax.errors import InstructionError, OptionError, VideoWarning
from longvid_jax.memory import adacm2
from longvid_jax.memory.state import AdaCM2Memory, Waiting
from longvid_jax.models.instructblip import InstructBlip
from longvid_jax.systems import adacm2_steps as steps
from longvid_jax.systems.base import MAX_NEW_TOKENS
from longvid_jax.systems.prompted import PromptedModel
from longvid_jax.systems.query_prompts import QueryPrompts
from longvid_jax.systems.results import AdaCM2Trace, Answer, Output
from longvid_jax.video import preprocess

WINDOW = 16  # frames that a step takes in


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaCM2:
    """Run-time choices of AdaCM2, for all cross-attention layers alike or a tuple with one for each.

    alpha: share of the cache that counts as recent and stays. beta: share of the older part that stays. 1 and 1 keep
    everything. carry_queries: a frame's queries are the outputs of the frame before (fig. 4), or with False always the
    learned ones; None: as the checkpoint was trained. capacity: tokens that a layer's cache has room for, at least as
    many as eq. 8 needs; None: so many.
    scores: "attention", or, to compare with, "shared" (one index set for all layers), "random" (with `seed`), "recent".
    """

    alpha: float | tuple[float, ...] = 0.1
    beta: float | tuple[float, ...] = 0.1
    carry_queries: bool | None = None
    capacity: int | None = None
    scores: str = "attention"
    seed: int = 0

    def __post_init__(self):
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            for one in value if isinstance(value, Sequence) else (value,):
                if not 0 < one <= 1:
                    raise OptionError(f"{name} is {one}, but must be above 0 and at most 1.")
            if isinstance(value, Sequence):
                object.__setattr__(self, name, tuple(map(float, value)))
        if self.scores not in adacm2.SCORES:
            raise OptionError(f"scores is {self.scores!r}, but must be one of {', '.join(adacm2.SCORES)}.")
        if self.capacity is not None and self.capacity < 1:
            raise OptionError(f"capacity is {self.capacity}, but must be a positive number of tokens.")

    def policy(self, layers: int) -> adacm2.Policy:
        """For a Q-Former with so many cross-attention layers; OptionError for a tuple of another length."""
        shares = []
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            value = value if isinstance(value, tuple) else (float(value),) * layers
            if len(value) != layers:
                raise OptionError(f"{name} has {len(value)} values, but this Q-Former has {layers} such layers.")
            shares.append(value)
        if self.scores == "shared" and any(len(set(value)) > 1 for value in shares):
            raise OptionError("scores 'shared' keeps the same tokens in all layers; give all one alpha and one beta.")
        return adacm2.Policy(*shares, self.scores)


# The plain model: every token of every frame stays.
PLAIN = AdaCM2(alpha=1.0, beta=1.0, carry_queries=False)


class AdaCM2Model(PromptedModel):
    """An InstructBLIP that watches videos; with method None nothing is forgotten."""

    def __init__(
        self,
        model: InstructBlip,
        settings: Settings,
        *,
        method: AdaCM2 | None = None,
        tokenizer=None,
        words=None,
        mesh=None,
    ):
        """words: the Q-Former's tokenizer."""
        super().__init__(model, settings, method=method, tokenizer=tokenizer, mesh=mesh)
        self.words = words
        self._prompts = QueryPrompts(model.config, settings.video_token, tokenizer, words)
        choices, config = method or PLAIN, model.config
        self.policy = choices.policy(config.qformer.cross_layers)
        carry = choices.carry_queries
        self.carry_queries = config.carry_queries if carry is None else carry
        self._random = jax.random.key(choices.seed) if choices.scores == "random" else None
        self._capacity = choices.capacity

    # --- watching -----------------------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Frames that one step takes in; `watch` takes any number."""
        return WINDOW

    @property
    def asks_once(self) -> bool:
        """A memory depends on its question, unless the Q-Former takes no instructions, as BLIP-2's."""
        return self.model.config.qformer.words

    def _about(self, questions: list[str]) -> AdaCM2Memory:
        return self._begin(*self._prompts.asking(questions))

    def _begin(self, instruction: np.ndarray | None, ids: np.ndarray, places: np.ndarray) -> AdaCM2Memory:
        batch = len(ids)
        return AdaCM2Memory(
            cache=None,
            outputs=None,
            waiting=None,
            instruction=instruction,
            ids=ids,
            places=places,
            grid=np.zeros(2, int),
            frames=np.zeros(batch, int),
            read=np.zeros(batch, int),
            times=np.zeros((1, 0), np.float32),
        )

    def _look(self, memory: AdaCM2Memory, window: Waiting) -> AdaCM2Memory:
        grid = self._grid(window.pixels, memory.grid)
        with self._on_mesh():
            features = steps.encode_frames(
                self.model,
                preprocess.fill_invalid(window.pixels, window.valid),
                mean=self.settings.mean,
                std=self.settings.std,
            )
            return self._take_in(memory, features, grid, window.times, window.valid)

    def _take_in(self, memory: AdaCM2Memory, features, grid, times, valid) -> AdaCM2Memory:
        """Takes in frames of features [B or 1, T, P, C]; the valid ones of [B or 1, T] are a prefix of each row."""
        batch = len(memory.read)
        valid = np.broadcast_to(valid, (batch, valid.shape[1]))
        read = memory.read + valid.sum(1)
        self.warn_of_positions(grid, int(memory.read.max()), int(read.max()), stacklevel=4)
        cache, outputs = self._with_room(memory, features.shape[2], int(read.max()))
        cache, outputs = steps.watch_window(
            self.model,
            cache,
            outputs,
            features,
            memory.read,
            valid,
            memory.instruction,
            self._random,
            policy=self.policy,
            carry_queries=self.carry_queries,
        )
        used = int(valid.sum(1).max())  # so that the next frame's place is its number
        seen = np.where(valid[: len(times)], times, np.nan).astype(np.float32)[:, :used]
        earlier = memory.times if memory.times.size else np.zeros((len(times), 0), np.float32)
        return dataclasses.replace(
            memory,
            cache=cache,
            outputs=outputs,
            grid=grid,
            read=read,
            times=np.concatenate([earlier, seen], axis=1),
        )

    def _with_room(self, memory: AdaCM2Memory, tokens: int, frames: int):
        """The cache and outputs of a memory, with room for a number of frames in all."""
        shares = list(zip(self.policy.alpha, self.policy.beta, strict=True))
        bounded = [adacm2.largest(tokens, a, b) for a, b in shares if adacm2.ratio(a, b) < 1]
        needed = max(bounded, default=0)
        everything = len(bounded) < len(shares)  # is what a layer keeps
        if self._capacity is not None:
            needed = max(needed, tokens * frames if everything else 0)
            if self._capacity < needed:
                raise OptionError(
                    f"capacity is {self._capacity}, but with these alpha and beta {frames if everything else 'any'} "
                    f"frames of {tokens} tokens need room for {needed}; give at least that many."
                )
            needed = self._capacity
        elif everything:  # room for a power of two of frames
            needed = max(needed, tokens * max(WINDOW, 1 << (frames - 1).bit_length()))
        if memory.cache is None:
            return steps.new_memory(self.model, batch=len(memory.read), capacity=needed)
        if memory.cache.capacity < needed:
            return steps.grow_cache(memory.cache, capacity=needed), memory.outputs
        return memory.cache, memory.outputs

    def warn_of_positions(self, grid: Sequence[int], before: int, after: int, *, stacklevel: int = 2) -> None:
        """Warns, as frames of a grid of patches are watched, of positions that the model has not learned.

        before, after: how many frames have been watched, and with these.
        """
        known = self.model.config.num_frames
        if not before:
            self._warn_of_grid(grid, stacklevel + 1)
        if known and before <= known < after:
            warnings.warn(
                f"The model knows {known} frame positions; frames beyond them all get the last one's.",
                VideoWarning,
                stacklevel=stacklevel + 1,
            )

    # --- answering ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        pixel_values,
        qformer_input_ids=None,
        qformer_attention_mask=None,
        input_ids=None,
        attention_mask=None,
        frame_mask=None,
        **decoding,
    ) -> Output:
        """Continues what the Hugging Face processors make.

        pixel_values float [B, T, 3, H, W] (or [B, 3, H, W]: one frame), normalised; frame_mask bool [B, T]: which
        frames are real, a prefix of each row. qformer_input_ids, qformer_attention_mask [B, S]; input_ids,
        attention_mask [B, N]: where the ids hold the image token, once for each query, the queries stand there, else
        before all. decoding: as for answer.
        """
        self._check_decoding(**decoding)
        pixels, valid, grid = self._given_frames(pixel_values, frame_mask)
        batch, length = valid.shape
        given = (input_ids, attention_mask), (qformer_input_ids, qformer_attention_mask)
        memory = self._begin(*self._prompts.given(*given, batch))
        with self._on_mesh():
            for start in range(0, length, WINDOW):
                window, real = pixels[:, start : start + WINDOW], valid[:, start : start + WINDOW]
                short = min(WINDOW, length) - window.shape[1]  # few lengths are compiled
                window = np.pad(window, ((0, 0), (0, short)) + ((0, 0),) * 3)
                real = np.pad(real, ((0, 0), (0, short)))
                unknown = np.full(real.shape, np.nan, np.float32)  # the processors give no times
                memory = self._take_in(memory, steps.encode_pixels(self.model, window), grid, unknown, real)
            memory = dataclasses.replace(memory, frames=memory.read)
            out, trace = self._decode(memory, keep_logits=True, **decoding)
        return self._output(out, trace)

    def _answer(self, memory: AdaCM2Memory, instructions: list[str] | None, **decoding) -> Answer:
        if instructions is not None:
            instruction, ids, places = self._prompts.asking(instructions)
            if instruction is not None and not np.array_equal(instruction, memory.instruction):
                raise InstructionError(
                    "This memory was watched with the question it began with in mind; begin() and watch again to ask "
                    "another."
                )
            memory = dataclasses.replace(memory, ids=ids, places=places)
        with self._on_mesh():
            out, trace = self._decode(memory, **decoding)
        return self._in_words(out.tokens, out.count, trace)

    def _decode(self, memory: AdaCM2Memory, **decoding):
        vectors = steps.project(self.model, memory.outputs)
        return self._write(memory.ids, memory.places, vectors, **decoding), self.trace(memory)

    def trace(self, memory: AdaCM2Memory) -> AdaCM2Trace:
        """What a memory holds."""
        cache, config = memory.cache, self.model.config
        token_bytes = 2 * config.qformer.width * cache.keys.dtype.itemsize
        tokens = int(memory.grid.prod()) + 1
        return AdaCM2Trace(
            frames=memory.frames,
            grid=tuple(memory.grid.tolist()),
            capacity=cache.capacity,
            cache_bytes=cache.keys.nbytes + cache.values.nbytes,
            cache_bytes_uncompressed=int(memory.read.sum()) * tokens * token_bytes * config.qformer.cross_layers,
            length=cache.length,
            source=cache.source,
            times=memory.times,
        )

    def _check_question(self, text: str, *, max_new_tokens: int = MAX_NEW_TOKENS, **_) -> None:
        _, ids, _ = self._prompts.asking([text])
        self._check_length(int((ids >= 0).sum()), max_new_tokens, "shorten the question")
