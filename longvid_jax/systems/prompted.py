"""Models whose decoder reads a prompt in which vectors stand for the video, and then writes or searches an answer."""

import abc
import math
import warnings
from collections.abc import Sequence

import jax
import numpy as np

from longvid_jax.errors import OptionError, PromptError, VideoWarning
from longvid_jax.generate import Beams, Generated
from longvid_jax.systems import text_steps
from longvid_jax.systems.base import MAX_NEW_TOKENS, Memory, VideoModel, as_list
from longvid_jax.systems.results import Output
from longvid_jax.video import Video


class PromptedModel(VideoModel):
    """What such systems have in common: `model.text` is the decoder, and `model.config.vision` an EVA tower's."""

    @property
    def asks_together(self) -> bool:
        """Several questions about one video are rows that watch the same frames."""
        return True

    def begin(
        self,
        instruction: str | Sequence[str],
        *,
        video: Video | Sequence[Video] | None = None,
        expected_frames: int | Sequence[int] | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> Memory:
        """An empty memory for watching with this question in mind; lists make a batch.

        Several questions about one video are rows that may watch the same frames (a Frames of one row). The length of
        the video is not needed.
        """
        questions = as_list(instruction, str)
        count = 1 if video is None else len(as_list(video, Video))
        if count not in (1, len(questions)):
            raise OptionError(f"{len(questions)} questions for {count} videos: give one question a video.")
        return self._about(questions)

    @abc.abstractmethod
    def _about(self, questions: list[str]) -> Memory:
        """An empty memory with a row a question."""

    def _write(
        self,
        ids: np.ndarray,
        places: np.ndarray,
        vectors: jax.Array,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        min_new_tokens: int = 0,
        keep_logits: bool = False,
    ) -> Generated | Beams:
        """What the decoder says behind prompts ids, places [B, N] (see query_prompts) with vectors [B, Q, width]."""
        decoder, stop = self.model.text, np.array(self.settings.stop_tokens or (-1,), np.int32)
        length = (ids >= 0).sum(1)
        searched = num_beams > 1 or min_new_tokens > 0
        room = ids.shape[1] + (0 if searched else max_new_tokens)
        cache = text_steps.new_cache(decoder, batch=len(ids), capacity=room)
        cache, logits = text_steps.read_prompt(decoder, cache, ids, places, vectors)
        if searched:
            return text_steps.search_answer(
                decoder,
                cache,
                logits,
                length,
                stop,
                np.int32(min_new_tokens),
                np.float32(length_penalty),
                beams=num_beams,
                max_new_tokens=max_new_tokens,
            )
        return text_steps.write_answer(
            decoder,
            cache,
            logits,
            length,
            stop,
            jax.random.key(seed),
            np.float32(temperature) if temperature > 0 else None,
            np.float32(top_p),
            max_new_tokens=max_new_tokens,
            keep_logits=keep_logits,
        )

    def _output(self, out: Generated | Beams, trace) -> Output:
        """What `generate` gives of it."""
        count = int(np.asarray(out.count).max())
        logits = getattr(out, "logits", None)
        return Output(np.asarray(out.tokens)[:, :count], None if logits is None else logits[:, :count], trace)

    def _given_frames(self, pixel_values, frame_mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels [B, T, H, W, 3], valid bool [B, T] and grid int [2] of what `generate` was given."""
        pixels = np.asarray(pixel_values)
        pixels = pixels[:, None] if pixels.ndim == 4 else pixels
        if pixels.ndim != 5 or pixels.shape[2] != 3 or not pixels.size:
            raise PromptError(f"pixel_values has the shape {list(pixels.shape)}, but must be [batch, frames, 3, H, W].")
        batch, length = pixels.shape[:2]
        valid = np.ones((batch, length), bool) if frame_mask is None else np.asarray(frame_mask, bool)
        if valid.shape != (batch, length) or not valid[:, 0].all() or (np.diff(valid.astype(int), axis=1) > 0).any():
            raise PromptError(
                f"frame_mask must be [{batch}, {length}], true for a frame or more of each row and false behind them."
            )
        patch = self.model.config.vision.patch
        grid = np.array(pixels.shape[3:]) // patch
        if (grid * patch != pixels.shape[3:]).any():
            raise OptionError(f"Frames of {pixels.shape[4]}x{pixels.shape[3]} must be multiples of {patch} pixels.")
        return np.moveaxis(pixels, 2, -1), valid, grid

    def _grid(self, pixels: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Rows and columns of patches in frames [B, T, H, W, 3], which are those of a memory unless 0."""
        patch = self.model.config.vision.patch
        height, width = pixels.shape[2:4]
        grid = np.array([height // patch, width // patch])
        if (grid * patch != (height, width)).any() or (known.any() and (grid != known).any()):
            raise OptionError(
                f"Frames of {width}x{height} do not fit this memory; take them from model.stream(video), or give "
                f"multiples of {patch} pixels."
            )
        return grid

    def frame_size(self, video) -> tuple[int, int]:
        """Height and width at which the model sees a video: its own square, or the video's long_side in patches."""
        patch = self.model.config.vision.patch
        if video.long_side:
            probe = video.probe
            scale = video.long_side / max(probe.height, probe.width)
            return tuple(max(1, round(side * scale / patch)) * patch for side in (probe.height, probe.width))
        return self.settings.size or (self.model.config.vision.image_size,) * 2

    def _warn_of_grid(self, grid: Sequence[int], stacklevel: int) -> None:
        """Warns of frames of another size than the vision tower has positions for."""
        side = self.model.config.vision.side
        if tuple(grid) != (side, side):
            warnings.warn(
                f"Frames of {grid[0]} x {grid[1]} patches: the model's positions are for {side} x {side}, and are "
                "interpolated.",
                VideoWarning,
                stacklevel=stacklevel + 1,
            )

    def _check_length(self, length: int, max_new_tokens: int, what: str) -> None:
        limit = self.model.config.text.rope.original_length
        if length + max_new_tokens > limit:
            raise PromptError(
                f"The prompt is too long: {length} tokens and {max_new_tokens} new ones exceed the model's {limit} "
                f"positions; {what}."
            )

    def _check_decoding(
        self, *, num_beams: int = 1, length_penalty: float = 1.0, min_new_tokens: int = 0, **decoding
    ) -> None:
        super()._check_decoding(**decoding)
        if num_beams < 1:
            raise OptionError(f"num_beams is {num_beams}, but must be at least 1.")
        if not 0 <= min_new_tokens <= decoding.get("max_new_tokens", MAX_NEW_TOKENS):
            raise OptionError(f"min_new_tokens is {min_new_tokens}, but must be 0 to max_new_tokens.")
        if not math.isfinite(length_penalty):
            raise OptionError(f"length_penalty is {length_penalty}, but must be a number.")
        if (num_beams > 1 or min_new_tokens > 0) and decoding.get("temperature", 0.0) > 0:
            raise OptionError(
                "num_beams above 1 and min_new_tokens above 0 search for the likeliest answer; leave temperature at 0."
            )
