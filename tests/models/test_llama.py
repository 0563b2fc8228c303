"""The decoder against transformers' Llama, Qwen2 and Qwen2-VL text models: modules to 1e-5, logits to 1e-4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from longvid_jax.models.llama import forward
from longvid_jax.ops.attention import Keys, attend

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
BATCH, LENGTH = 2, 520
IDS = RNG.integers(3, 110, (BATCH, LENGTH))
logits = jax.jit(forward)

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-mha-tied": ("LlamaForCausalLM", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True}),
    "llama-head": ("LlamaForCausalLM", {"head_dim": 24}),
    "llama-linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}},
    ),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2-mqa-tied-head": (
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 8, "rms_norm_eps": 1e-5},
    ),
    "qwen2-mha-yarn": ("Qwen2ForCausalLM", {"num_key_value_heads": 4, "rope_parameters": {**YARN, "beta_fast": 16.0}}),
}


@pytest.fixture(params=VARIANTS)
def model(request, tiny):
    name, changes = VARIANTS[request.param]
    return tiny(name, **changes)


def expected_logits(model, ids=IDS) -> np.ndarray:
    with torch.no_grad():
        return model.torch(torch.tensor(ids)).logits.numpy()


def test_logits(model):
    decoder = model.ours()
    np.testing.assert_allclose(logits(decoder, IDS), expected_logits(model), atol=1e-4, rtol=0)
    torch_count = sum(parameter.numel() for parameter in model.torch.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder)) == torch_count


@pytest.mark.parametrize("name", ["llama-head", "qwen2"])
def test_stacked_layers_give_the_same(tiny, name):
    made, changes = VARIANTS[name]
    model = tiny(made, **changes)
    stacked = logits(model.ours(stacked=True), IDS)
    np.testing.assert_allclose(stacked, expected_logits(model), atol=1e-4, rtol=0)
    np.testing.assert_allclose(stacked, logits(model.ours(), IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama-linear", "llama-yarn", "qwen2", "qwen2-mha-yarn"])
def test_both_generations_of_config_give_the_same_network(tiny, tmp_path, name):
    """rope_parameters of transformers 5, and rope_theta with rope_scaling of 4."""
    made, changes = VARIANTS[name]
    model = tiny(made, **changes)
    newer = model.ours().config
    model.torch.save_pretrained(tmp_path)
    older = type(model)(model.torch, tmp_path)
    older.older_config()
    assert older.ours().config == newer


@pytest.mark.parametrize("name", ["llama", "llama-bias", "llama-head", "llama-yarn", "qwen2-mha-yarn"])
def test_modules(tiny, name):
    made, changes = VARIANTS[name]
    model = tiny(made, **changes)
    theirs, decoder = model.torch.model, model.ours()
    x = RNG.normal(size=(BATCH, 130, 64)).astype(np.float32)
    positions = np.arange(130)[None].repeat(BATCH, 0) + np.array([[0], [300]])
    their_layer, layer = theirs.layers[0], decoder.layers[0]
    mask = torch.full((130, 130), -torch.inf).triu(1)[None, None]

    with torch.no_grad():
        embedding = theirs.rotary_emb(torch.tensor(x), torch.tensor(positions))
        attended = their_layer.self_attn(torch.tensor(x), embedding, attention_mask=mask)[0]
        pairs = {
            "embed": (decoder.embed(IDS), theirs.embed_tokens(torch.tensor(IDS))),
            "attention norm": (layer.attention_norm(x), their_layer.input_layernorm(torch.tensor(x))),
            "mlp norm": (layer.mlp_norm(x), their_layer.post_attention_layernorm(torch.tensor(x))),
            "norm": (decoder.norm(x), theirs.norm(torch.tensor(x))),
            "mlp": (layer.mlp(x), their_layer.mlp(torch.tensor(x))),
            "head": (decoder.logits(x), model.torch.lm_head(torch.tensor(x))),
        }

    @jax.jit
    def attention(layer, x, positions):
        q, k, v = layer.project(x)
        rope = decoder.config.rope
        return layer.output(attend(rope(q, positions), Keys(rope(k, positions), v, causal=True)))

    pairs["attention"] = (attention(layer.attention, x, positions[..., None]), attended)
    for part, (got, expected) in pairs.items():
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-5, rtol=0, err_msg=part)


def test_padding_behind_changes_nothing(tiny):
    model = tiny("LlamaForCausalLM")
    decoder, alone = model.ours(), expected_logits(model, IDS[:1, :300])
    valid = np.arange(LENGTH) < 300
    np.testing.assert_allclose(
        logits(decoder, IDS, valid & np.ones((2, 1), bool))[0, :300], alone[0], atol=1e-4, rtol=0
    )


SECTIONS = {"mrope_section": [2, 3, 3]}
MROPE = {
    "default": {"rope_type": "default", "rope_theta": 1000000.0, **SECTIONS},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0, **SECTIONS},
    "yarn": {**YARN, **SECTIONS},
}


@pytest.mark.parametrize("kind", MROPE)
def test_m_rope(tiny, kind):
    """The text half of Qwen2-VL at positions that differ on its three axes."""
    model = tiny("Qwen2VLForConditionalGeneration", rope_parameters=MROPE[kind], tie_word_embeddings=kind == "yarn")
    decoder = model.ours().text
    x = RNG.normal(size=(BATCH, LENGTH, 64)).astype(np.float32) * 0.1
    time = np.sort(RNG.integers(0, 700, (BATCH, LENGTH)), axis=-1)
    positions = np.stack([time, RNG.integers(0, 40, time.shape), RNG.integers(0, 40, time.shape)], axis=-1)
    with torch.no_grad():
        hidden = model.torch.model.language_model(
            inputs_embeds=torch.tensor(x), position_ids=torch.tensor(positions).permute(2, 0, 1)
        ).last_hidden_state
        expected = model.torch.lm_head(hidden)
    run = jax.jit(lambda decoder, x, positions, valid: decoder.logits(decoder(x, positions, valid)[0]))
    got = run(decoder, x, jnp.asarray(positions), np.ones((BATCH, LENGTH), bool))
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4, rtol=0)
