"""AdaCM2's steps compile for a TPU slice that is not there."""

import pytest

from longvid_jax.memory.adacm2 import Policy
from longvid_jax.models.instructblip import InstructBlipConfig
from longvid_jax.scale import plan

pytestmark = pytest.mark.tpu_compile

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {
    "model_type": "instructblip",
    "num_query_tokens": 8,
    "num_frame_positions": 16,
    "vision_config": {**SIZES, "image_size": 56, "patch_size": 14},
    "qformer_config": {**SIZES, "vocab_size": 64},
    "text_config": {**SIZES, "model_type": "llama", "vocab_size": 128},
}


@pytest.fixture(scope="module")
def compiled():
    mesh = plan.tpu_mesh("v5e:2x4", data=4, tensor=2)
    config = InstructBlipConfig.from_huggingface(CONFIG)
    return plan.compile_adacm2(config, mesh, batch=4, policy=Policy((0.3,), (0.5,)))


def test_watching_and_answering_compile_for_v5e(compiled):
    """Within a v5e's 16 GiB; no step gathers parameters or the cache, tensor parallelism needs sums."""
    plans = {name: plan.summary(step) for name, step in compiled.items()}
    assert set(plans) == {"encode", "watch", "read", "write"}
    for step in plans.values():
        assert 0 < step.argument_bytes + step.temporary_bytes + step.output_bytes < 16 << 30


def test_the_video_cache_is_updated_in_place(compiled):
    """What the step gives back is donated."""
    step = plan.summary(compiled["watch"])
    assert step.output_bytes < 4096
