"""ReWind's steps compile for a TPU slice that is not there."""

import pytest

from longvid_jax.models.rewind import RewindConfig
from longvid_jax.scale import plan

pytestmark = pytest.mark.tpu_compile

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {
    "model_type": "rewind",
    "vision_config": {**SIZES, "image_size": 56, "patch_size": 14},
    "bert_config": {**SIZES, "vocab_size": 64},
    "text_config": {**SIZES, "model_type": "llama", "vocab_size": 128},
    "width": 64,
    "perceiver_layers": 2,
    "heads": 4,
    "num_queries": 8,
    "detail_tokens": 4,
}
CAPACITY, BATCH = 512, 4


@pytest.fixture(scope="module")
def plans():
    mesh = plan.tpu_mesh("v5e:2x4", data=4, tensor=2)
    compiled = plan.compile_rewind(RewindConfig.from_huggingface(CONFIG), mesh, batch=BATCH, capacity=CAPACITY)
    return {name: plan.summary(step) for name, step in compiled.items()}


def test_watching_and_answering_compile_for_v5e(plans):
    """Within a v5e's 16 GiB."""
    assert set(plans) == {"encode", "watch", "look", "tell", "read", "write"}
    for step in plans.values():
        assert 0 < step.argument_bytes + step.temporary_bytes + step.output_bytes < 16 << 30


def test_memory_and_details_are_updated_in_place(plans):
    """What the step gives back beyond what is donated is small beside a row's memory."""
    assert plans["watch"].output_bytes < CAPACITY * 2 * 64 * 2


def test_no_step_gathers_the_memory(plans):
    """Each device keeps its rows and its heads' keys and values; tensor parallelism needs sums."""
    for name in ("watch", "look", "tell"):
        assert set(plans[name].collectives) <= {"all-reduce"}
