"""ReTaKe (arXiv 2412.20504): training-free key frames and KV-cache compression, on Qwen2-VL.

The decoder reads the video in chunks. A chunk's tokens attend to each other and to what was kept of all chunks before;
then each layer keeps the share of the chunk's keys and values that its own queries attend to most. Text is never
compressed.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from longvid_jax.convert.settings import Settings
from longvid_jax.data import chat
from longvid_jax.errors import InstructionError, OptionError, PromptError
from longvid_jax.generate import Generated
from longvid_jax.memory.state import RetakeMemory, Waiting, fork
from longvid_jax.models.qwen2_vl import Qwen2VL
from longvid_jax.systems import prompts
from longvid_jax.systems import retake_steps as steps
from longvid_jax.systems.results import Answer, Output, Trace
from longvid_jax.systems.retake_reader import Reader, pad_text
from longvid_jax.video import Frames, Video, preprocess, stream_batch


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


MAX_NEW_TOKENS = 128

# The plain model: the same chunks, nothing scored, nothing dropped, no position moved.
PLAIN = ReTaKe(keep_ratio=1.0, dpselect=None, reforge=False)


class RetakeModel:
    """A Qwen2-VL that answers questions about long videos; with method None it is the plain model."""

    def __init__(self, model: Qwen2VL, settings: Settings, *, method: ReTaKe | None = None, tokenizer=None, mesh=None):
        self.model, self.settings, self.tokenizer, self.method = model, settings, tokenizer, method
        choices = method or PLAIN
        static = steps.Static(method is not None, choices.dpselect, choices.pivots, choices.reforge)
        self._reader = Reader(model, choices, static, mesh)

    # --- watching -----------------------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Frames that one step reads; `watch` takes any number."""
        return self._reader.method.chunk_frames

    def frame_size(self, video: Video) -> tuple[int, int]:
        """Height and width at which the model sees a video (Qwen2-VL's resize rule, or the video's own long_side)."""
        vision = self.model.config.vision
        probe, factor = video.probe, vision.patch * vision.merge
        limits = {"min_pixels": self.settings.min_pixels, "max_pixels": self.settings.max_pixels}
        if video.long_side:
            return preprocess.long_side(probe.height, probe.width, video.long_side, factor=factor, **limits)
        return preprocess.smart_resize(probe.height, probe.width, factor=factor, **limits)

    def stream(self, video: Video | Sequence[Video]) -> Iterator[Frames]:
        """The video's frames in windows of the model's size, decoded ahead on a thread; a list makes a batch."""
        videos = [video] if isinstance(video, Video) else list(video)
        sizes = {self.frame_size(video) for video in videos}
        if len(sizes) > 1:
            raise OptionError(
                f"Videos of one batch must have one frame size, not {sorted(sizes)}; watch them one by one."
            )
        return stream_batch(videos, self.window, sizes.pop())

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
        instructions = [instruction] if isinstance(instruction, str) else list(instruction)
        before, behind = zip(*map(self._prompt, instructions), strict=True)
        grid = None if frame_size is None else self._grid(frame_size)
        if video is not None:
            videos = [video] if isinstance(video, Video) else list(video)
            if len(videos) != len(instructions):
                raise OptionError(f"{len(instructions)} questions for {len(videos)} videos: give one question a video.")
            expected_frames, grid = [len(video) for video in videos], self._grid(self.frame_size(videos[0]))
        expected = np.asarray(0 if expected_frames is None else expected_frames, np.int64)
        expected = np.broadcast_to(expected, len(instructions))
        if self._reader.method.budget is not None and not expected.all():
            raise OptionError("A budget needs the video's length; give begin() the video or expected_frames.")
        with self._reader.on_mesh():
            return self._reader.begin(before, behind, -(-expected // self.model.config.vision.temporal), grid)

    def watch(self, memory: RetakeMemory, frames: Frames) -> RetakeMemory:
        """Takes in a window of frames of any length; consumes the memory (keep a copy with lv.fork).

        Frames wait on the host until they fill a chunk, so how they are cut into windows changes nothing.
        """
        waiting = _join(memory.waiting, frames)
        ended = memory.frames < memory.frames.max()
        if (frames.valid & ended[:, None]).any() or (np.diff(waiting.valid.astype(int), axis=1) > 0).any():
            raise OptionError("A row of a batch has ended once it has a frame that is not valid; more came behind one.")
        memory = dataclasses.replace(memory, waiting=None, frames=memory.frames + frames.valid.sum(1))
        while waiting.valid.shape[1] >= self.window:
            memory = self._look(memory, jax.tree.map(lambda x: x[:, : self.window], waiting))
            waiting = jax.tree.map(lambda x: x[:, self.window :], waiting)
        return dataclasses.replace(memory, waiting=waiting if waiting.valid.shape[1] else None)

    def finish(self, memory: RetakeMemory) -> RetakeMemory:
        """The memory with nothing held back: the last frames, fewer than a window, are encoded and all is read.

        `answer` does this to a copy each time; done once before many questions it saves that. Consumes the memory.
        """
        if memory.waiting is not None:
            short = self.window - memory.waiting.valid.shape[1]
            window = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)), memory.waiting)
            memory = self._look(dataclasses.replace(memory, waiting=None), window)
        with self._reader.on_mesh():
            return self._reader.finish(memory)

    # --- answering ----------------------------------------------------------------------------------------------------

    def answer(
        self,
        memory: RetakeMemory,
        instruction: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Answer:
        """Answers from what was watched so far; the memory stays as it is, so watching may go on and more may be asked.

        Another `instruction` than begin's is an InstructionError where compression was guided by the prompt.
        """
        finished = self.finish(fork(memory))
        return self._answer(
            finished, instruction, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )

    def ask(
        self,
        video: Video | str | Sequence[Video | str],
        instruction: str | Sequence[str],
        *,
        profile: bool = False,
        progress=None,
        **decoding,
    ) -> Answer | list[Answer]:
        """Watches a video and answers; several questions about one video make a list of answers after one watching.

        A list of videos with a list of questions makes a batch. profile=True measures the seconds of each stage (and
        makes them wait for each other); progress(frames) is called after each window; decoding options as for `answer`.
        """
        batched = (
            not isinstance(video, Video | str) and not hasattr(video, "__fspath__") and isinstance(video, Sequence)
        )
        videos = [each if isinstance(each, Video) else Video(each) for each in (video if batched else [video])]
        questions = [instruction] if isinstance(instruction, str) else list(instruction)
        if not questions or (batched and len(questions) != len(videos)):
            raise PromptError(f"{len(questions)} questions for {len(videos)} videos: give one question a video.")
        _check_decoding(**decoding)  # what is wrong with a question is found before hours of video are watched
        for each in questions:
            self._reader.check_length(*map(len, self._prompt(each)), decoding.get("max_new_tokens", MAX_NEW_TOKENS))
        if self._reader.method.prompt_guided and len(questions) > 1 and not batched:
            return [self.ask(video, each, profile=profile, progress=progress, **decoding) for each in questions]
        seconds = {} if profile else None
        with _timed(seconds, "begin") as done:
            memory = done(self.begin(questions if batched else questions[0], video=videos))
        with _timed(seconds, "watch") as done, contextlib.closing(self.stream(videos)) as windows:
            for frames in windows:
                memory = self.watch(memory, frames)
                if progress is not None:
                    progress(int(frames.valid.sum()))
            memory = done(self.finish(memory))
        answers = []
        for each in [questions] if batched else questions:
            with _timed(seconds, "answer") as done:
                answers.append(done(self._answer(fork(memory), each, **decoding)))
        answers = [dataclasses.replace(a, trace=dataclasses.replace(a.trace, seconds=seconds)) for a in answers]
        return answers[0] if batched or isinstance(instruction, str) else answers

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
        with reader.on_mesh():
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
        with self._reader.on_mesh():
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

    def _answer(self, memory: RetakeMemory, instruction: str | Sequence[str] | None, **decoding) -> Answer:
        """Answers from a finished memory, which is consumed."""
        if not memory.frames.all():
            raise PromptError("Nothing was watched yet; give watch() frames before answer().")
        text = memory.prompt
        if instruction is not None:
            instructions = [instruction] if isinstance(instruction, str) else list(instruction)
            if len(instructions) != len(memory.start):
                raise PromptError(
                    f"{len(instructions)} questions for a memory of {len(memory.start)} videos: give one a video."
                )
            text = pad_text([self._prompt(each)[1] for each in instructions])
            if self._reader.method.prompt_guided and not np.array_equal(text, memory.prompt):
                raise InstructionError(
                    "This memory was compressed for the question it began with (prompt_guided=True); begin() and watch "
                    "again to ask another, or use prompt_guided=False."
                )
        with self._reader.on_mesh():
            out, trace = self._decode(memory, text, **decoding)
        tokens, count = np.asarray(out.tokens), np.asarray(out.count)
        texts = [
            self.tokenizer.decode(row[:n], skip_special_tokens=True).strip()
            for row, n in zip(tokens, count, strict=True)
        ]
        return Answer(texts[0] if len(texts) == 1 else texts, tokens[:, : count.max()], trace)

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
        _check_decoding(max_new_tokens, temperature, top_p)
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


def _check_decoding(
    max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> None:
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens}, but must be at least 1.")
    if not temperature >= 0:
        raise OptionError(f"temperature is {temperature}, but must be 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise OptionError(f"top_p is {top_p}, but must be above 0 and at most 1.")


def _join(waiting: Waiting | None, frames: Frames) -> Waiting:
    """Waiting frames with new ones behind them; columns that no row uses are left out."""
    used = frames.valid.any(0)
    new = Waiting(*(np.asarray(x)[:, used] for x in (frames.pixels, frames.times, frames.valid)))
    if waiting is None:
        return new
    if waiting.pixels.shape[2:] != new.pixels.shape[2:]:
        raise OptionError("Frames of one memory must have one size; take them all from model.stream(video).")
    return jax.tree.map(lambda old, new: np.concatenate([old, new], axis=1), waiting, new)


@contextlib.contextmanager
def _timed(seconds: dict[str, float] | None, stage: str):
    """Adds the time of a stage to `seconds`, waiting for what the body hands over; nothing where seconds is None."""
    results, start = [], time.perf_counter()

    def done(result):
        results.append(result)
        return result

    yield done
    if seconds is not None:
        jax.block_until_ready(results)
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
