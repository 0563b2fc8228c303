"""A run that is killed while it writes a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import quickly
from tests.train.runs import losses, run, smallest

pytestmark = pytest.mark.usefixtures("kept_programs")

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests.train.runs import run, smallest
from pathlib import Path
run(smallest(*json.loads(sys.argv[2])), Path(sys.argv[1]))
"""
OFTEN = ("--config.save.every=1",)


def kill_while_saving(folder, cache, after: int) -> bool:
    """Runs until a checkpoint behind step `after` is being written, then kills: whether one was left unfinished."""
    environment = (
        os.environ
        | quickly.environment()
        | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        }
    )
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, folder, json.dumps(OFTEN)], env=environment)
    while process.poll() is None:
        names = list((folder / "checkpoints").glob("*"))
        whole = [int(path.name) for path in names if path.name.isdigit()]
        if any(not path.name.isdigit() for path in names) and max(whole, default=0) >= after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    return any(not path.name.isdigit() for path in (folder / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    "kills", [1, pytest.param(4, marks=pytest.mark.slow)], ids=["one kill", "a kill behind each step"]
)
def test_the_checkpoint_before_is_found_and_used(kills, kept_programs, tmp_path):
    config = smallest(*OFTEN)
    run(config, tmp_path / "whole")
    left = [kill_while_saving(tmp_path / "killed", kept_programs, after) for after in range(1, kills + 1)]
    _, said = run(config, tmp_path / "killed")
    if left[-1]:
        assert "was never finished and is removed; going on from step" in said[0]
    assert any(left)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one, other = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert all(path.name.isdigit() for path in (tmp_path / "killed" / "checkpoints").iterdir())
