"""`longvid demo`: a made-up video, and a tiny trained model that is asked about it with a memory that keeps little."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from longvid_jax.errors import OptionError
from longvid_jax.evaluate import assets
from longvid_jax.evaluate.ask import ask
from longvid_jax.evaluate.metrics import event_score, span_iou
from longvid_jax.evaluate.rewind_watch import UNIFORM, Variant
from longvid_jax.evaluate.timeline import Span, check, clock, plot
from longvid_jax.systems.adacm2 import AdaCM2
from longvid_jax.systems.base import VideoModel
from longvid_jax.systems.loading import load
from longvid_jax.systems.retake import ReTaKe
from longvid_jax.systems.rewind import ReWind
from longvid_jax.video import Video
from longvid_jax.video.synthetic import FAMILIES, Question, World, write_video


@dataclasses.dataclass(frozen=True)
class Show:
    """What is shown of a system, and with which model.

    model: of the assets. trained: seconds of the longest videos that it was trained on. seconds: of the video. says:
    how little it answers from. families: that the model was taught and can answer. drawn: what is in the figure.
    without: what it is compared with, and in words.
    """

    title: str
    method: ReTaKe | AdaCM2 | ReWind
    model: str
    trained: int
    seconds: float
    says: str
    families: tuple[str, ...] = tuple(FAMILIES)
    drawn: str = "what was seen and what was kept"
    without: tuple[Callable[[Path], VideoModel], str] = (load, "with all tokens kept")


def _evenly(checkpoint: Path) -> VideoModel:
    """A ReWind that looks back at frames spread evenly."""
    return Variant(load(checkpoint), ReWind(), frames=UNIFORM)


UNCAPTIONED = tuple(family for family in FAMILIES if family != "caption")  # which some were not taught
SHOWS = {
    "retake": Show(
        "ReTaKe",
        ReTaKe(keep_ratio=0.25, reforge=False),  # re-forged positions would tell another time
        model="qwen2vl_world",
        trained=64,
        seconds=240.0,
        says="It answers from a quarter of the video's tokens.",
    ),
    "adacm2": Show(
        "AdaCM2",
        AdaCM2(alpha=0.1, beta=0.9),
        model="adacm2_world",
        trained=16,
        seconds=64.0,
        says="After each frame it forgets what the question draws least attention to, so that its cache stays small.",
        drawn="what was seen and, for the first question, what was kept",
        families=UNCAPTIONED,
    ),
    "rewind": Show(
        "ReWind",
        ReWind(),
        model="rewind_world",
        trained=256,
        seconds=64.0,
        says="It writes two tokens of each frame into a memory as it watches, and then looks again at eight frames.",
        drawn="for the first question, how relevant each frame was and which eight were looked at again",
        families=UNCAPTIONED,
        without=(_evenly, "with eight frames spread evenly in place of those"),
    ),
}
LEVEL, SPLIT = "clear", "test"  # a split that the model has never seen
FILE = {"size": (224, 224), "fps": 8}
ENOUGH = 0.5  # IoU from which a span counts as found
FIGURE = "longvid-demo.png"
MAX_NEW_TOKENS = 96  # more than a caption of the world has


def run(
    system: str = "retake",
    *,
    keep: str | os.PathLike | None = None,
    seed: int = 0,
    stage: Callable[[str], None] = lambda what: None,
) -> dict:
    """Makes, watches, asks, and returns the account as plain data.

    Args:
      system: of SHOWS.
      keep: folder for the video, what happens in it and the timeline figure, absent or empty (else OptionError); None
        keeps the figure alone, in the current folder.
      seed: of the world; some are left out, in which not every family of questions can be asked.
      stage: called with what is being done.
    """
    start, show = time.perf_counter(), SHOWS[system]
    figure = Path(FIGURE if keep is None else "timeline.png")
    with _folder(keep) as folder:
        figure = figure if keep is None else folder / figure
        check(figure)
        stage("making a video")
        world, questions = _world(seed, show.seconds, show.families)
        path = write_video(world, folder / "world.mp4", **FILE)
        stage("loading the model")
        checkpoint = assets.path(show.model)
        model = load(checkpoint, method=show.method)
        seconds = {"video": time.perf_counter() - start}
        stage(f"watching with {show.title}")
        video, texts = Video(path, fps=2), [question.text for question in questions]
        answers, result = ask(model, video, texts, max_new_tokens=MAX_NEW_TOKENS)
        stage("watching without")
        _, plain = ask(show.without[0](checkpoint), video, texts, max_new_tokens=MAX_NEW_TOKENS)
        pairs = zip(questions, result["answers"], plain["answers"], strict=True)
        told = [{**_asked(one), **judged(one, mine), "without": judged(one, other)} for one, mine, other in pairs]
        stage("drawing")
        spans = [Span(one["family"], *(one["span"] or (None, None)), one["right"]) for one in told]
        plot(answers[0].trace, video, figure, questions=spans)
    if keep is None:
        result["video"]["path"] = None  # it is gone
    return {
        "system": system,
        "seed": seed,
        "world": {"seed": world.seed, "level": LEVEL, "split": SPLIT, "seconds": world.seconds},
        "model": {"name": show.model, "trained_seconds": show.trained},
        "kept_in": None if keep is None else str(folder),
        "timeline": str(figure),
        **result,
        "answers": told,
        "right": sum(one["right"] for one in told),
        "right_without": sum(one["without"]["right"] for one in told),
        "plain": {name: plain[name] for name in ("trace", "seconds")},
        "seconds": {**seconds, **result["seconds"], "total": time.perf_counter() - start},
    }


def run_all(
    *, keep: str | os.PathLike | None = None, seed: int = 0, stage: Callable[[str], None] = lambda what: None
) -> dict:
    """One made-up video and the same questions for all systems; the account as plain data. Arguments: as for run."""
    start = time.perf_counter()
    families = [family for family in FAMILIES if all(family in show.families for show in SHOWS.values())]
    with _folder(keep) as folder:
        stage("making a video")
        world, questions = _world(seed, min(show.seconds for show in SHOWS.values()), families)
        video = Video(write_video(world, folder / "world.mp4", **FILE), fps=2)
        found, told = {}, {}
        for system, show in SHOWS.items():
            stage(f"watching with {show.title}")
            checkpoint = assets.path(show.model)
            texts = [question.text for question in questions]
            answers, result = ask(load(checkpoint, method=show.method), video, texts, max_new_tokens=MAX_NEW_TOKENS)
            told[system] = [judged(*one) for one in zip(questions, result["answers"], strict=True)]
            figure = None
            if keep is not None:
                figure = folder / f"{system}.png"
                spans = [
                    Span(question.family, *(question.span or (None, None)), one["right"])
                    for question, one in zip(questions, told[system], strict=True)
                ]
                plot(answers[0].trace, video, figure, questions=spans)
            found[system] = {
                "model": show.model,
                "trained_seconds": show.trained,
                "right": sum(one["right"] for one in told[system]),
                "timeline": None if figure is None else str(figure),
                "trace": result["trace"],
                "seconds": result["seconds"],
            }
    return {
        "system": "all",
        "seed": seed,
        "world": {"seed": world.seed, "level": LEVEL, "split": SPLIT, "seconds": world.seconds},
        "kept_in": None if keep is None else str(folder),
        "systems": found,
        "answers": [
            {**_asked(question), "said": {system: told[system][n] for system in SHOWS}}
            for n, question in enumerate(questions)
        ],
        "seconds": time.perf_counter() - start,
    }


@contextlib.contextmanager
def _folder(keep: str | os.PathLike | None) -> Iterator[Path]:
    """The folder that is to be kept, made if it is not there; or one that goes in the end."""
    with tempfile.TemporaryDirectory(prefix="longvid-demo-") as scratch:
        folder = Path(scratch if keep is None else keep)
        if keep is not None:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise OptionError(f"--keep {folder} already exists and is not an empty folder; give another one.")
            folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _world(seed: int, seconds: float, families: Sequence[str]) -> tuple[World, list[Question]]:
    """A world and a question of each family about it, in the families' order."""
    number = 1000 * seed
    while True:
        world = World(number, level=LEVEL, seconds=seconds, split=SPLIT)
        asked = {question.family: question for question in world.questions(families=families)}
        if asked.keys() == set(families):
            return world, [asked[family] for family in families]
        number += 1


