"""ReTaKe's steps compile for a TPU slice that is not there."""

import json

import pytest

import longvid_jax as lv
from longvid_jax.models.qwen2_vl import Qwen2VLConfig
from longvid_jax.scale import plan
from tests.systems import golden

pytestmark = pytest.mark.tpu_compile


@pytest.fixture(scope="module")
def compiled():
    config = Qwen2VLConfig.from_huggingface(json.loads((golden.FOLDER / "pivotkv_r50" / "config.json").read_text()))
    mesh = plan.tpu_mesh("v5e:2x4", data=4, tensor=2)
    return plan.compile_retake(config, mesh, batch=4, grid=(4, 6), capacity=4096)


def test_prefill_and_decoding_compile_for_v5e(compiled):
    """Within a v5e's 16 GiB; tensor parallelism needs sums of partial products, compression itself no collective."""
    plans = {name: plan.summary(step) for name, step in compiled.items()}
    assert set(plans) == {"encode", "read", "write"}
    for step in plans.values():
        assert 0 < step.argument_bytes + step.temporary_bytes + step.output_bytes < 16 << 30
    # One sum behind attention and one behind the MLP of the layers' loop body; scores add one over the heads.
    assert plans["read"].collectives == {"all-reduce": 3}


def test_the_cache_is_updated_in_place(compiled):
    """What a step gives back beyond its donated cache is small beside it (keys and values: 1.6 MB a device)."""
    keys_and_values = 2 * 3 * 1 * 1 * 4096 * 16 * 2
    for name in ("read", "write"):
        assert plan.summary(compiled[name]).output_bytes < 0.5 * keys_and_values


def test_a_topology_that_does_not_exist():
    with pytest.raises(lv.OptionError, match="v5e:3x77"):
        plan.tpu_mesh("v5e:3x77")
