"""Prompts for a decoder that reads queries in place of a video, and instructions for the Q-Former behind them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from longvid_jax.data import chat
from longvid_jax.errors import PromptError
from longvid_jax.models.instructblip import InstructBlipConfig

TEXT_BUCKET = 16  # prompts are padded to this many tokens times a power of two, so that few lengths are compiled

# The Q-Former's instructions int32 [B, S] (None: it takes none), and the decoder's prompts: token ids int32 [B, N], 0
# where a query stands, and which query it is (-1: none). Behind a row's end all are -1.
Prompts = tuple[np.ndarray | None, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class QueryPrompts:
    """Makes prompts for a model; tokenizer and words, the Q-Former's, are None where the checkpoint has none."""

    config: InstructBlipConfig
    video_token: int | None
    tokenizer: Any
    words: Any

    def asking(self, questions: Sequence[str]) -> Prompts:
        """Of questions in words; PromptError for what cannot be put to the model."""
        told = None
        if self.config.qformer.words:
            told = self._instruction([self._told(text) for text in questions])
        count = self.config.num_queries
        rows = [chat.queries_prompt(self.tokenizer, text, self.video_token, count) for text in questions]
        ids, places = zip(*rows, strict=True)
        return told, padded(ids), padded(places)

    def given(self, prompts: tuple, instructions: tuple, batch: int) -> Prompts:
        """Of ids and mask as the Hugging Face processors make them, [B, N] and [B, S]; see AdaCM2Model.generate."""
        rows = given_rows("input_ids", prompts[0], "attention_mask", prompts[1], batch)
        told = None
        if self.config.qformer.words:
            words = given_rows("qformer_input_ids", instructions[0], "qformer_attention_mask", instructions[1], batch)
            told = self._instruction([row.tolist() for row in words])
        return told, *with_vectors(rows, self.video_token, self.config.num_queries)

    def _told(self, text: str) -> list[int]:
        if self.words is None:
            raise PromptError(
                "The checkpoint has no tokenizer for its Q-Former; put its files in qformer_tokenizer/ beside "
                "config.json, or call generate() with qformer_input_ids."
            )
        return self.words(text)["input_ids"]

    def _instruction(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Instructions as the Q-Former's tokens [B, S], which are not too long for it."""
        limit = self.config.qformer.max_length
        if (longest := max(map(len, rows))) > limit:
            raise PromptError(f"The question has {longest} tokens, but the Q-Former reads {limit}; shorten it.")
        return padded(rows, limit)


def with_vectors(prompts: Sequence[np.ndarray], token: int | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts int [N] with `count` tokens where vectors go, or without, and then before all: ids and places [B, N]."""
    rows, places = [], []
    for row in prompts:
        here = row == token if token is not None else np.zeros(row.shape, bool)
        if not here.any():
            row, here = np.concatenate([np.zeros(count, int), row]), np.arange(count + len(row)) < count
        if here.sum() != count:
            raise PromptError(f"input_ids holds the image token {here.sum()} times, but there are {count} queries.")
        rows.append(np.where(here, 0, row).tolist())
        places.append(np.where(here, np.cumsum(here) - 1, -1).tolist())
    return padded(rows), padded(places)


def given_rows(name: str, ids, mask_name: str, mask, batch: int) -> list[np.ndarray]:
    """The tokens int [N] of each row of ids [B, N] that mask [B, N] (None: all) leaves."""
    ids = np.zeros(0) if ids is None else np.asarray(ids)
    if ids.ndim != 2 or len(ids) != batch:
        raise PromptError(f"{name} must hold a row for each of the {batch} videos of pixel_values.")
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != ids.shape:
        raise PromptError(f"{mask_name} has the shape {list(mask.shape)}, but {name} {list(ids.shape)}.")
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]


def padded(rows: Sequence[Sequence[int]], limit: int | None = None) -> np.ndarray:
    """int32 [B, N] of rows of different lengths, -1 behind their end, N one of few lengths up to a limit."""
    longest = max(1, *map(len, rows))
    length = TEXT_BUCKET * (1 << (-(-longest // TEXT_BUCKET) - 1).bit_length())
    padded = np.full((len(rows), length if limit is None else min(length, limit)), -1, np.int32)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
