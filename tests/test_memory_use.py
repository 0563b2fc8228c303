"""How much memory watching takes, from outside the process that watches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

from longvid_jax.evaluate import tiny

PROGRAM = """
import resource, sys
from longvid_jax import cli
status = cli.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def loop(source: Path, target: Path, times: int) -> Path:
    """The same packets several times, one after the other."""
    with av.open(str(target), "w") as out:
        shift, stream = 0, None
        for _ in range(times):
            with av.open(str(source)) as clip:
                video = clip.streams.video[0]
                stream = stream or out.add_stream_from_template(video)
                end = 0
                for packet in clip.demux(video):
                    if packet.dts is None:
                        continue
                    end = max(end, packet.pts + packet.duration)
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    out.mux(packet)
            shift += end
    return target


def peak(video: Path, model: Path) -> tuple[int, dict]:
    """Peak resident memory in KB of `longvid ask` at a budget of 4096 tokens, a frame in two seconds, and its JSON."""
    options = ["--model", str(model), "--budget", "4096", "--fps", "0.5", "--max-new-tokens", "8", "--json"]
    environment = {**os.environ, "LONGVID_COMPILATION_CACHE": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, "ask", str(video), "What is on the tree?", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return int(done.stderr.split()[-1]), json.loads(done.stdout)


@pytest.mark.slow
def test_an_hour_takes_the_memory_of_ten_minutes(clips, tmp_path):
    """The same budget: peak memory within 10 %, though six times as many frames are watched."""
    model, short = tiny.write_checkpoint(tmp_path / "model"), clips / "haystack_10min.mp4"
    few, brief = peak(short, model)
    many, long = peak(loop(short, tmp_path / "hour.mp4", 6), model)
    assert (brief["trace"]["frames"], long["trace"]["frames"]) == (300, 1800)
    assert long["trace"]["cache_length"] < 1.1 * 4096
    assert many < 1.1 * few
