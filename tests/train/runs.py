"""Configs of runs that take seconds, and what comes out of them."""

import json
from pathlib import Path

from longvid_jax.train import config
from longvid_jax.train.loop import train

SMALLEST = str(Path(__file__).with_name("smallest.py"))


def smallest(*overrides: str):
    return config.load(SMALLEST, overrides)


def run(config, folder: Path, **how) -> tuple[dict, list[str]]:
    """What train gives, and the lines that it said."""
    said = []
    return train(config, folder, say=said.append, **how), said


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line}
