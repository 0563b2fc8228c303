"""`longvid demo`: a video and a tiny model made on the spot, asked as by `longvid ask`, with and without ReTaKe."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import tiny
from longvid_jax.evaluate.ask import ask
from longvid_jax.evaluate.timeline import clock, plot
from longvid_jax.systems.loading import load
from longvid_jax.systems.retake import ReTaKe
from longvid_jax.video import Video

QUESTIONS = ("What happens in this video?", "Which shapes are there, and when does the scene change?")
SIZE = (320, 180)  # pixels, width and height
FPS = 10
SCENES = (  # seconds, background, colours of the shapes that move over it
    (16, (28, 42, 74), ((240, 196, 68), (226, 92, 74))),
    (12, (214, 222, 210), ((44, 110, 142), (36, 48, 44), (196, 74, 102))),
    (20, (96, 42, 52), ((250, 236, 214), (120, 190, 164))),
    (14, (60, 128, 110), ((246, 240, 120), (28, 30, 60), (236, 120, 60))),
    (18, (236, 226, 190), ((150, 60, 120), (40, 90, 60))),
)
NEAR = 1.0  # seconds: a temporal patch of two frames at 2 frames a second
WEIGHTS = "The weights are random, so the words of the answers mean nothing; all else is as with a trained model."


def run(
    *, keep: str | os.PathLike | None = None, seed: int = 0, stage: Callable[[str], None] = lambda what: None
) -> dict:
    """Makes, watches, asks, and returns the account as plain data.

    Args:
      keep: folder for the video, the checkpoint and the timeline figure, absent or empty (else OptionError); None keeps
        nothing.
      seed: of the video and of the weights.
      stage: called with what is being done.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="longvid-demo-") as scratch:
        folder = Path(scratch if keep is None else keep)
        if keep is not None:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise OptionError(f"--keep {folder} already exists and is not an empty folder; give another one.")
            folder.mkdir(parents=True, exist_ok=True)
        stage("making a video")
        path = write_video(folder / "shapes.mp4", seed=seed)
        stage("making a tiny model")
        checkpoint = tiny.write_checkpoint(folder / "checkpoint", seed=seed)
        decoding = {"max_new_tokens": 32, "temperature": 0.2, "seed": seed}
        stage("watching with ReTaKe")
        model, video = load(checkpoint, method=ReTaKe(keep_ratio=0.25)), Video(path, fps=2)
        answers, result = ask(model, video, QUESTIONS, **decoding)
        stage("watching without")
        _, plain = ask(load(checkpoint), video, QUESTIONS[:1], **decoding)
        figure = None
        if keep is not None:
            stage("drawing")
            figure = str(plot(answers[0].trace, video, folder / "timeline.png"))
    if keep is None:
        result["video"]["path"] = None  # it is gone
    cuts = np.cumsum([seconds for seconds, *_ in SCENES[:-1]]).tolist()
    marked = [patch["time"] for patch in result["trace"]["keyframes"]]
    return {
        "random_weights": True,
        "kept_in": None if keep is None else str(folder),
        "timeline": figure,
        **result,
        "plain": {name: plain[name] for name in ("answers", "trace", "seconds")},
        "cuts": cuts,
        "cuts_marked": [cut for cut in cuts if any(abs(cut - time) <= NEAR for time in marked)],
        "seconds": {**result["seconds"], "total": time.perf_counter() - start},
    }


def report(result: dict) -> str:
    """The account as text."""
    trace, plain = result["trace"], result["plain"]["trace"]
    strongest = sorted(trace["keyframes"][1:], key=lambda patch: -patch["change"])[: len(result["cuts"])]
    lines = []
    for answer in result["answers"]:
        lines += [f"> {answer['question']}", answer["text"], ""]
    lines += [
        f"{trace['frames']} frames of a {clock(result['video']['duration'])} video became {trace['tokens']:,} tokens.",
        f"Cache without ReTaKe    {_megabytes(plain['cache_bytes'])}  ({plain['cache_length']:,} tokens a layer)",
        f"Cache with ReTaKe       {_megabytes(trace['cache_bytes'])}  ({trace['cache_length']:,} tokens a layer)",
        f"The scene changes at    {'  '.join(map(clock, result['cuts']))}",
        f"DPSelect sees most at   {'  '.join(clock(patch['time']) for patch in sorted(strongest, key=_time))}"
        f"  ({len(result['cuts_marked'])} of {len(result['cuts'])} changes are marked)",
        "",
        WEIGHTS,
    ]
    if result["kept_in"] is None:
        lines.append("With --keep DIR the video, the checkpoint and a timeline figure stay.")
    else:
        lines.append(f"Everything is in {result['kept_in']}; the figure is {result['timeline']}.")
    return "\n".join(lines)


def write_video(path: str | os.PathLike, *, seed: int = 0) -> Path:
    """An H.264 video of shapes that drift over plain backgrounds, with a hard cut between scenes."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        number = 0
        for seconds, background, colours in SCENES:
            scene = [_Shape(colour, rng) for colour in colours]
            for n in range(seconds * FPS):
                image = Image.new("RGB", SIZE, background)
                for shape in scene:
                    shape.draw(ImageDraw.Draw(image), n / FPS)
                frame = av.VideoFrame.from_image(image)
                frame.pts, frame.time_base = number, Fraction(1, FPS)
                container.mux(stream.encode(frame))
                number += 1
        container.mux(stream.encode(None))
    return Path(path)


class _Shape:
    """A disc, a square or a triangle on a slow orbit."""

    def __init__(self, colour: tuple[int, int, int], rng: np.random.Generator):
        self.colour, self.sides = colour, int(rng.choice([0, 3, 4]))
        self.centre, self.phase = rng.uniform(0.3, 0.7, 2) * SIZE, rng.uniform(0, 2 * np.pi, 2)
        self.radius, self.reach, self.speed = rng.uniform(18, 34), rng.uniform(30, 80), rng.uniform(0.2, 0.5, 2)

    def draw(self, canvas: ImageDraw.ImageDraw, time: float) -> None:
        x, y = self.centre + self.reach * np.cos(self.speed * time + self.phase) * (1, 0.6)
        if self.sides:
            canvas.regular_polygon((x, y, self.radius), self.sides, rotation=20 * time, fill=self.colour)
        else:
            canvas.ellipse((x - self.radius, y - self.radius, x + self.radius, y + self.radius), fill=self.colour)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:6.1f} MB"


def _time(patch: dict) -> float:
    return patch["time"]
