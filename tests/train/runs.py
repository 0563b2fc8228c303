"""Configs of runs that take seconds, and what comes out of them."""

import json
from pathlib import Path

from longvid_jax.train import config
from longvid_jax.train.loop import train


def smoke(*overrides: str):
    """Six steps of the smallest variant, saved at every second and judged at every third."""
    given = ("--config.stages[0].steps=6", "--config.eval.every=3", *overrides)
    return config.load("qwen2vl_world:smoke", given)


def run(config, folder: Path, **how) -> tuple[dict, list[str]]:
    """What train gives, and the lines that it said."""
    said = []
    return train(config, folder, say=said.append, **how), said


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line}
