"""Questions about videos for models whose memory depends on the question: each is put to its video alone.

Letters: B videos of a batch, A questions asked about each, T frames, N tokens of the decoder, S of the Q-Former.
"""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from longvid_jax.data.batches import Batch, Example, Shards, bucket
from longvid_jax.data.packing import tokenize
from longvid_jax.errors import LongvidError, OptionError, PromptError, VideoError

ASKED, STEP = 4, 24  # the number of questions, and of their tokens, is rounded up to a multiple: few are compiled


def conversation(
    tokenizer, question: str, answer: str, video_token: int | None, count: int
) -> tuple[list[int], list[int], list[bool]]:
    """Token ids of a question and its answer behind `count` queries; which query stands where; what is the answer.

    As data.chat.queries_prompt has prompts; -1 where a word stands, and the answer ends with what ends answers.
    """
    if tokenizer.chat_template and video_token is not None:
        turns = tokenize(tokenizer, [(question, answer)], video_token)
        before, ids, is_answer = list(turns.before), list(turns.ids), list(turns.is_answer)
    else:
        if tokenizer.eos_token_id is None:
            raise PromptError(
                "The tokenizer has no token that ends answers; name its eos_token in tokenizer_config.json."
            )
        prompt = tokenizer(question)["input_ids"]
        said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        before, ids, is_answer = [], [*prompt, *said], [False] * len(prompt) + [True] * len(said)
    places = [*[-1] * len(before), *range(count), *[-1] * len(ids)]
    return [*before, *[0] * count, *ids], places, [False] * (len(before) + count) + is_answer


class InstructedBatches(Shards):
    """A grain source of batches without an end, as data.batches.Batches. Of several turns the first alone is asked.

    A batch has frames uint8 [B, T, H, W, 3]; number int32 [B, T], of each frame, and shown bool [B, T]; words int32
    [B, A, S], the Q-Former's question (-1: padding); tokens int32 [B, A, N] (-1: padding) and places int32 [B, A, N] as
    the decoder reads them; targets int32 and weights float32 [B, A, N]; groups int32 [B, A * N]: the number of the
    question, 1 and up, or -1, as evaluations want it.

    frames, text: buckets of T and N, ascending. queries: how many vectors stand for a video of T frames. reads: tokens
    of a question at most.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        tokenizer,
        words,
        video_token: int | None,
        batch_size: int,
        *,
        frames: Sequence[int],
        text: Sequence[int],
        queries: Callable[[int], int],
        reads: int,
        process: int = 0,
        processes: int = 1,
    ):
        super().__init__(examples, batch_size, process, processes)
        self.tokenizer, self.words, self.video_token = tokenizer, words, video_token
        self.frames, self.text, self.queries, self.reads = frames, text, queries, reads

    def __getitem__(self, b: int) -> Batch:
        examples = self.of(b)
        if len(sizes := {example.size for example in examples}) > 1:
            raise OptionError(f"the videos of a batch have the sizes {sorted(sizes)}; give sources of one size.")
        frames = bucket(self.frames, *max((e.num_frames, e.id) for e in examples), "frames")
        told = [self._told(example, self.queries(frames)) for example in examples]
        longest = max((len(ids), example.id) for example, rows in zip(examples, told, strict=True) for ids, *_ in rows)
        length = bucket(self.text, *longest, "tokens")
        asked = -(-max(map(len, told)) // ASKED) * ASKED if max(map(len, told)) > 1 else 1
        reads = self._reads(examples)
        rows, undecodable = [], {}
        for row in self.mine:
            arrays = self._row(examples[row], told[row], asked, length, reads)
            try:
                arrays |= shown(examples[row], frames)
            except VideoError as error:
                undecodable[examples[row].id] = str(error)
                arrays["weights"][:] = 0
                arrays |= blank(examples[row], frames)
            rows.append(arrays)
        return Batch(b, {name: np.stack([row[name] for row in rows]) for name in rows[0]}, tuple(examples), undecodable)

    def _told(self, example: Example, queries: int) -> list[tuple]:
        try:
            return [
                conversation(self.tokenizer, *turns[0], self.video_token, queries) for turns in example.conversations
            ]
        except LongvidError as error:
            raise type(error)(f"{example.id}: {error}") from error

    def _reads(self, examples: Sequence[Example]) -> int:
        """Tokens of the longest question of all processes, in steps of 24, cut where a Q-Former reads no more."""
        questions = [turns[0][0] for example in examples for turns in example.conversations]
        longest = max(map(len, self.words(questions)["input_ids"])) if self.words is not None else 1
        return min(self.reads, -(-longest // STEP) * STEP)

    def _row(self, example: Example, told: list[tuple], asked: int, length: int, reads: int) -> dict[str, np.ndarray]:
        arrays = {
            "words": np.full((asked, reads), -1, np.int32),
            "tokens": np.full((asked, length), -1, np.int32),
            "places": np.full((asked, length), -1, np.int32),
            "targets": np.zeros((asked, length), np.int32),
            "weights": np.zeros((asked, length), np.float32),
            "groups": np.full((asked, length), -1, np.int32),
        }
        for n, (ids, places, is_answer) in enumerate(told):
            here = slice(0, len(ids))
            arrays["tokens"][n, here], arrays["places"][n, here], arrays["groups"][n, here] = ids, places, n + 1
            arrays["targets"][n, : len(ids) - 1] = ids[1:]
            arrays["weights"][n, : len(ids) - 1] = is_answer[1:]
            if self.words is not None:
                read = self.words(example.conversations[n][0][0])["input_ids"][:reads]
                arrays["words"][n, : len(read)] = read
        return arrays | {"groups": arrays["groups"].reshape(-1)}


def shown(example: Example, frames: int) -> dict[str, np.ndarray]:
    """The frames of an example, up to so many, with their numbers, and which of them there are."""
    read = example.frames()[:frames]
    pixels = np.zeros((frames, *example.size, 3), np.uint8)
    pixels[: len(read)] = read
    number = example.offset + example.stride * np.arange(frames)
    return {"frames": pixels, "number": number.astype(np.int32), "shown": np.arange(frames) < len(read)}


def blank(example: Example, frames: int) -> dict[str, np.ndarray]:
    """The same where its video cannot be read."""
    shown = np.zeros(frames, bool)
    shown[0] = True  # attention over nothing is not defined
    return {
        "frames": np.zeros((frames, *example.size, 3), np.uint8),
        "number": np.zeros(frames, np.int32),
        "shown": shown,
    }
