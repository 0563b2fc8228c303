"""What the Hugging Face processors make, cut into text before the video, video, and text behind it."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from longvid_jax.convert.settings import Settings
from longvid_jax.errors import PromptError
from longvid_jax.models.qwen2_vl import VisionConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch."""

    before: list[int]  # token ids
    behind: list[int]
    patches: int  # temporal patches of its video; 0 if it has none
    grid: tuple[int, int]  # rows and columns of tokens in a temporal patch

    @property
    def tokens(self) -> int:
        """Tokens of a temporal patch."""
        return self.grid[0] * self.grid[1]


def split(input_ids, attention_mask, mm_token_type_ids, video_grid_thw, settings: Settings, merge: int) -> list[Row]:
    """The rows of input_ids int [B, S]; video_grid_thw int [B, 3] counts patches, merge x merge of them to a token."""
    input_ids = np.asarray(input_ids)
    if input_ids.ndim != 2:
        raise PromptError(f"input_ids has the shape {list(input_ids.shape)}, but must be [batch, length].")
    mask = np.ones(input_ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if mask.shape != input_ids.shape:
        raise PromptError(
            f"attention_mask has the shape {list(mask.shape)}, but input_ids has {list(input_ids.shape)}."
        )
    is_video = (input_ids == settings.video_token) & mask
    if mm_token_type_ids is not None and not np.array_equal((np.asarray(mm_token_type_ids) == 2) & mask, is_video):
        raise PromptError(
            "mm_token_type_ids marks other tokens as video (type 2) than those with the video token's id."
        )
    if settings.image_token is not None and (input_ids == settings.image_token)[mask].any():
        raise PromptError(f"input_ids holds the image token {settings.image_token}, but only videos can be watched.")
    grids = np.zeros((len(input_ids), 3), int) if video_grid_thw is None else np.asarray(video_grid_thw)
    if grids.shape != (len(input_ids), 3):
        raise PromptError(
            f"video_grid_thw has the shape {list(grids.shape)}, but must be [{len(input_ids)}, 3]: one video a row."
        )
    if len({tuple(grid[1:]) for grid in grids}) > 1:
        raise PromptError(
            "The videos of one batch must have one frame size (video_grid_thw[:, 1:]); generate for them one by one."
        )
    return [
        _row(ids[keep].tolist(), grid, settings, merge) for ids, keep, grid in zip(input_ids, mask, grids, strict=True)
    ]


def _row(ids: list[int], grid: np.ndarray, settings: Settings, merge: int) -> Row:
    size = (int(grid[1]) // merge, int(grid[2]) // merge)
    count, expected = ids.count(settings.video_token), int(grid[0]) * size[0] * size[1]
    if count != expected:
        raise PromptError(f"A row holds {count} video tokens, but its video_grid_thw makes {expected}.")
    if not count:
        return Row([], ids, 0, size)
    at = ids.index(settings.video_token)
    if set(ids[at : at + count]) != {settings.video_token}:
        raise PromptError("A row holds more than one video; give one video a row.")
    return Row(ids[:at], ids[at + count :], int(grid[0]), size)


def windows(pixel_values, rows: Sequence[Row], length: int, vision: VisionConfig) -> Iterator[np.ndarray]:
    """Windows [B, length, P, X] of the packed pixel_values_videos [patches, X], zeros behind a shorter row's end."""
    per_frame = rows[0].tokens * vision.merge**2
    width = vision.channels * vision.temporal * vision.patch**2
    total = sum(row.patches for row in rows) * per_frame
    if pixel_values is None or np.shape(pixel_values) != (total, width):
        shape = None if pixel_values is None else list(np.shape(pixel_values))
        raise PromptError(f"pixel_values_videos has the shape {shape}, but video_grid_thw makes {[total, width]}.")
    values = np.asarray(pixel_values).reshape(-1, per_frame, width)
    ends = np.cumsum([row.patches for row in rows])
    for start in range(0, max(row.patches for row in rows), length):
        window = np.zeros((len(rows), length, per_frame, width), np.float32)
        for b, row in enumerate(rows):
            part = values[ends[b] - row.patches + start : ends[b]][:length] if start < row.patches else values[:0]
            window[b, : len(part)] = part
        yield window
