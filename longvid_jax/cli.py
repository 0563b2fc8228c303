"""The `longvid` command. What takes long to import is imported by the sub-command that needs it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from longvid_jax import cli_assemble, cli_eval, cli_train
from longvid_jax.errors import LongvidError, OptionError, VideoWarning
from longvid_jax.evaluate import options
from longvid_jax.terminal import keep_compiled, print_json, printable, progress, say

INTERRUPTED, BROKEN_PIPE = 130, 141  # what shells give for SIGINT and SIGPIPE
WIDE = 1000  # columns
SHOWN_FAULTS = 5  # of a checkpoint that has many
DTYPES = ("float32", "bfloat16", "float16")
KINDS = "a Qwen2-VL or an InstructBLIP"
BENCHMARKS = {  # each a module evaluate.bench_NAME with add_arguments, run and report
    "retake": "plain against compressed prefill and decoding",
    "adacm2": "the memory cycle, beside the same in a PyTorch loop",
    "rewind": "the read-perceive-write cycle, beside the same in a PyTorch loop",
    "convert": "converting a large checkpoint, beside copying it",
    "claims": "what a paper says of its method, on the made-up world",
    "train": "training steps fed with examples made on the way, beside batches at hand",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 2 for bad input, after one line on standard error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _quiet()
    top = parser(argv)
    arguments, rest = top.parse_known_args(argv)
    if rest and not hasattr(arguments, "overrides"):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", VideoWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            code = arguments.run(arguments)
            sys.stdout.flush()
            return code or 0
        except LongvidError as error:
            say(f"error: {error if arguments.all_faults else _one_line(error)}")
            return 2
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # `longvid ... | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a failure at exit is kept away too
                return BROKEN_PIPE
            say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            say("interrupted")
            return INTERRUPTED


def parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line; of a benchmark that has its own options, they are there if `argv` names it."""
    top = argparse.ArgumentParser(prog="longvid", description="Questions about long videos.")
    top.add_argument("--version", action=_Version)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(commands, "demo", _demo, "try it: a made-up video and a tiny trained model, nothing to download")
    demo.add_argument("--keep", metavar="DIR", help="keep the video, what happens in it and the timeline figure in DIR")
    demo.add_argument("--seed", type=int, default=0, help="another one makes another video (default: 0)")
    demo.add_argument(
        "--system", choices=("retake", "adacm2", "rewind", "all"), default="retake", help="(default: %(default)s)"
    )

    _ask_arguments(_command(commands, "ask", _ask, "ask one or more questions about a video"))

    _convert_arguments(_command(commands, "convert", _convert, "convert a Hugging Face checkpoint to Orbax"))
    _export_arguments(_command(commands, "export", _export, "write a converted checkpoint back as Hugging Face has it"))

    cli_assemble.add_arguments(commands.add_parser("assemble", help="make one checkpoint of several"))

    cli_train.add_arguments(_command(commands, "train", cli_train.run, "train a model, or go on with it"))

    cli_eval.add_arguments(_command(commands, "eval", cli_eval.run, "measure how often a model's answers are right"))

    inspect = _command(commands, "inspect", _inspect, "show what is in a checkpoint, from its headers alone")
    inspect.add_argument("path", metavar="PATH", help="converted folder, Hugging Face folder or hub id (is fetched)")
    inspect.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    inspect.add_argument("--verify", action="store_true", help="compare a converted folder's parameters' checksums")

    bench = commands.add_parser("bench", help="measure", description="Measure, side by side with a baseline.")
    kinds = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    video = _command(kinds, "video", _bench_video, "frames a second from a file, beside a bare PyAV loop")
    video.add_argument("video", metavar="VIDEO", nargs="?", help="a file (default: one that is made)")
    video.add_argument("--minutes", type=float, default=20, help="length of the video that is made (default: 20)")
    video.add_argument("--repeats", type=int, default=2, help="turns, of which the fastest counts (default: 2)")

    for name, what in BENCHMARKS.items():
        command = _command(kinds, name, partial(_bench, name), what)
        if tuple(argv[:2]) == ("bench", name):
            _benchmark(name).add_arguments(command)
    return top


def _command(commands, name: str, run, what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    command.set_defaults(run=run, all_faults=False)
    return command


class _Version(argparse.Action):
    def __init__(self, option_strings, dest):
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser, *_):
        import longvid_jax

        print(f"longvid {longvid_jax.__version__}")
        parser.exit()


# --- ask --------------------------------------------------------------------------------------------------------------


