"""Video files through PyAV: an index of what is really in the file, and the pictures asked for."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from longvid_jax.errors import VideoError
from longvid_jax.video.frames import Probe

# A jump to a keyframe has to save this many frames: it costs a seek and a refill of the decoder's threads.
MIN_JUMP = 16


@dataclasses.dataclass
class Tally:
    """Running counts of one pass; see `frames.Report`."""

    frames: int = 0
    expected: int = 0
    damaged: bool = False


@dataclasses.dataclass(frozen=True)
class Index:
    """The frames of a file in the order in which they are shown, from its packets alone."""

    probe: Probe
    times: np.ndarray  # float64 [T] seconds from the first frame
    pts: np.ndarray  # int64 [T]
    keys: np.ndarray  # int64 [n] frame indices of keyframes
    by_order: bool  # packets without presentation times: decoded frames are counted instead, and nothing is seeked
    missing: int  # frames that the header promises after the point where the file breaks off


@contextlib.contextmanager
def opened(source: str | bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open the best video stream of a file, or of one's content; VideoError if there is none."""
    path = name_of(source)
    if isinstance(source, str) and not os.path.exists(source):
        raise VideoError(f"{path}: no such file.")
    try:
        container = av.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except av.FFmpegError as e:
        empty = not source if isinstance(source, bytes) else os.path.getsize(source) == 0
        reason = "the file is empty" if empty else f"not a video that FFmpeg can read ({e.strerror})"
        raise VideoError(f"{path}: {reason}.") from e
    with container:
        form = container.format.name
        if form.endswith("_pipe") or form == "image2":
            raise VideoError(f"{path}: an image, expected a video; images are read from a folder or an array.")
        stream = container.streams.best("video")
        cover = stream is not None and stream.disposition & av.stream.Disposition.attached_pic
        if stream is None or cover or form == "tty":  # FFmpeg reads any text file as terminal art
            raise VideoError(f"{path}: has no video stream.")
        stream.thread_type = "AUTO"
        yield container, stream


def name_of(source: str | bytes) -> str:
    return f"{len(source):,} encoded bytes" if isinstance(source, bytes) else source


def read_index(path: str | bytes) -> Index:
    """Walk all packets (no decoding but of the first frame) and return the index; VideoError if nothing decodes."""
    pts, dts, keys = array.array("q"), array.array("q"), array.array("b")
    timed = ordered = True
    first, end, packets = None, None, 0
    with opened(path) as (container, stream):
        with contextlib.suppress(av.FFmpegError):  # the file breaks off
            for packet in container.demux(stream):
                if first is None:
                    with contextlib.suppress(av.FFmpegError):
                        first = next(iter(packet.decode()), None)
                packets += packet.size > 0
                if not packet.size or packet.is_discard:
                    continue
                timed &= packet.pts is not None
                ordered &= packet.dts is not None
                pts.append(packet.pts if packet.pts is not None else 0)
                dts.append(packet.dts if packet.dts is not None else 0)
                keys.append(packet.is_keyframe)
                if timed and (end is None or packet.pts >= end[0]):
                    end = packet.pts, packet.duration or 0
        if first is None:
            raise VideoError(f"{name_of(path)}: no frame of it can be decoded.")
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        tick, form, header = stream.time_base, container.format.name, (stream.frames, container.duration)
        codec = stream.codec_context.codec.canonical_name

    pts, dts, keys = np.array(pts, np.int64), np.array(dts, np.int64), np.array(keys, bool)
    if timed:
        shown, where = np.unique(pts, return_index=True)  # the two fields of an interlaced frame share a time
        key_frames = np.flatnonzero(keys[where])
    else:
        shown = np.sort(dts) if ordered else np.round(np.arange(len(dts)) / float(rate * tick)).astype(np.int64)
        key_frames = np.zeros(0, np.int64)
    ticks = shown - shown[0]
    last = end[1] if timed and end[1] else float(1 / (rate * tick))
    duration = float((ticks[-1] + last) * tick.numerator / tick.denominator)
    fps = len(ticks) / duration
    missing = 0
    if "mp4" in form:  # counts its frames one by one; what other headers count is an estimate
        missing = max(0, header[0] - packets)
    elif "matroska" in form and header[1] and header[1] / 1e6 > duration + 1:
        # At the header's rate: near the break frames are missing already, so their own mean rate is too low.
        missing = max(0, round((header[1] / 1e6 - _last_time(path)) * float(rate)))
    turned = _quarter_turns(first)
    width, height = (first.width, first.height)[:: -1 if turned % 2 else 1]
    probe = Probe(width, height, fps, duration, len(ticks), codec, 90 * turned)
    times = ticks * tick.numerator / tick.denominator
    return Index(probe, times, shown, key_frames, not timed, missing)


