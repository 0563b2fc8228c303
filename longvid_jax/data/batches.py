"""Batch b as a pure function of (seed, b): any process makes any batch at any time, and workers change no order."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from longvid_jax.data.augment import redrawn
from longvid_jax.data.packing import Turns, pack, packed_length, sizes, tokenize
from longvid_jax.errors import DataError, LongvidError, OptionError, VideoError


@dataclasses.dataclass(frozen=True)
class Example:
    """Conversations about one video, which is read when it is needed."""

    id: str
    conversations: tuple[tuple[tuple[str, str], ...], ...]  # each of (question, answer) turns
    num_frames: int  # at most that many
    size: tuple[int, int]  # (H, W) in pixels
    frames: Callable[[], np.ndarray]  # uint8 [num_frames or fewer, H, W, 3]; VideoError if nothing decodes
    tags: tuple[str, ...] = ()  # of each conversation: its family of questions, say
    offset: int = 0  # its temporal patches stand at offset + stride * 0, 1, ..., counted from the first video token
    stride: int = 1
    told: Callable[[], dict[str, np.ndarray]] | None = None  # what is known for each conversation; see data.telling


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a training step takes, and what the host knows of it.

    arrays: as data.packing.pack gives them with a leading axis of rows, frames uint8 [B, F, H, W, 3], only this
    process's rows; and packed, what data.packing.sizes gives, which holds no arrays.
    """

    index: int
    arrays: dict[str, np.ndarray]
    examples: tuple[Example, ...]  # of all processes
    undecodable: dict[str, str]  # of this process: example id -> why; they have weight 0


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The static shapes of batches. A batch has the smallest that all its examples fit in.

    frames: numbers of frames, ascending, each a multiple of `temporal`. text: tokens beside the video's, ascending.
    temporal frames and merged x merged pixels make a token.
    """

    frames: tuple[int, ...]
    text: tuple[int, ...]
    temporal: int
    merged: int

    def grid(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """Temporal patches, rows and columns of tokens of a video."""
        return -(-frames // self.temporal), size[0] // self.merged, size[1] // self.merged


class Shards:
    """Batches of examples, of which each process reads its share of the rows. Raises OptionError and DataError."""

    def __init__(self, examples: grain.MapDataset, batch_size: int, process: int, processes: int):
        if batch_size % processes:
            raise OptionError(f"batch_size is {batch_size}, but must be a multiple of the {processes} processes.")
        check_any(examples)
        self.examples, self.batch_size = examples, batch_size
        share = batch_size // processes
        self.mine = range(process * share, (process + 1) * share)  # rows of a batch

    def __len__(self) -> int:
        return len(self.examples) // self.batch_size

    def of(self, b: int) -> list[Example]:
        """The examples of all rows of batch b."""
        return [self.examples[row] for row in range(b * self.batch_size, (b + 1) * self.batch_size)]


class Batches(Shards):
    """A grain source of batches without an end.

    examples: a MapDataset of examples (shuffled, repeated, mixed as `endless` does it). Which examples and which shape
    a batch has comes from metadata alone and is the same on every process; frames are read for this process's rows.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        tokenizer,
        video_token: int,
        shapes: Shapes,
        batch_size: int,
        *,
        process: int = 0,
        processes: int = 1,
    ):
        super().__init__(examples, batch_size, process, processes)
        self.tokenizer, self.video_token, self.shapes = tokenizer, video_token, shapes

    def __getitem__(self, b: int) -> Batch:
        examples = self.of(b)
        turns = [tokenized(example, self.tokenizer, self.video_token) for example in examples]
        frames, text, size = self._shape(examples, turns)
        grid = self.shapes.grid(frames, size)
        packed, pixels, undecodable = [], np.zeros((len(self.mine), frames, *size, 3), np.uint8), {}
        for n, row in enumerate(self.mine):
            arrays = pack(
                turns[row],
                grid,
                text + int(np.prod(grid)),
                video_token=self.video_token,
                times=examples[row].offset + examples[row].stride * np.arange(grid[0]),
            )
            try:
                read = examples[row].frames()[:frames]
                pixels[n, : len(read)], pixels[n, len(read) :] = read, read[-1]
            except VideoError as error:
                undecodable[examples[row].id] = str(error)
                arrays["weights"][:] = 0
            packed.append(arrays)
        stacked = {name: np.stack([arrays[name] for arrays in packed]) for name in packed[0]}
        known = sizes(turns, int(np.prod(grid)), stacked["tokens"].shape[1])
        return Batch(b, {**stacked, "frames": pixels, "packed": known}, tuple(examples), undecodable)

    def _shape(self, examples: Sequence[Example], turns: Sequence[list[Turns]]) -> tuple[int, int, tuple[int, int]]:
        """Frames, tokens of text, and (H, W) of a batch."""
        sizes = {example.size for example in examples}
        if len(sizes) > 1:
            raise OptionError(f"the videos of a batch have the sizes {sorted(sizes)}; give sources of one size.")
        longest = max(zip([packed_length(t, 0) for t in turns], [example.id for example in examples], strict=True))
        most = max((example.num_frames, example.id) for example in examples)
        text = bucket(self.shapes.text, *longest, "tokens of text")
        return bucket(self.shapes.frames, *most, "frames"), text, sizes.pop()


def check_any(source) -> None:
    """Raises DataError for a source without examples."""
    if not len(source):
        raise DataError("the data set is empty; give one with examples.")


def endless(source, seed: int) -> grain.MapDataset:
    """The examples of a source (with __len__ and __getitem__), in another order in each epoch."""
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(redrawn)


def mixed(sources: Sequence, weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Examples of several sources in the proportion of the weights."""
    if len(sources) != len(weights) or not all(weight > 0 for weight in weights):
        raise OptionError(
            f"weights are {list(weights)}, but must be a positive number for each of {len(sources)} sources."
        )
    for source in sources:
        check_any(source)
    return grain.MapDataset.mix([endless(source, seed + n) for n, source in enumerate(sources)], list(weights))


def batches_from(batches: Batches, start: int, *, workers: int = 2, ahead: int = 4) -> Iterator[Batch]:
    """Batches start, start + 1, ..., made ahead by threads, always in this order."""
    dataset = grain.MapDataset.source(batches).slice(slice(start, None))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)))


def tokenized(example: Example, tokenizer, video_token: int | None) -> list[Turns]:
    """Each conversation of an example as tokens; PromptError names the example."""
    try:
        return [tokenize(tokenizer, turns, video_token) for turns in example.conversations]
    except LongvidError as error:
        raise type(error)(f"{example.id}: {error}") from error


def bucket(sizes: Sequence[int], needed: int, id: str, what: str) -> int:
    """The smallest size that is enough; OptionError if the example `id` needs more."""
    for size in sizes:
        if needed <= size:
            return size
    raise OptionError(f"{id} takes {needed} {what}, but the largest bucket has {sizes[-1]}; add a larger one.")
