"""The scale of random weights."""

import numpy as np
import pytest
from flax import nnx

from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.models.paths import leaves
from longvid_jax.ops.rope import Rope
from longvid_jax.train.initial import scaled

CONFIG = DecoderConfig(50, 64, 3, 2, 1, 96, 1e-6, True, False, False, Rope(32))


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stack"])
def test_kernels_keep_variance_and_the_residual_stream_its_size(stacked):
    before = Decoder(CONFIG, stacked=stacked, rngs=nnx.Rngs(0))
    after = {leaf.path: leaf for leaf in leaves(scaled(before))}
    for leaf in leaves(before):
        old, new = np.asarray(leaf.value), np.asarray(after[leaf.path].value)
        if not leaf.path.endswith("kernel"):
            np.testing.assert_array_equal(new, old)
            continue
        wanted = leaf.part_shape[0] ** -0.5
        if "attention/o/" in leaf.path or "mlp/down/" in leaf.path:
            wanted /= 6**0.5
        for part in new.reshape(-1, *leaf.part_shape):
            assert part.std() == pytest.approx(wanted, rel=1e-5)
        np.testing.assert_allclose(np.corrcoef(old.ravel(), new.ravel())[0, 1], 1, atol=1e-2)
