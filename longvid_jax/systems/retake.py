"""ReTaKe (arXiv 2412.20504): training-free key frames and KV-cache compression, on Qwen2-VL.

The decoder reads the video in chunks. A chunk's tokens attend to each other and to what was kept of all chunks before;
then each layer keeps the share of the chunk's keys and values that its own queries attend to most. Text is never
compressed.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from longvid_jax.convert.settings import Settings
from longvid_jax.data import chat
from longvid_jax.errors import InstructionError, OptionError, PromptError
from longvid_jax.generate import Generated
from longvid_jax.memory.state import RetakeMemory, Waiting
from longvid_jax.models.qwen2_vl import Qwen2VL
from longvid_jax.systems import prompts
from longvid_jax.systems import retake_steps as steps
from longvid_jax.systems.base import MAX_NEW_TOKENS, VideoModel
from longvid_jax.systems.results import Answer, Output, Trace
from longvid_jax.systems.retake_reader import Reader, pad_text
from longvid_jax.video import Video, preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReTaKe:
    """Run-time choices of ReTaKe.

    keep_ratio: share of the video tokens that stays in the cache, in (0, 1]; or
    budget: tokens of text and video together that may stay (the authors' max_input_length; needs the video's length).
    chunk_frames: sampled frames the decoder reads at a time; two make a temporal patch.
    dpselect: "patch" marks pivots per patch position, "frame" per temporal patch, None marks none.
    dpselect_ratio: share of the temporal patches that DPSelect lets through; 1 only marks pivots.
    pivots: "mean" gives them the average score, as in the authors' code; "always" keeps them first, as in the paper.
    reforge: kept tokens move together in time (section 3.3). yarn_factor: YaRN for contexts beyond the trained length.
    prompt_guided: the question's tokens score, instead of the chunk's own; then a memory answers that question only.
    scores: "attention", or "random" to compare with: tokens are drawn (with `seed`, others in each row of a batch).
    """

    keep_ratio: float | None = None
    budget: int | None = None
    chunk_frames: int = 32
    dpselect: str | None = "patch"
    dpselect_ratio: float = 1.0
    pivots: str = "mean"
    reforge: bool = True
    yarn_factor: float | None = None
    prompt_guided: bool = False
    scores: str = "attention"
    seed: int = 0

    def __post_init__(self):
        if (self.keep_ratio is None) == (self.budget is None):
            raise OptionError(
                "ReTaKe takes exactly one of keep_ratio and budget; give keep_ratio=0.25, say, or budget=32000."
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise OptionError(f"keep_ratio is {self.keep_ratio}, but must be above 0 and at most 1.")
        if self.budget is not None and self.budget < 1:
            raise OptionError(f"budget is {self.budget}, but must be a positive number of tokens.")
        if self.chunk_frames < 2 or self.chunk_frames % 2:
            raise OptionError(
                f"chunk_frames is {self.chunk_frames}, but must be even: two frames make a temporal patch."
            )
        if self.dpselect not in (None, "frame", "patch"):
            raise OptionError(f"dpselect is {self.dpselect!r}, but must be 'frame', 'patch' or None.")
        if not 0 < self.dpselect_ratio <= 1:
            raise OptionError(f"dpselect_ratio is {self.dpselect_ratio}, but must be above 0 and at most 1.")
        if self.dpselect is None and self.dpselect_ratio < 1:
            raise OptionError("dpselect_ratio below 1 drops frames, which needs dpselect='frame' or 'patch'.")
        if self.pivots not in ("mean", "always"):
            raise OptionError(f"pivots is {self.pivots!r}, but must be 'mean' or 'always'.")
        if self.scores not in ("attention", "random"):
            raise OptionError(f"scores is {self.scores!r}, but must be 'attention' or 'random'.")
        if self.scores == "random" and (self.dpselect is not None or self.prompt_guided):
            raise OptionError("scores='random' looks at nothing; give dpselect=None and prompt_guided=False with it.")
        if self.yarn_factor is not None and self.yarn_factor < 1:
            raise OptionError(f"yarn_factor is {self.yarn_factor}, but must be at least 1.")


# The plain model: the same chunks, nothing scored, nothing dropped, no position moved.
PLAIN = ReTaKe(keep_ratio=1.0, dpselect=None, reforge=False)


class RetakeModel(VideoModel):
    """A Qwen2-VL that answers questions about long videos; with method None it is the plain model."""

    def __init__(self, model: Qwen2VL, settings: Settings, *, method: ReTaKe | None = None, tokenizer=None, mesh=None):
        super().__init__(model, settings, method=method, tokenizer=tokenizer, mesh=mesh)
        choices = method or PLAIN
        static = steps.Static(method is not None, choices.dpselect, choices.pivots, choices.reforge)
        self._reader = Reader(model, choices, static, mesh)

    @property
    def window(self) -> int:
        """Frames of a chunk; `watch` takes any number."""
        return self._reader.method.chunk_frames

    @property
    def asks_once(self) -> bool:
        """Whether the question guides compression, so that another question means watching again."""
        return self._reader.method.prompt_guided

    def frame_size(self, video: Video) -> tuple[int, int]:
        """Height and width at which the model sees a video (Qwen2-VL's resize rule, or the video's own long_side)."""
        vision = self.model.config.vision
        probe, factor = video.probe, vision.patch * vision.merge
        limits = {"min_pixels": self.settings.min_pixels, "max_pixels": self.settings.max_pixels}
        if video.long_side:
            return preprocess.long_side(probe.height, probe.width, video.long_side, factor=factor, **limits)
        return preprocess.smart_resize(probe.height, probe.width, factor=factor, **limits)

    def begin(
        self,
        instruction: str | Sequence[str],
        *,
        video: Video | Sequence[Video] | None = None,
        expected_frames: int | Sequence[int] | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> RetakeMemory:
        """An empty memory for watching with this question in mind; lists make a batch.

        The length of the video, from `video` or `expected_frames` (sampled frames) and frame_size (height and width of
        the frames that `watch` will get), sizes the cache; a budget needs the length.
        """
        instructions, expected, size = self._begin_with(instruction, video, expected_frames, frame_size)
        before, behind = zip(*map(self._prompt, instructions), strict=True)
        if self._reader.method.budget is not None and not expected.all():
            raise OptionError("A budget needs the video's length; give begin() the video or expected_frames.")
        patches, grid = -(-expected // self.model.config.vision.temporal), None if size is None else self._grid(size)
        with self._on_mesh():
            return self._reader.begin(before, behind, patches, grid)

    def generate(
        self,
        input_ids,
        attention_mask=None,
        pixel_values_videos=None,
        video_grid_thw=None,
        mm_token_type_ids=None,
        pixel_values=None,
        image_grid_thw=None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        return_cache: bool = False,
    ) -> Output:
        """Continues what the Hugging Face processors make: one video a row, or none in any row.

        input_ids, attention_mask, mm_token_type_ids int [B, S] (padded on either side); pixel_values_videos [patches
        of all rows, channels * temporal * patch^2]; video_grid_thw int [B, 3]. Images are a PromptError. With
        dpselect_ratio < 1 frames are dropped over the whole video, after all of it was encoded.
        """
        if pixel_values is not None or image_grid_thw is not None:
            raise PromptError("pixel_values holds images, but only videos can be watched; give pixel_values_videos.")
        merge = self.model.config.vision.merge
        rows = prompts.split(input_ids, attention_mask, mm_token_type_ids, video_grid_thw, self.settings, merge)
        patches, reader = np.array([row.patches for row in rows]), self._reader
        with self._on_mesh():
            memory = reader.begin([row.before for row in rows], [row.behind for row in rows], patches, rows[0].grid)
            if patches.any():
                memory = self._look_at_patches(
                    memory, prompts.windows(pixel_values_videos, rows, reader.length, self.model.config.vision)
                )
            out, trace = self._decode(
                reader.finish(memory),
                memory.prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                keep_logits=True,
            )
        count = int(out.count.max())
        cache = out.state if return_cache else None
        return Output(np.asarray(out.tokens)[:, :count], out.logits[:, :count], trace, cache)

    # --- what the public methods are made of --------------------------------------------------------------------------

    def _prompt(self, instruction: str) -> tuple[list[int], list[int]]:
        return chat.video_prompt(self.tokenizer, instruction, self.settings.video_token)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens in a temporal patch of frames of this (height, width)."""
        side = self.model.config.vision.patch * self.model.config.vision.merge
        return size[0] // side, size[1] // side

    def _look(self, memory: RetakeMemory, window: Waiting) -> RetakeMemory:
        """Encodes a whole window of frames, whose valid ones are a prefix in each row, and hands the features on."""
        vision, settings = self.model.config.vision, self.settings
        size = window.pixels.shape[2:4]
        grid = self._grid(size)
        if size != (grid[0] * vision.patch * vision.merge, grid[1] * vision.patch * vision.merge) or (
            memory.grid.any() and grid != tuple(memory.grid)
        ):
            raise OptionError(
                f"Frames of {size[1]}x{size[0]} do not fit this memory; take them from model.stream(video)."
            )
        with self._on_mesh():
            # A lone last frame makes a temporal patch with itself.
            features = steps.encode_frames(
                self.model,
                preprocess.fill_invalid(window.pixels, window.valid),
                grid=(grid[0] * vision.merge, grid[1] * vision.merge),
                mean=settings.mean,
                std=settings.std,
            )
            patches = -(-window.valid.sum(1) // vision.temporal)
            memory = dataclasses.replace(memory, grid=np.array(grid))
            return self._reader.look(memory, features, patches, window.times[:, :: vision.temporal])

    def _look_at_patches(self, memory: RetakeMemory, windows: Iterator[np.ndarray]) -> RetakeMemory:
        """The same for the processors' patches [B, T, P, X] of a video whose length is known."""
        reader, merge = self._reader, self.model.config.vision.merge
        unknown = np.full((len(memory.start), reader.length), np.nan, np.float32)  # the processors give no times
        grid, features = tuple((memory.grid * merge).tolist()), []
        for start, window in enumerate(windows):
            real = np.clip(memory.expected - start * reader.length, 0, reader.length)
            seen = steps.encode_patches(self.model, window, grid=grid)
            if reader.method.dpselect_ratio < 1:
                features.append(seen)
            else:
                memory = reader.look(memory, seen, real, unknown)
        if features:
            memory = reader.read_all(memory, features, memory.expected, np.repeat(unknown, len(features), axis=1))
        return dataclasses.replace(memory, frames=memory.expected * self.model.config.vision.temporal)

    def _flush(self, memory: RetakeMemory) -> RetakeMemory:
        with self._on_mesh():
            return self._reader.finish(memory)

    def _answer(self, memory: RetakeMemory, instructions: list[str] | None, **decoding) -> Answer:
        text = memory.prompt
        if instructions is not None:
            text = pad_text([self._prompt(each)[1] for each in instructions])
            if self.asks_once and not np.array_equal(text, memory.prompt):
                raise InstructionError(
                    "This memory was compressed for the question it began with (prompt_guided=True); begin() and watch "
                    "again to ask another, or use prompt_guided=False."
                )
        with self._on_mesh():
            out, trace = self._decode(memory, text, **decoding)
        return self._in_words(out.tokens, out.count, trace)

    def _check_question(self, text: str, *, max_new_tokens: int = MAX_NEW_TOKENS, **_) -> None:
        self._reader.check_length(*map(len, self._prompt(text)), max_new_tokens)

    def _decode(
        self,
        memory: RetakeMemory,
        text: np.ndarray,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        keep_logits: bool = False,
    ) -> tuple[Generated, Trace]:
        self._check_decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        out, length = self._reader.answer(
            memory,
            text,
            max_new_tokens=max_new_tokens,
            stop_tokens=np.array(self.settings.stop_tokens or (-1,), np.int32),
            key=jax.random.key(seed),
            temperature=np.float32(temperature) if temperature > 0 else None,
            top_p=np.float32(top_p),
            keep_logits=keep_logits,
        )
        cache = out.state
        token_bytes = sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values))) // cache.valid.size
        seen = (memory.read + memory.dropped) * int(memory.grid.prod())
        dropped = seen - (memory.stored - memory.start)
        return out, Trace(
            frames=memory.frames,
            tokens=seen,
            grid=tuple(memory.grid.tolist()),
            cache_length=length,
            cache_bytes=int(length.sum()) * token_bytes,
            cache_bytes_uncompressed=int((length + dropped).sum()) * token_bytes,
            cache_capacity=cache.capacity,
            chunks=memory.chunks,
            source=cache.source,
        )
