"""The naive cycle in PyTorch does what ours does; and the command that measures both."""

import json

import numpy as np
import pytest

from longvid_jax import cli
from longvid_jax.evaluate import bench_rewind


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.mark.parity
def test_both_are_the_same():
    config, patches = bench_rewind.SIZES["quick"]
    networks, given = bench_rewind.build(config), bench_rewind.inputs(config, patches, 20, 4)
    ours = bench_rewind.watch(networks, *given)
    naive, device = bench_rewind.load_torch(networks, config, given)
    assert device == "cpu" and ours.length.tolist() == [20]
    theirs = naive().numpy()
    np.testing.assert_allclose(ours.tokens[0], theirs, atol=1e-4)
    assert np.abs(theirs).max() > 0.1 and np.abs(theirs[0] - theirs[-1]).max() > 0.01


@pytest.mark.parity
def test_the_command(capsys):
    words = ["bench", "rewind", "--quick", "--frames", "32", "--repeats", "1"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == "quick" and found["clips"] == 4 and found["difference"] < 1e-4
    assert set(found["frames_per_second"]) == {"scan", "clip by clip", "pytorch"}
    assert sum(found["shares"].values()) == pytest.approx(1)
    text = bench_rewind.report(found)
    assert "loop in PyTorch" in text and "the scan takes" in text


def test_without_torch(capsys, monkeypatch):
    monkeypatch.setattr(bench_rewind.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "rewind", "--quick", "--frames", "8", "--repeats", "1"]) == 0
    assert "nothing to compare with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--frames", "20"], "--frames is 20, but must be a multiple of the 8"), (["--repeats", "0"], "--repeats is 0")],
)
def test_bad_input(capsys, words, said):
    assert cli.main(["bench", "rewind", *words]) == 2
    assert said in capsys.readouterr().err