def _ask_arguments(ask: argparse.ArgumentParser) -> None:
    ask.add_argument("video", metavar="VIDEO", help="a video file, or a folder of images")
    ask.add_argument("questions", metavar="QUESTION", nargs="+", help="several are answered after one watching")
    ask.add_argument(
        "--model", metavar="PATH", required=True, help=f"converted folder, Hugging Face folder or hub id of {KINDS}"
    )
    ask.add_argument("--dtype", choices=DTYPES, help="of the weights (default: by device)")
    ask.add_argument("--check", action="store_true", help="refuse weights with NaN or infinity in them")
    ask.add_argument(
        "--plot", metavar="FILE.png", help="write a figure of what was seen and kept (for the first question)"
    )

    sampling = ask.add_argument_group("which frames")
    sampling.add_argument("--fps", type=float, metavar="F", help="sampled frames a second (default: 2)")
    sampling.add_argument("--max-frames", type=int, metavar="N", help="upper limit on the sampled frames")
    names = "fps, linspace, qwen, retake, vlmevalkit, lvb, mid or moviechat"
    sampling.add_argument("--sampler", metavar="NAME", default="fps", help=f"{names} (default: fps)")
    sampling.add_argument(
        "--long-side", type=int, metavar="PX", help="pixels of the longer side (default: the model's own rule)"
    )

    options.add_method(ask)

    decoding = ask.add_argument_group("the answer")
    decoding.add_argument("--max-new-tokens", type=int, metavar="N", default=128, help="at most (default: 128)")
    decoding.add_argument("--temperature", type=float, metavar="F", default=0.0, help="0 is greedy (default)")
    decoding.add_argument(
        "--top-p", type=float, metavar="F", default=1.0, help="nucleus of this probability (default: 1)"
    )
    decoding.add_argument("--seed", type=int, metavar="N", default=0, help="of sampling (default: 0)")
    options.add_beams(decoding)


def _ask(arguments: argparse.Namespace) -> None:
    import jax.numpy as jnp

    import longvid_jax as lv
    from longvid_jax import convert
    from longvid_jax.evaluate.ask import ask, in_words

    options.check(arguments)
    draw = _timeline(arguments.plot) if arguments.plot else None
    video = lv.Video(
        arguments.video,
        fps=arguments.fps,
        max_frames=arguments.max_frames,
        sampler=arguments.sampler,
        long_side=arguments.long_side,
    )
    expected = len(video)
    method = options.method(arguments, arguments.model)
    if isinstance(method, lv.ReTaKe) and method.prompt_guided:
        expected *= len(arguments.questions)  # each is a watching of its own
    keep_compiled()
    with progress() as bars:
        bar, start = bars.add_task("loading", total=None), time.perf_counter()
        model = lv.load(arguments.model, method=method, dtype=arguments.dtype and jnp.dtype(arguments.dtype))
        if arguments.check:
            convert.check_finite(model.model)
        seconds = {"load": time.perf_counter() - start}
        bars.update(bar, description="watching", total=expected)

        def watched(frames: int) -> None:
            bars.advance(bar, frames)
            if bars.finished:
                bars.update(bar, description="answering")

        answers, result = ask(
            model,
            video,
            arguments.questions,
            progress=watched,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            **options.beams(arguments),
        )
        bars.update(bar, description="watched")
    if draw is not None:
        draw(answers[0].trace, video, arguments.plot)
    if arguments.json:
        result = {"model": arguments.model, **result, "seconds": {**seconds, **result["seconds"]}}
        print_json(result)
        return
    for question, answer in zip(arguments.questions, answers, strict=True):
        if len(answers) > 1:
            print(f"> {question}")
        print(printable(answer.text))
    say(in_words(answers[0].trace))


def _timeline(path: str):
    """The function that draws, once it is sure that it can."""
    from longvid_jax.evaluate import timeline

    timeline.check(path)
    return timeline.plot


# --- the other sub-commands -------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    keep_compiled()
    with progress() as bars:
        from longvid_jax.evaluate import demo

        bar = bars.add_task("starting", total=None)
        show = demo.run_all if arguments.system == "all" else partial(demo.run, arguments.system)
        result = show(keep=arguments.keep, seed=arguments.seed, stage=lambda what: bars.update(bar, description=what))
        bars.update(bar, visible=False)
    print_json(result) if arguments.json else print(printable(demo.report(result)))


# --- convert, export, inspect -----------------------------------------------------------------------------------------