def _last_time(path: str | bytes) -> float:
    """Seconds at which the last packet of any stream ends: sound may go on after the pictures."""
    last = 0.0
    with opened(path) as (container, _), contextlib.suppress(av.FFmpegError):
        for packet in container.demux():
            if packet.pts is not None:
                last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return last


def decode(
    path: str | bytes, index: Index, wanted: Sequence[int], size: tuple[int, int], tally: Tally
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame index, uint8 [H, W', 3]) for the ascending frame indices wanted, as far as they decode."""
    resizer = VideoReformatter()
    for i, frame in frames_at(path, index, wanted, tally):
        turned = _quarter_turns(frame)
        height, width = size[::-1] if turned % 2 else size
        rgb = resizer.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC)
        yield i, np.rot90(rgb.to_ndarray(), turned)


def frames_at(
    path: str | bytes, index: Index, wanted: Sequence[int], tally: Tally
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (index, frame) for the wanted indices: straight on where dense, by keyframes where sparse.

    A packet that shows no picture of its own is answered with the frame on show then. After damage decoding goes on at
    the next keyframe.
    """
    spans = collections.deque(_spans(index, wanted))
    total = len(index.pts) + index.missing
    with opened(path) as (container, stream):
        while spans:
            key, span = spans.popleft()
            first = int(index.keys[key]) if key >= 0 else 0
            packets = container.demux(stream) if key < 0 else _packets_from(container, stream, index, key)
            to_end = index.missing > 0 and not spans
            end, broken = yield from _walk(packets, stream, index, first, span, tally, to_end)
            if broken:
                # By what was shown and not by what was read, which depends on how many threads the decoder has.
                key = max(key + 1, int(np.searchsorted(index.keys, end)))
                rest = [i for i in span if key < len(index.keys) and i >= index.keys[key]]
                if rest:
                    spans.appendleft((key, rest))
                end = total if key >= len(index.keys) else int(index.keys[key]) if rest else max(end, span[-1] + 1)
            tally.expected += end - first


def _spans(index: Index, wanted: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Runs of wanted frames decoded without a jump: (row in `index.keys` to seek to, or -1 for none; frames)."""
    spans = []
    last = 0
    for i in wanted:
        key = int(np.searchsorted(index.keys, i, side="right")) - 1
        if key >= 0 and index.keys[key] - last > MIN_JUMP:
            spans.append((key, [i]))
        elif spans:
            spans[-1][1].append(i)
        else:
            spans.append((-1, [i]))
        last = i
    return spans


def _walk(packets, stream, index: Index, first: int, wanted: Sequence[int], tally: Tally, to_end: bool):
    """Decode packets until all wanted frames are out; `first` is the frame that they are meant to begin with.

    Returns:
      The frame after the last one that was reached, and whether damage ended the walk.
    """
    todo = collections.deque(wanted)
    at, on_show = first - 1, None
    try:
        for packet in packets:
            for frame in packet.decode():
                untimed = index.by_order or frame.pts is None
                at = at + 1 if untimed else int(np.searchsorted(index.pts, frame.pts, side="right")) - 1
                tally.frames += at >= first
                while todo and todo[0] < at:
                    todo.popleft()
                    if on_show is not None:
                        yield on_show
                    on_show = None
                if todo and todo[0] == at:
                    todo.popleft()
                    yield at, frame
                    on_show = None
                else:
                    on_show = at, frame
                if not todo and not to_end:
                    return at + 1, False
    except av.FFmpegError:
        tally.damaged = True
        return at + 1, True
    tally.damaged |= bool(todo) or to_end
    return len(index.pts) + index.missing, False


def _packets_from(container, stream, index: Index, key: int) -> Iterator[av.Packet]:
    """The packets from a keyframe on, or from an earlier one if a seek lands behind what it asked for."""
    target, back = index.pts[index.keys[key]], 1
    while True:
        with contextlib.suppress(av.FFmpegError):  # what cannot seek is read on from where it is
            container.seek(int(index.pts[index.keys[key]]), stream=stream)
        packets = container.demux(stream)
        packet = next((packet for packet in packets if packet.is_keyframe), None)
        if key == 0 or (packet is not None and packet.pts is not None and packet.pts <= target):
            return itertools.chain([] if packet is None else [packet], packets)
        key, back = max(0, key - back), 2 * back


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that set a decoded frame upright."""
    return round(frame.rotation / 90) % 4
