"""Two processes on one machine train together: they read their own rows, stop together and go on together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.train.runs import losses, run, smallest

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
folder, words, process, port = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from longvid_jax.scale.mesh import make_mesh
from pathlib import Path
from tests.train.runs import run, smallest
result, said = run(smallest(*json.loads(words)), Path(folder), mesh=make_mesh(data=2))
print(json.dumps([result["stopped"], result["step"], said]))
"""
WORDS = ("--config.eval.every=0", "--config.stages[0].steps=40", "--config.save.every=100")


def start(folder, cache) -> list[subprocess.Popen]:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, folder, json.dumps(WORDS), str(process), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]


def ends(processes) -> list:
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed[0][1] + printed[1][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


@pytest.mark.slow
@pytest.mark.usefixtures("kept_programs")
def test_they_stop_and_go_on_together(tmp_path):
    processes = start(tmp_path / "run", tmp_path / "cache")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and all(process.poll() is None for process in processes):
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)  # only one of them is told
    (stopped, step, _), other = ends(processes)
    assert stopped == "SIGTERM" and other[:2] == [stopped, step] and 0 < step < 40
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()

    first, second = ends(start(tmp_path / "run", tmp_path / "cache"))
    assert first[:2] == second[:2] == [None, 40]
    run(smallest(*WORDS), tmp_path / "alone")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