def _convert_arguments(convert: argparse.ArgumentParser) -> None:
    convert.set_defaults(all_faults=True)  # whoever converts mends them all, and not five at a time
    convert.add_argument("source", metavar="SOURCE", help="Hugging Face folder or hub id")
    convert.add_argument("target", metavar="TARGET", nargs="?", help="folder to make (not needed with --dry-run)")
    convert.add_argument("--dtype", choices=DTYPES, help="of all parameters (default: what is stored)")
    convert.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    convert.add_argument("--overwrite", action="store_true", help="replace a converted checkpoint at TARGET")
    convert.add_argument("--dry-run", action="store_true", help="check everything and say what it will take, then stop")


def _export_arguments(export: argparse.ArgumentParser) -> None:
    export.add_argument("source", metavar="SOURCE", help="folder that `longvid convert` made")
    export.add_argument("target", metavar="TARGET", help="folder to make")
    export.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: what is stored)")
    export.add_argument("--shard-gb", type=_positive, metavar="F", default=5, help="most GB in a file (default: 5)")
    export.add_argument("--overwrite", action="store_true", help="replace a Hugging Face folder at TARGET")


def _positive(text: str) -> float:
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _convert(arguments: argparse.Namespace) -> None:
    _without_accelerator()
    from longvid_jax import convert

    if arguments.target is None and not arguments.dry_run:
        raise OptionError("TARGET is missing; give the folder to make, or --dry-run to see what it takes.")
    if arguments.dry_run:
        forecast = convert.needs(arguments.source, dtype=arguments.dtype, revision=arguments.revision)
        print_json(dataclasses.asdict(forecast)) if arguments.json else print(forecast)
        return
    source = convert.open_to_convert(arguments.source, arguments.revision)
    size = convert.needs(source, dtype=arguments.dtype).target_bytes
    try:
        with progress(in_bytes=True) as bars:
            target = convert.to_orbax(
                source,
                arguments.target,
                dtype=arguments.dtype,
                overwrite=arguments.overwrite,
                progress=partial(bars.advance, bars.add_task("converting", total=size)),
            )
    except KeyboardInterrupt:
        say(f"what is finished is kept beside {arguments.target}; give the same command again to go on")
        raise
    _converted(arguments, target, size)


def _export(arguments: argparse.Namespace) -> None:
    _without_accelerator()
    from longvid_jax import convert

    checkpoint = convert.Checkpoint(arguments.source)
    size = checkpoint.nbytes(arguments.dtype)
    with progress(in_bytes=True) as bars:
        bar = bars.add_task("exporting", total=size)
        target = convert.to_huggingface(
            checkpoint,
            arguments.target,
            dtype=arguments.dtype,
            max_shard_bytes=int(arguments.shard_gb * 1e9),
            overwrite=arguments.overwrite,
            progress=partial(bars.advance, bar),
        )
    _converted(arguments, target, size)


def _converted(arguments: argparse.Namespace, target: Path, size: int) -> None:
    if arguments.json:
        print_json({"source": arguments.source, "target": str(target), "bytes": size})
    else:
        print(f"{target}  {size / 1e6:,.1f} MB")


def _without_accelerator() -> None:
    """Arrays only pass through: a GPU would be filled, and a TPU taken, for nothing."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _inspect(arguments: argparse.Namespace) -> None:
    _without_accelerator()
    from rich.console import Console

    from longvid_jax import convert

    description = convert.describe(arguments.path, arguments.revision)
    if arguments.verify:
        checkpoint = convert.Checkpoint(arguments.path)
        with progress(in_bytes=True) as bars:
            bar = bars.add_task("verifying", total=checkpoint.nbytes())
            convert.verify(checkpoint, partial(bars.advance, bar))
        description["verified"] = True
    if arguments.json:
        print_json(description)
        return
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)  # nothing is cut off for another program
    console.print(convert.render(description), soft_wrap=True)
    if arguments.verify:
        print("every parameter has its checksum")


def _bench_video(arguments: argparse.Namespace) -> None:
    bench = _benchmark("video")
    result = bench.run(arguments.video, arguments.minutes, arguments.repeats)
    print_json(result) if arguments.json else print(bench.report(result))


def _bench(name: str, arguments: argparse.Namespace) -> None:
    bench = _benchmark(name)
    keep_compiled()
    result = bench.run(arguments)
    print_json(result) if arguments.json else print(bench.report(result))


def _benchmark(name: str):
    return importlib.import_module(f"longvid_jax.evaluate.bench_{name}")


# --- what they share --------------------------------------------------------------------------------------------------


def _one_line(error: Exception) -> str:
    """The message; of a list of faults the first few."""
    head, *faults = (line.strip() for line in str(error).splitlines())
    more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    return " ".join([head, " | ".join(faults[:SHOWN_FAULTS] + more)]).strip()


def _quiet() -> None:
    """Keeps the chatter of libraries off the terminal; variables that are set stay as they are."""
    for name, value in {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
