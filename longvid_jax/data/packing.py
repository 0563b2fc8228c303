"""Conversations about a video as tokens, several of them packed behind one video.

They share what comes before their questions, the video above all, and do not see each other (groups in models.llama):
each gets the gradient that it would get alone, and the video is encoded once for all.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longvid_jax.data.chat import QWEN2_VL_TEMPLATE
from longvid_jax.errors import PromptError
from longvid_jax.ops.attention import SEGMENT, Packed


@dataclasses.dataclass(frozen=True)
class Turns:
    """A conversation as token ids, cut where the video goes."""

    before: tuple[int, ...]  # the text before the video
    ids: tuple[int, ...]  # the text behind it, answers included
    is_answer: tuple[bool, ...]  # which of `ids` the model is to say: the answers and what ends them


def tokenize(tokenizer, conversation: Sequence[tuple[str, str]], video_token: int | None) -> Turns:
    """A conversation of (question, answer) about one video, which goes before the first question; None: without one.

    The tokenizer's chat template says how it is written down; an answer is what the template adds when it is told the
    answer, up to the next question. Raises PromptError where the template does not put the video in once, or writes
    earlier turns otherwise once there are later ones.
    """
    if video_token is None and not tokenizer.chat_template:
        raise PromptError("The tokenizer has no chat template; put the model's chat_template.jinja beside its weights.")
    messages, text, spans = [], "", []
    for n, (question, answer) in enumerate(conversation):
        messages.append({"role": "user", "content": _content(question, video_token, video=n == 0)})
        asked = _write(tokenizer, messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": _content(answer, video_token)})
        answered = _write(tokenizer, messages)
        if not (asked.startswith(text) and answered.startswith(asked)):
            raise PromptError("The chat template rewrites earlier turns, so answers cannot be told apart; use another.")
        if question.strip() not in asked[len(text) :] or answer.strip() not in answered[len(asked) :]:
            raise PromptError("The chat template leaves out what is said; use one that is made for such messages.")
        spans.append((len(asked), len(asked) + len(answered[len(asked) :].rstrip())))
        text = answered
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    is_answer = [any(start <= a and b <= end for start, end in spans) for a, b in encoded["offset_mapping"]]
    if video_token is None:
        return Turns((), tuple(ids), tuple(is_answer))
    if ids.count(video_token) != 1:
        raise PromptError(
            f"The conversation holds the video token {video_token} {ids.count(video_token)} times instead of once; "
            "take special tokens out of its text, or mend the chat template."
        )
    at = ids.index(video_token)
    return Turns(tuple(ids[:at]), tuple(ids[at + 1 :]), tuple(is_answer[at + 1 :]))


def _content(text: str, video_token: int | None, video: bool = False):
    """What a message says: parts, as templates of models that see have it; a plain text for those that do not."""
    if video_token is None:
        return text
    return [{"type": "video"}] * video + [{"type": "text", "text": text}]


def _write(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages,
        chat_template=tokenizer.chat_template or QWEN2_VL_TEMPLATE,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )


def packed_length(turns: Sequence[Turns], video_tokens: int) -> int:
    """Tokens that `pack` needs for conversations about one video."""
    return len(turns[0].before) + video_tokens + sum(len(turn.ids) for turn in turns)


def sizes(rows: Sequence[Sequence[Turns]], video_tokens: int, length: int) -> Packed | None:
    """What a program may know of the rows of a batch, each packed into `length` tokens; None where it does not pay."""
    prefix = max(len(turns[0].before) for turns in rows) + video_tokens
    longest = max(len(turn.ids) for turns in rows for turn in turns)
    longest = -(-longest // SEGMENT) * SEGMENT  # few different programs
    return Packed(prefix, longest) if 3 * longest <= length - prefix else None


def pack(
    turns: Sequence[Turns],
    grid: tuple[int, int, int],
    length: int,
    *,
    video_token: int,
    times: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Conversations about one video of grid (temporal patches, rows and columns of tokens) in arrays of `length`.

    times int [T]: where each temporal patch stands, counted from the first video token; by default 0, 1, ...
    Gives tokens int32 [N]; positions int32 [N, 3] (M-RoPE: time, row, column; text behind the video goes on one after
    the largest); groups int32 [N]: 0 what all share, 1, 2, ... the conversations, -1 padding; video_index int32 [N]:
    which video token stands here, -1 for none; targets int32 [N], the next token, and weights float32 [N], 1 where that
    is part of an answer. Raises PromptError if it does not fit or the conversations begin differently.
    """
    if len({turn.before for turn in turns}) != 1:
        raise PromptError("Conversations about one video must have the same text before it to be packed together.")
    before, count = turns[0].before, int(np.prod(grid))
    if (needed := packed_length(turns, count)) > length:
        raise PromptError(f"The conversations take {needed} tokens, but the bucket has {length}; ask for a longer one.")
    start = len(before)
    where = np.stack(np.meshgrid(*(np.arange(size) for size in grid), indexing="ij"), axis=-1).reshape(-1, 3)
    if times is not None:
        where[:, 0] = np.asarray(times)[where[:, 0]]
    pieces = [
        (np.array(before), np.repeat(np.arange(start)[:, None], 3, axis=1), 0, None),
        (np.full(count, video_token), start + where, 0, None),
    ]
    behind = start + (int(where.max()) + 1 if count else 0)
    for n, turn in enumerate(turns, 1):
        positions = np.repeat(behind + np.arange(len(turn.ids))[:, None], 3, axis=1)
        pieces.append((np.array(turn.ids), positions, n, turn.is_answer))
    arrays = {
        "tokens": np.zeros(length, np.int32),
        "positions": np.zeros((length, 3), np.int32),
        "groups": np.full(length, -1, np.int32),
        "video_index": np.full(length, -1, np.int32),
        "targets": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
    }
    arrays["video_index"][start : start + count] = np.arange(count)
    at = 0
    for ids, positions, group, is_answer in pieces:
        here = slice(at, at + len(ids))
        arrays["tokens"][here], arrays["positions"][here], arrays["groups"][here] = ids, positions, group
        if is_answer is not None:
            arrays["targets"][at : at + len(ids) - 1] = ids[1:]
            arrays["weights"][at : at + len(ids) - 1] = is_answer[1:]
        at += len(ids)
    return arrays
