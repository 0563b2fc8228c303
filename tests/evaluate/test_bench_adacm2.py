"""The naive cycle in PyTorch does what ours does; and the command that measures both."""

import json

import numpy as np
import pytest

from longvid_jax import cli
from longvid_jax.convert.settings import Settings
from longvid_jax.evaluate import bench_adacm2
from longvid_jax.systems.adacm2 import AdaCM2, AdaCM2Model


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.mark.parity
def test_both_are_the_same(tmp_path):
    """The same tokens in every layer, outputs to 1e-4, and the same answer from the pixels on."""
    method = AdaCM2(alpha=0.5, beta=0.6, carry_queries=False)
    config = bench_adacm2.config_of("quick")
    settings = Settings(video_token=bench_adacm2.IMAGE, image_token=None, stop_tokens=())
    model = AdaCM2Model(bench_adacm2.build(config), settings, method=method)
    given = bench_adacm2.inputs(model, 48, 7)
    ours = bench_adacm2.ours(model, given, 6)
    theirs = bench_adacm2.naive(*bench_adacm2.load_torch(model, config, str(tmp_path)), given, method, 6)

    cache, source = ours["kept"](), theirs["kept"]()
    assert len(source) == model.model.config.qformer.cross_layers == 2
    for layer, expected in enumerate(source):
        found = np.asarray(cache.source)[layer, 0, : int(cache.length[layer, 0])]
        np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_allclose(ours["cycle"](), theirs["cycle"](), atol=1e-4)
    np.testing.assert_array_equal(ours["end_to_end"](), theirs["end_to_end"]())


@pytest.mark.parity
def test_the_command(capsys):
    words = ["bench", "adacm2", "--quick", "--frames", "32", "--repeats", "1", "--new-tokens", "2"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == "quick" and found["tokens"] == 5 and found["cache"] < 5
    assert found["difference"] < 1e-4 and set(found["results"]) == {"longvid_jax", "pytorch"}
    assert all(value > 0 for one in found["results"].values() for value in one.values())
    text = bench_adacm2.report(found)
    assert "times as fast as a loop in PyTorch on the cpu" in text and "memory cycle" in text


def test_without_torch(capsys, monkeypatch):
    monkeypatch.setattr(bench_adacm2.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "adacm2", "--quick", "--frames", "16", "--repeats", "1", "--new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert "nothing to compare with" in said and "longvid_jax" in said


@pytest.mark.parametrize(
    ("words", "said"), [(["--frames", "20"], "--frames is 20"), (["--repeats", "0"], "--repeats is 0")]
)
def test_bad_input(capsys, words, said):
    assert cli.main(["bench", "adacm2", *words]) == 2
    assert said in capsys.readouterr().err