def _asked(question: Question) -> dict:
    span = None if question.span is None else list(question.span)
    return {"family": question.family, "question": question.text, "truth": question.answer, "span": span}


def judged(question: Question, answer: dict) -> dict:
    """An answer {"text", ...} beside the truth."""
    text = answer["text"].strip()
    found = {"text": text, "right": text == question.answer, "tokens": answer.get("tokens")}
    if question.family == "when":
        iou = span_iou(text, question.span)
        found |= {"right": iou >= ENOUGH, "iou": iou}
    if question.family == "caption":
        found["events"] = event_score(text, question.answer)
    return found


def report(result: dict) -> str:
    """The account as text."""
    if result["system"] == "all":
        return _report_all(result)
    trace, count = result["trace"], len(result["answers"])
    length, show = clock(result["video"]["duration"]), SHOWS[result["system"]]
    lines = [
        f"A made-up video of {length}, and a tiny model that was trained on such videos of {show.trained} seconds and "
        "less.",
        show.says,
        "",
    ]
    for one in result["answers"]:
        lines += [f"{one['family']:9} {one['question']}", f"          {_told(one)}"]
    lines += [
        "",
        f"{result['right']} of {count} answers are right; {show.without[1]} {result['right_without']} of {count} are.",
        "",
        f"{trace['frames']} frames of a {length} video became {trace['tokens']:,} tokens.",
        *_held(result, show.title),
        "",
        f"{result['timeline']} shows {show.drawn}; --seed N makes another video.",
    ]
    return "\n".join(lines)


