"""`longvid train` as a program: it is stopped by SIGTERM, taken up again, and says where the model is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture
def longvid(tmp_path):
    """Starts the program in a folder of its own, where it keeps what it compiles."""

    def start(*words) -> subprocess.Popen:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        environment.pop("LONGVID_COMPILATION_CACHE", None)
        return subprocess.Popen(
            [sys.executable, "-m", "longvid_jax.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
        )

    return start


def test_stopped_and_taken_up_again(longvid, tmp_path):
    words = ["train", "--config", "qwen2vl_world:smoke", "--workdir", "run", "--config.stages[1].steps=60"]
    words += ["--config.save.every=30", "--config.eval.every=31", "--json"]
    process = longvid(*words)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    stopped = json.loads(out)
    assert stopped["stopped"] == "SIGTERM" and 0 < stopped["step"] < 62 and stopped["model"] is None
    assert f"stopped after step {stopped['step']} of 62; give the same command again to go on" in err
    assert (tmp_path / "run" / "checkpoints" / str(stopped["step"])).is_dir()

    process = longvid(*words[:-1])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.startswith(str(tmp_path / "run" / "model")) and "the model after step " in out
    assert "longvid: step 62 of 62: loss " in err and "Traceback" not in err
    steps = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss": ' in line.split("eval")[0]
    ]
    assert steps == list(range(1, 63))


def test_what_is_refused(fails, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    command = ["train", "--workdir", tmp_path, "--config"]
    assert "is not empty and no training's folder" in fails(*command, "qwen2vl_world:smoke")
    assert "nothing is no config file" in fails(*command, "nothing")
    assert "has no 'lrr', but 'lr'" in fails(*command, "qwen2vl_world:smoke", "--config.optim.lrr=1")
    assert "--workers is not known" in fails(*command, "qwen2vl_world:smoke", "--workers=3")


def test_other_commands_take_no_overrides(capsys):
    from longvid_jax import cli

    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", "x", "--config.optim.lr=1"])
    assert caught.value.code == 2 and "unrecognized arguments: --config.optim.lr=1" in capsys.readouterr().err
