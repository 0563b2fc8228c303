"""ReWind (arXiv 2411.15556): a video is perceived and written into a memory, clip by clip, with the question in mind.

Then a few of its frames are looked at again in detail. What was written and those frames are what the decoder reads.
"""

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import numpy as np

from longvid_jax.convert.settings import Settings
from longvid_jax.data import chat
from longvid_jax.errors import InstructionError, OptionError, PromptError, VideoWarning
from longvid_jax.memory import rewind
from longvid_jax.memory.frame_selection import Selection
from longvid_jax.memory.state import RewindMemory, Waiting
from longvid_jax.models.rewind import Rewind
from longvid_jax.systems import rewind_steps as steps
from longvid_jax.systems.base import MAX_NEW_TOKENS, as_list
from longvid_jax.systems.prompted import PromptedModel
from longvid_jax.systems.query_prompts import given_rows, padded, with_vectors
from longvid_jax.systems.results import Answer, Output, RewindTrace
from longvid_jax.video import Video, preprocess

WINDOW = 16  # frames that a step takes in, or a clip if that is longer
THUMBNAIL = 64  # pixels of the longer side, at most
DETAILS = ("buffer", "redecode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReWind:
    """Run-time choices of ReWind.

    clip_frames: frames that are perceived together. num_candidates: frames most relevant to the question, of which
    num_selected are looked at in detail, density peaks with num_neighbors. detail: "buffer" keeps each frame's detail
    tokens while watching, with offload=True on the host; "redecode" keeps none, and decodes the selected frames again.
    """

    clip_frames: int = 8
    num_candidates: int = 64
    num_selected: int = 8
    num_neighbors: int = 5
    detail: str = "buffer"
    offload: bool = False

    def __post_init__(self):
        for name in ("clip_frames", "num_candidates", "num_selected", "num_neighbors"):
            if (value := getattr(self, name)) < 1:
                raise OptionError(f"{name} is {value}, but must be at least 1.")
        if self.num_selected > self.num_candidates:
            raise OptionError(
                f"num_selected is {self.num_selected}, but must be at most the {self.num_candidates} candidates."
            )
        if self.detail not in DETAILS:
            raise OptionError(f"detail is {self.detail!r}, but must be {' or '.join(DETAILS)}.")


class RewindModel(PromptedModel):
    """A ReWind that watches videos; with method None as the paper has it."""

    def __init__(
        self,
        model: Rewind,
        settings: Settings,
        *,
        method: ReWind | None = None,
        tokenizer=None,
        words=None,
        mesh=None,
    ):
        """words: the BERT's tokenizer."""
        super().__init__(model, settings, method=method, tokenizer=tokenizer, mesh=mesh)
        self.words, self.choices = words, method or ReWind()

    # --- watching -----------------------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Frames that one step takes in: whole clips. `watch` takes any number."""
        frames = self.choices.clip_frames
        return frames * max(1, WINDOW // frames)

    @property
    def asks_once(self) -> bool:
        """What is perceived depends on the question."""
        return True

    def _about(self, questions: list[str]) -> RewindMemory:
        return self._begin(self._told(questions), *self._prompts(questions))

    def _begin(self, instruction: np.ndarray, ids: np.ndarray, places: np.ndarray) -> RewindMemory:
        return RewindMemory(
            written=None,
            details=None,
            waiting=None,
            instruction=instruction,
            ids=ids,
            places=places,
            grid=np.zeros(2, int),
            frames=np.zeros(len(ids), int),
            read=np.zeros(len(ids), int),
            times=np.zeros((1, 0), np.float32),
            thumbnails=np.zeros((1, 0, 1, 1, 3), np.uint8),
        )

    def _told(self, questions: Sequence[str]) -> np.ndarray:
        """Questions in BERT's tokens int32 [B, S]; one that is too long loses its end."""
        if self.words is None:
            raise PromptError(
                "The checkpoint has no tokenizer for its BERT; put its files in qformer_tokenizer/ beside config.json, "
                "or call generate() with bert_input_ids."
            )
        return self._short([self.words(text)["input_ids"] for text in questions])

    def _short(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        limit = self.model.config.bert.max_length
        if (longest := max(map(len, rows))) > limit:
            warnings.warn(
                f"The question has {longest} tokens, but the BERT reads {limit}; what is watched for knows no more.",
                VideoWarning,
                stacklevel=4,
            )
        return padded([[*row[: limit - 1], row[-1]] if len(row) > limit else row for row in rows], limit)

    def _prompts(self, questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The decoder's prompts, the video a single place in them: ids and places int32 [B, N]."""
        rows = [chat.queries_prompt(self.tokenizer, text, self.settings.video_token, 1) for text in questions]
        ids, places = zip(*rows, strict=True)
        return padded(ids), padded(places)

    def _look(self, memory: RewindMemory, window: Waiting) -> RewindMemory:
        grid = self._grid(window.pixels, memory.grid)
        with self._on_mesh():
            encoded = steps.encode_frames(
                self.model,
                preprocess.fill_invalid(window.pixels, window.valid),
                mean=self.settings.mean,
                std=self.settings.std,
            )
            return self._take_in(memory, *encoded, grid, window.pixels, window.times, window.valid)

    def _take_in(self, memory: RewindMemory, features, fresh, grid, pixels, times, valid) -> RewindMemory:
        """Takes in frames of features [B or 1, T, P, W]; the valid ones of [B or 1, T] are a prefix of each row."""
        batch, rows, start = len(memory.read), features.shape[0], int(memory.read.max())
        valid = np.broadcast_to(valid, (batch, valid.shape[1]))
        read = memory.read + valid.sum(1)
        if not start:
            self._warn_of_grid(grid, stacklevel=4)
        written, details = self._with_room(memory, rows, start + valid.shape[1], fresh)
        offloaded = isinstance(details, np.ndarray)
        if offloaded:
            details[:, start : start + valid.shape[1]] = np.asarray(fresh)
        written, kept = steps.watch_window(
            self.model,
            written,
            None if offloaded else details,
            features,
            fresh,
            np.int32(start),
            valid,
            memory.instruction,
            clip_frames=self.choices.clip_frames,
        )
        used = int(valid.sum(1).max())
        every = max(1, -(-max(pixels.shape[2:4]) // THUMBNAIL))
        small = pixels[:, :used, ::every, ::every]
        seen = np.where(valid[: len(times)], times, np.nan).astype(np.float32)[:, :used]
        first = not memory.times.size
        return dataclasses.replace(
            memory,
            written=written,
            details=details if offloaded else kept,
            grid=grid,
            read=read,
            times=seen if first else np.concatenate([memory.times, seen], axis=1),
            thumbnails=small if first else np.concatenate([memory.thumbnails, small], axis=1),
        )

    def _with_room(self, memory: RewindMemory, rows: int, frames: int, fresh: jax.Array):
        """What is written and the detail tokens of so many rows, with room for a number of frames in all."""
        written, details, capacity = memory.written, memory.details, rewind.room(frames)
        if written is None:
            written = steps.new_memory(self.model, batch=len(memory.read), capacity=capacity)
            if self.choices.detail == "buffer" and self.choices.offload:
                details = np.zeros((rows, capacity, *fresh.shape[2:]), fresh.dtype)
            elif self.choices.detail == "buffer":
                details = steps.new_details(self.model, rows=rows, capacity=capacity)
        elif written.capacity < capacity and isinstance(details, np.ndarray):
            details = np.pad(details, [(0, 0), (0, capacity - written.capacity), (0, 0), (0, 0)])
            written, _ = steps.grow(written, None, capacity=capacity)
        elif written.capacity < capacity:
            written, details = steps.grow(written, details, capacity=capacity)
        return written, details

    # --- answering ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        pixel_values,
        bert_input_ids=None,
        bert_attention_mask=None,
        input_ids=None,
        attention_mask=None,
        frame_mask=None,
        **decoding,
    ) -> Output:
        """Continues prompts of token ids behind frames.

        pixel_values float [B, T, 3, H, W] (or [B, 3, H, W]: one frame), normalised; frame_mask bool [B, T]: which
        frames are real, a prefix of each row. bert_input_ids, bert_attention_mask [B, S]: the question in the BERT's
        tokens; input_ids, attention_mask [B, N]: where the ids hold the video token, once, the video stands there,
        else before all. decoding: as for answer.
        """
        self._check_decoding(**decoding)
        pixels, valid, grid = self._given_frames(pixel_values, frame_mask)
        batch, length = valid.shape
        words = given_rows("bert_input_ids", bert_input_ids, "bert_attention_mask", bert_attention_mask, batch)
        prompts = given_rows("input_ids", input_ids, "attention_mask", attention_mask, batch)
        ids, places = with_vectors(prompts, self.settings.video_token, 1)
        memory = self._begin(self._short([row.tolist() for row in words]), ids, places)
        mean, std = np.array(self.settings.mean, np.float32), np.array(self.settings.std, np.float32)
        with self._on_mesh():
            for start in range(0, length, self.window):
                window, real = (x[:, start : start + self.window] for x in (pixels, valid))
                short = self.window - window.shape[1]
                window = np.pad(window, ((0, 0), (0, short)) + ((0, 0),) * 3)
                real = np.pad(real, ((0, 0), (0, short)))
                unknown = np.full(real.shape, np.nan, np.float32)  # no times are given
                shown = np.clip((window * std + mean) * 255, 0, 255).astype(np.uint8)
                memory = self._take_in(memory, *steps.encode_pixels(self.model, window), grid, shown, unknown, real)
            out, trace = self._decode(dataclasses.replace(memory, frames=memory.read), keep_logits=True, **decoding)
        return self._output(out, trace)

    def _answer(self, memory: RewindMemory, instructions: list[str] | None, **decoding) -> Answer:
        if instructions is not None:
            if not np.array_equal(self._told(instructions), memory.instruction):
                raise InstructionError(
                    "This memory was watched with the question it began with in mind; begin() and watch again to ask "
                    "another."
                )
            ids, places = self._prompts(instructions)
            memory = dataclasses.replace(memory, ids=ids, places=places)
        with self._on_mesh():
            out, trace = self._decode(memory, **decoding)
        return self._in_words(out.tokens, out.count, trace)

    def _decode(self, memory: RewindMemory, *, video: Video | Sequence[Video] | None = None, **decoding):
        scores, selection = self._look_back(memory)
        indices, valid = (np.asarray(x) for x in selection.selected)
        vectors = steps.tell(self.model, memory.written, self._details(memory, indices, valid, video))
        ids, places = self._placed(memory, memory.read, valid.sum(1))
        longest = int((ids >= 0).sum(1).max())
        new = decoding.get("max_new_tokens", MAX_NEW_TOKENS)
        self._check_length(longest, new, "watch fewer frames a second")
        written = memory.written
        trace = RewindTrace(
            frames=memory.frames,
            grid=tuple(memory.grid.tolist()),
            tokens=written.tokens.shape[2],
            capacity=written.capacity,
            cache_bytes=sum(x.nbytes for x in (written.tokens, written.keys, written.values)),
            detail_bytes=0 if memory.details is None else memory.details.nbytes,
            scores=scores,
            selection=selection,
            times=memory.times,
            thumbnails=memory.thumbnails,
        )
        return self._write(ids, places, vectors, **decoding), trace

    def _look_back(self, memory: RewindMemory) -> tuple[jax.Array, Selection]:
        """Each frame's relevance [B, R], and the frames to look at in detail."""
        choices = self.choices
        return steps.look_back(
            self.model,
            memory.written,
            memory.instruction,
            num_candidates=choices.num_candidates,
            num_select=choices.num_selected,
            num_neighbors=choices.num_neighbors,
        )

    def _details(self, memory: RewindMemory, indices: np.ndarray, valid: np.ndarray, video) -> jax.Array:
        """Detail tokens [B, K, m, W] of frames int [B, K]."""
        if isinstance(memory.details, np.ndarray):
            rows = np.arange(len(indices))[:, None] if len(memory.details) == len(indices) else 0
            return memory.details[rows, indices]
        if memory.details is not None:
            return steps.gather(memory.details, indices)
        if video is None:
            raise OptionError("detail is 'redecode', so answer() needs the video again; give video=.")
        videos = as_list(video, Video)
        size = tuple(side * self.model.config.vision.patch for side in memory.grid)
        pixels = np.zeros((*indices.shape, *size, 3), np.uint8)
        for row, real in enumerate(valid):
            at = memory.times[row % len(memory.times), indices[row, real]]
            pixels[row, real] = videos[row % len(videos)].read(at, size)
        _, details = steps.encode_frames(self.model, pixels, mean=self.settings.mean, std=self.settings.std)
        return details

    def _placed(self, memory: RewindMemory, written: np.ndarray, selected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prompts with what is told of the video in its place: ids and places int32 [B, N], places in `tell`'s.

        written, selected int [B]: of how many frames of the memory, and of how many in detail.
        """
        capacity, each = memory.written.tokens.shape[1:3]
        separator, detail = capacity * each, self.model.config.detail_tokens
        rows = []
        for ids, places, frames, count in zip(memory.ids, memory.places, written, selected, strict=True):
            at, end = int(np.argmax(places == 0)), int((ids >= 0).sum())
            vectors = [*range(each * frames), *range(separator, separator + 1 + detail * count)]
            words = [-1] * at, [-1] * (end - at - 1)
            row = [*ids[:at], *[0] * len(vectors), *ids[at + 1 : end]]
            rows.append((row, [*words[0], *vectors, *words[1]]))
        ids, places = zip(*rows, strict=True)
        return padded(ids), padded(places)

    def _check_question(self, text: str, *, max_new_tokens: int = MAX_NEW_TOKENS, **_) -> None:
        ids, _ = self._prompts([text])
        detail = self.choices.num_selected * self.model.config.detail_tokens
        self._check_length(int((ids >= 0).sum()) + detail, max_new_tokens, "shorten the question")

    def _check_decoding(self, *, video: Video | Sequence[Video] | None = None, **decoding) -> None:
        super()._check_decoding(**decoding)

    def _asking_about(self, videos: list[Video]) -> dict:
        return {"video": videos} if self.choices.detail == "redecode" else {}