def _report_all(result: dict) -> str:
    systems, wide = result["systems"], max(len(show.title) for show in SHOWS.values())
    length = clock(result["world"]["seconds"])
    lines = [f"A made-up video of {length}, and the tiny models of all systems, which were trained on such videos.", ""]
    for one in result["answers"]:
        lines.append(f"{one['family']:9} {one['question']}")
        lines += [f"          {SHOWS[name].title:{wide}}  {_told(one | said)}" for name, said in one["said"].items()]
    lines.append("")
    for name, one in systems.items():
        lines.append(
            f"{SHOWS[name].title:{wide}}  {one['right']} of {len(result['answers'])} right, cache "
            f"{_megabytes(one['trace']['cache_bytes']).strip()}, {sum(one['seconds'].values()):.0f} s; trained on "
            f"{one['trained_seconds']} seconds at most"
        )
    if result["kept_in"]:
        lines += ["", f"{result['kept_in']} has the video and a timeline of each; --seed N makes another video."]
    return "\n".join(lines)


def _told(one: dict) -> str:
    """An answer, and the truth where it is another."""
    if one["right"]:
        said = "right" if one["text"] == one["truth"] else f"right: {one['truth']} is exact"
        return f"{one['text']}  ({said})"
    more = f", {100 * one['events']:.0f} % of the events in order" if "events" in one else ""
    return f"{one['text'] or '(nothing)'}  (wrong: {one['truth']}{more})"


def _held(result: dict, title: str) -> list[str]:
    """What is held, beside what would be or was held without."""
    trace, plain = result["trace"], result["plain"]["trace"]
    if "selected" in trace:
        every, some = (_megabytes(trace[name]) for name in ("cache_bytes_uncompressed", "cache_bytes"))
        return [
            f"Memory with a token a patch  {every}  ({trace['tokens']:,} tokens)",
            f"Memory of {title}             {some}  ({trace['tokens_kept']:,} tokens)",
        ]
    return [
        f"Cache without {title}    {_megabytes(plain['cache_bytes'])}  ({_a_layer(plain)} tokens a layer)",
        f"Cache with {title}       {_megabytes(trace['cache_bytes'])}  ({_a_layer(trace)} tokens a layer)",
    ]


def _a_layer(trace: dict) -> str:
    """Tokens in a layer's cache: at most, where layers differ."""
    return f"{trace['cache_length'] if 'cache_length' in trace else max(trace['tokens_held']):,}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:6.2f} MB" if count >= 1e5 else f"{count / 1e3:6.2f} kB"
