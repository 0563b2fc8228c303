"""Descriptions of checkpoints."""

import io
import json

import numpy as np
from rich.console import Console

from longvid_jax.convert.inspect import describe, render


def text(description) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(render(description))
    return console.file.getvalue()


def test_description(checkpoints):
    tensors = checkpoints.tensors("qwen2_vl", dtype=np.float16)
    folder = checkpoints.make("qwen2_vl", dtype=np.float16, shards=2)
    found = json.loads(json.dumps(describe(folder)))
    assert found["supported"] == found["model_type"] == "qwen2_vl"
    assert found["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert found["parameters"] == found["dtypes"]["F16"] == sum(t.size for t in tensors.values())
    assert found["bytes"] == sum(found["files"].values()) == sum(t.nbytes for t in tensors.values())
    by_key = {tensor["key"]: tensor for tensor in found["tensors"]}
    assert by_key.keys() == tensors.keys()
    embed = by_key["model.embed_tokens.weight"]
    assert embed["shape"] == [64, 32]
    assert embed["bytes"] == 64 * 32 * 2
    assert embed["becomes"] == "text/embed/embedding"


def test_layers_that_are_alike_are_one_branch(checkpoints):
    def change(tensors):
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((9, 9), np.float32)
        tensors["score.weight"] = np.zeros(2, np.float32)

    shown = text(describe(checkpoints.make("llama", change=change)))
    assert "LlamaForCausalLM" in shown
    assert "0..2 (x3)" in shown
    assert "[9, 9] F32" in shown
    assert shown.count("layers/00/mlp/up/kernel") == shown.count("layers/03/mlp/up/kernel") == 1
    assert "weight  [2] F32 8 bytes  -> unknown to this model" in shown


def test_a_model_of_another_kind_can_be_looked_at(checkpoints):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    folder = checkpoints.write(checkpoints.folder / "gpt2", config, {"h.0.ln_1.weight": np.ones(3, np.float32)})
    found = describe(folder)
    assert found["supported"] is None
    assert found["tensors"][0]["becomes"] is None
    assert "GPT2LMHeadModel (not supported" in text(found)


def test_a_name_that_is_both_a_tensor_and_a_branch(checkpoints):
    tensors = {"a": np.ones(3, np.float32), "a.b": np.ones(2, np.float32), "[bold].b": np.ones(1, np.float32)}
    shown = text(describe(checkpoints.write(checkpoints.folder / "odd", {}, tensors)))
    assert "no architecture named" in shown
    assert "[bold]" in shown
