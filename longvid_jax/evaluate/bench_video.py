"""How fast frames come from a file: `Video.stream` beside the plain PyAV loop that one would write without it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from longvid_jax.video import Video

SIDE = 224  # pixels
WINDOW = 32  # frames
CHECKPOINT = 5 * 60  # seconds of video after which memory should have stopped growing


def run(video: str | os.PathLike | None = None, minutes: float = 20, repeats: int = 2) -> dict:
    """Decode one frame a second at 224 x 224 both ways, in turns, and watch this process's memory during ours.

    Args:
      video: a file; None makes one of 640x360 at 25 frames a second, H.264.
      minutes: length of the video that is made.
      repeats: turns; the fastest of each side counts.

    Returns:
      A dict of plain values: what was decoded; of "loop" and "stream" the seconds, seconds of CPU time, sampled frames
      and frames of the video a second; `ratio` of the stream's speed to the loop's, and `cpu_ratio` of their CPU time,
      which other work on the machine disturbs less; growth of resident memory in MB since the start of the first
      stream, None where unknown.
    """
    with contextlib.ExitStack() as stack:
        if video is None:
            video = make_video(stack.enter_context(tempfile.TemporaryDirectory()), minutes)
        probe = Video(video).probe
        memory: dict[str, float] = {}
        # The stream first, so that its memory does not hide in what the loop left behind.
        ways = {"stream": lambda: _stream(video, memory), "loop": lambda: _loop(video)}
        turns = [{name: _timed(way) for name, way in ways.items()} for _ in range(repeats)]
    best = {name: min((turn[name] for turn in turns), key=lambda timed: timed["seconds"]) for name in ways}
    return {
        "video": f"{probe.width}x{probe.height} {probe.codec}, {probe.duration:.0f} s, {probe.num_frames} frames",
        "cpus": os.cpu_count(),
        **{name: timed | {"frames_per_second": probe.num_frames / timed["seconds"]} for name, timed in best.items()},
        "ratio": best["loop"]["seconds"] / best["stream"]["seconds"],
        "cpu_ratio": best["loop"]["cpu_seconds"] / best["stream"]["cpu_seconds"],
        "memory_growth_mb": memory or None,
    }


def report(result: dict) -> str:
    """The result of `run` as text."""
    lines = [f"{result['video']}; 1 frame a second at {SIDE} px on {result['cpus']} CPUs"]
    for side, name in (("loop", "PyAV loop"), ("stream", "Video.stream")):
        one = result[side]
        seconds = f"{one['seconds']:6.1f} s ({one['cpu_seconds']:.1f} s of CPU time)"
        lines.append(f"{name:<13}{seconds}, {one['frames_per_second']:.0f} frames/s, {one['samples']} frames given out")
    ratio, by_cpu = result["ratio"], result["cpu_ratio"]
    lines.append(f"{ratio:.2f} of the loop's speed (goal: at least 0.80), {by_cpu:.2f} by CPU time")
    if result["memory_growth_mb"]:
        grown = ", ".join(f"{value:.0f} MB {when}" for when, value in result["memory_growth_mb"].items())
        lines.append(f"memory grown by {grown}")
    return "\n".join(lines)


def make_video(folder: str | os.PathLike, minutes: float) -> Path:
    """Write an H.264 file: moving shapes under camera noise, 10 seconds encoded and then repeated as packets."""
    height, width, fps = 360, 640, 25
    count = 10 * fps
    path = Path(folder) / "bench.mp4"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    scene = np.stack([np.sin((x * a + y * b) / 40) for a, b in ((1, 0.3), (0.2, 1), (1, -1))], -1) * 80 + 128
    noise = rng.normal(0, 6, (8, height, width, 1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        packets = []
        for i in range(count):
            pixels = np.roll(scene, (i, 2 * i), (0, 1)) + np.roll(noise[i % 8], 37 * i, axis=1)
            pixels[(y - 180) ** 2 + (x - 3 * i % width) ** 2 < 2500] = 230
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe, p.time_base) for p in packets]
        for again in range(max(1, round(minutes * 6))):
            for data, pts, dts, duration, key, base in packets:
                packet = av.Packet(data)
                shift = round(again * count / fps / base)
                packet.stream, packet.time_base, packet.is_keyframe = stream, base, key
                packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, duration
                container.mux(packet)
    return path


def _timed(way: Callable[[], int]) -> dict:
    seconds, cpu = time.perf_counter(), time.process_time()
    samples = way()
    return {
        "seconds": time.perf_counter() - seconds,
        "cpu_seconds": time.process_time() - cpu,
        "samples": samples,
    }


def _stream(video: str | os.PathLike, memory: dict[str, float]) -> int:
    """Frames given out; notes the growth of memory in `memory` if it is empty."""
    watch = not memory
    before, samples, peak = _resident(), 0, 0.0
    for frames in Video(video, fps=1).stream(WINDOW, (SIDE, SIDE)):
        samples += int(frames.valid.sum())
        peak = max(peak, _resident() - before)
        if watch and not memory and frames.times.max() >= CHECKPOINT:
            memory["after 5 minutes"] = peak
    if watch and before:
        memory["at the end"] = peak
    return samples


def _loop(video: str | os.PathLike) -> int:
    samples, wanted = 0, 0.0
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if frame.time >= wanted:
                frame.to_ndarray(width=SIDE, height=SIDE, format="rgb24", interpolation="BICUBIC")
                samples, wanted = samples + 1, wanted + 1.0
    return samples


def _resident() -> float:
    """MB of memory in use by this process now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
