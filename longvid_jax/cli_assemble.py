"""The sub-command `longvid assemble`."""

from __future__ import annotations

import argparse
import os
from functools import partial

from longvid_jax.terminal import print_json, progress

SIZES = {
    "width": "of the perceiver and the memory (default: 768)",
    "perceiver-layers": "(default: 8)",
    "heads": "(default: 12)",
    "ff-width": "of feed-forward layers (default: 4 times the width)",
    "num-queries": "queries a frame (default: 32)",
    "num-write": "tokens that are written of a frame (default: 2)",
    "detail-tokens": "of a frame looked at in detail (default: 32)",
    "contrast-width": "of what pre-training compares (default: 0, none)",
}


def add_arguments(assemble: argparse.ArgumentParser) -> None:
    kinds = assemble.add_subparsers(title="models", metavar="MODEL", required=True)
    rewind = kinds.add_parser("rewind", help="a ReWind", description="Make one ReWind checkpoint of three that exist.")
    rewind.add_argument("target", metavar="TARGET", help="folder to make")
    rewind.add_argument("--vision", metavar="A", required=True, help="an InstructBLIP or BLIP-2, for its vision tower")
    rewind.add_argument("--text", metavar="B", required=True, help="a BERT, which reads the question")
    rewind.add_argument("--llm", metavar="C", required=True, help="a Llama or Vicuna, or a model that has one")
    rewind.add_argument("--perceiver", metavar="Q", help="an InstructBLIP or BLIP-2 whose Q-Former it begins with")
    rewind.add_argument("--seed", type=int, default=0, metavar="N", help="of what is new (default: 0)")
    rewind.add_argument("--overwrite", action="store_true", help="replace a Hugging Face folder at TARGET")
    rewind.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    group = rewind.add_argument_group("sizes of what is new")
    for name, what in SIZES.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=what)
    rewind.set_defaults(run=run, all_faults=False)


def run(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays only pass through
    from longvid_jax.train.assemble import assemble

    names = [name.replace("-", "_") for name in SIZES]
    with progress(in_bytes=True) as bars:
        target = assemble(
            arguments.vision,
            arguments.text,
            arguments.llm,
            arguments.target,
            perceiver=arguments.perceiver,
            seed=arguments.seed,
            sizes={name: value for name in names if (value := getattr(arguments, name)) is not None},
            overwrite=arguments.overwrite,
            progress=partial(bars.advance, bars.add_task("assembling", total=None)),
        )
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    sources = {name: getattr(arguments, name) for name in ("vision", "text", "llm", "perceiver")}
    if arguments.json:
        print_json({"sources": sources, "target": str(target), "bytes": size})
    else:
        print(f"{target}  {size / 1e6:,.1f} MB")
