"""InstructBLIP and BLIP-2 in and out, in the layouts of transformers and of LAVIS, with both their tokenizers."""

import io
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.numpy import load_file, save_file

from longvid_jax import convert
from longvid_jax.convert.folder import files_beside
from longvid_jax.errors import CheckpointError
from tests.convert import test_source
from tests.models import blip

pytestmark = pytest.mark.parity
TOKENIZER = "qformer_tokenizer"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "she", "##d"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(kind, text) -> a model of transformers and its folder, made once and left as it is."""
    cache = {}

    def make(kind: str = "InstructBlip", text: str = "llama"):
        if (kind, text) not in cache:
            texts = {"llama": blip.LLAMA, "tied": {**blip.LLAMA, "tie_word_embeddings": True}, "opt": blip.OPT}
            model, folder = blip.make(kind, text=texts[text]), tmp_path_factory.mktemp("blip") / "model"
            model.save_pretrained(folder)
            cache[kind, text] = model, folder
        return cache[kind, text]

    return make


@pytest.fixture
def given():
    return blip.inputs(np.random.default_rng(0))


def copied(folder: Path, target: Path, **changes) -> Path:
    """The model's folder again, its config.json with other values."""
    target.mkdir()
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def fault(folder, **how) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert.from_huggingface(folder, **how)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "stacked"),
    [("InstructBlip", "llama", False), ("InstructBlip", "tied", True), ("Blip2", "llama", True)],
)
def test_comes_and_goes(made, given, tmp_path, kind, text, stacked):
    """torch's logits again, with the same bits, by way of a module and by way of our own folder."""
    model, folder = made(kind, text)
    expected = blip.expected_logits(model, given)
    ours, config = convert.from_huggingface(folder, stacked=stacked), convert.open_source(folder).config
    saved = convert.save_huggingface(ours, config, tmp_path / "saved", convert.table_for(config))
    converted = convert.to_orbax(folder, tmp_path / "converted")
    same(convert.from_huggingface(converted, stacked=stacked), ours)
    for back in (saved, convert.to_huggingface(converted, tmp_path / "exported", max_shard_bytes=20_000)):
        again, report = type(model).from_pretrained(back, output_loading_info=True)
        assert not any(report.values()), report
        np.testing.assert_array_equal(blip.expected_logits(again, given), expected)


def test_parts(made, tmp_path):
    _, folder = made()
    whole = convert.from_huggingface(folder, stacked=True)
    converted = convert.to_orbax(folder, tmp_path / "converted")
    for part in ("vision", "qformer", "text"):
        for there in (folder, converted):
            same(convert.from_huggingface(there, part=part, stacked=True), getattr(whole, part))
    assert "has no part 'query_tokens'" in fault(folder, part="query_tokens")


def test_parts_of_a_model_whose_language_model_is_not_known(made, tmp_path):
    model, folder = made("Blip2", "opt")
    vision = convert.from_huggingface(folder, part="vision")
    qformer = convert.from_huggingface(folder, part="qformer")
    for part, theirs in ((vision, model.vision_model), (qformer, model.qformer)):
        assert sum(leaf.size for leaf in jax.tree.leaves(part)) == sum(p.numel() for p in theirs.parameters())
    says = "its language model is of type 'opt', and only llama and qwen2 are known; load a part of it"
    assert says in fault(folder)
    for refused in (lambda: convert.to_orbax(folder, tmp_path / "converted"), lambda: convert.needs(folder)):
        with pytest.raises(CheckpointError, match=says):
            refused()
    assert "has no part 'text'" in fault(folder, part="text")
    assert not (tmp_path / "converted").exists()


def test_a_decoder_without_its_head(tmp_path, given):
    """As transformers' InstructBlipModel calls it; the head is then the embedding, or missing."""
    model = blip.make(head="Model", text={**blip.LLAMA, "tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "tied")
    ours = convert.from_huggingface(tmp_path / "tied")
    np.testing.assert_array_equal(ours.text.embed.embedding[...], model.language_model.embed_tokens.weight.detach())
    blip.make(head="Model").save_pretrained(tmp_path / "untied")
    message = fault(tmp_path / "untied")
    assert message.endswith("1 fault(s):\n  language_model.lm_head.weight: missing; text/lm_head/kernel needs it")


def test_a_checkpoint_is_used_to_the_last_tensor(made, tmp_path):
    _, folder = made()
    broken = copied(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["qformer.encoder.layer.1.crossattention.attention.query.weight"] = np.zeros((24, 24), np.float32)
    tensors["vision_model.encoder.layers.2.layer_norm1.weight"] = np.zeros(32, np.float32)
    tensors["language_model.model.layers.0.mlp.gate_proj.lora_A.weight"] = np.zeros((2, 32), np.float32)
    del tensors["query_tokens"], tensors["language_projection.bias"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    message = fault(broken)
    assert "5 fault(s)" in message
    for says in (
        "layer.1.crossattention.attention.query.weight: would be qformer/layers/01/cross/q/kernel, which the model",
        "layers.2.layer_norm1.weight: would be vision/blocks/02/norm1/scale, which the model of this config does not",
        "lora_A.weight: no parameter has this name",
        "query_tokens: missing; query_tokens needs it",
        "language_projection.bias: missing; projection/bias needs it",
    ):
        assert says in message


def test_frame_positions(made, given, tmp_path):
    """AdaCM2's embedding is one tensor more, which transformers leaves alone."""
    model, folder = made()
    added = copied(folder, tmp_path / "added", num_frame_positions=6)
    assert "frame_positions.weight: missing; frames/embedding needs it" in fault(added)
    tensors = load_file(added / "model.safetensors")
    tensors["frame_positions.weight"] = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    save_file(tensors, added / "model.safetensors", {"format": "pt"})
    ours, source = convert.from_huggingface(added), convert.open_source(added)
    np.testing.assert_array_equal(ours.frames.embedding[...], tensors["frame_positions.weight"])
    table = convert.table_for(source.config)
    saved = convert.save_huggingface(ours, source.config, tmp_path / "saved", table)
    same(load_file(saved / "model.safetensors"), tensors)
    assert json.loads((saved / "config.json").read_text())["num_frame_positions"] == 6
    again, report = type(model).from_pretrained(saved, output_loading_info=True)
    assert list(report.pop("unexpected_keys")) == ["frame_positions.weight"]
    assert not any(report.values()), report
    np.testing.assert_array_equal(blip.expected_logits(again, given), blip.expected_logits(model, given))
    (added / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "frame_positions.weight: would be frames/embedding, which the model of this config does not" in fault(added)


LAVIS = (  # as LAVIS' own script for Hugging Face has it, read backwards
    (r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"vision_model\.encoder\.layers", "visual_encoder.blocks"),
    (r"vision_model\.post_layernorm", "ln_vision"),
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.projection", "attn.proj"),
    (r"(visual.*)self_attn\.qkv", r"\1attn.qkv"),
    (r"qformer\.(embeddings\.layernorm|layernorm)", "Qformer.bert.embeddings.LayerNorm"),
    (r"^qformer\.", "Qformer.bert."),
    (r"attention\.attention", "attention.self"),
    (r"language_projection", "llm_proj"),
    (r"language_model\.", "llm_model."),
)


def in_lavis(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for key, tensor in tensors.items():
        for ours, theirs in LAVIS:
            key = re.sub(ours, theirs, key)
        if key.endswith("attn.qkv.bias"):
            q, k, v = np.split(tensor, 3)
            assert not k.any()
            stem = key.removesuffix("qkv.bias")
            found |= {f"{stem}q_bias": q.copy(), f"{stem}v_bias": v.copy()}
        else:
            found[key] = tensor
    return found


def as_lavis(folder: Path, target: Path, kind: str = ".pth", *, extra: dict | None = None) -> Path:
    """The folder's tensors in LAVIS's file, with what it holds besides, and the same config.json beside it."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = in_lavis(load_file(folder / "model.safetensors"))
    tensors["Qformer.bert.embeddings.position_ids"] = np.arange(32)[None]
    tensors |= {f"{name}.weight": np.ones((2, 24), np.float32) for name in ("itm_head", "vision_proj", "text_proj")}
    tensors |= {"temp": np.ones((), np.float32), "Qformer.cls.predictions.bias": np.ones(50, np.float32)}
    tensors |= extra or {}
    if kind == ".pth":
        content = {"model": {key: torch.tensor(tensor) for key, tensor in tensors.items()}, "epoch": 3}
        torch.save(content, target / "instruct_blip.pth")
    else:
        save_file(tensors, target / "instruct_blip.safetensors")
    return target


def without_k_bias(model):
    """The bias of the keys is 0 where LAVIS trained the tower."""
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            width = layer.self_attn.embed_dim
            layer.self_attn.qkv.bias[width : 2 * width] = 0
    return model


@pytest.fixture(scope="module")
def lavis(tmp_path_factory):
    """Models whose keys have no bias, and their folders."""
    made = {}
    for kind, text in (("InstructBlip", blip.LLAMA), ("Blip2", blip.OPT)):
        model, folder = without_k_bias(blip.make(kind, text=text)), tmp_path_factory.mktemp("lavis") / "model"
        model.save_pretrained(folder)
        made[kind] = model, folder
    return made


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_lavis_layout(lavis, given, tmp_path, kind):
    """The same parameters, bit for bit, in memory, on disk and on the way back to transformers."""
    model, folder = lavis["InstructBlip"]
    there, expected = as_lavis(folder, tmp_path / "lavis", kind), convert.from_huggingface(folder)
    ours = convert.from_huggingface(there)
    same(ours, expected)
    np.testing.assert_array_equal(blip.logits(ours, given), blip.logits(expected, given))
    converted = convert.to_orbax(there, tmp_path / "converted")
    same(convert.from_huggingface(converted), expected)
    again, report = type(model).from_pretrained(
        convert.to_huggingface(converted, tmp_path / "exported"), output_loading_info=True
    )
    assert not any(report.values()), report
    np.testing.assert_array_equal(blip.expected_logits(again, given), blip.expected_logits(model, given))


def test_lavis_blip2(lavis, tmp_path):
    _, folder = lavis["Blip2"]
    there = as_lavis(folder, tmp_path / "lavis")
    for part in ("vision", "qformer"):
        same(convert.from_huggingface(there, part=part), convert.from_huggingface(folder, part=part))


def test_evas_own_file_beside_what_was_trained(lavis, tmp_path):
    """eva_vit_g.pth has no prefix, a block more than is used, and a head."""
    _, folder = lavis["InstructBlip"]
    there, tensors = as_lavis(folder, tmp_path / "lavis"), in_lavis(load_file(folder / "model.safetensors"))
    eva = {key.removeprefix("visual_encoder."): t for key, t in tensors.items() if key.startswith("visual_encoder.")}
    eva |= {key.replace("blocks.1", "blocks.2"): tensor + 1 for key, tensor in eva.items() if "blocks.1" in key}
    eva |= {"norm.weight": np.ones(32, np.float32), "head.bias": np.ones(9, np.float32)}
    torch.save({key: torch.tensor(tensor) for key, tensor in eva.items()}, there / "eva_vit_g.pth")
    assert "visual_encoder.cls_token and cls_token are both vision_model.embeddings.class_embedding; keep one." in [
        re.sub(r"^(cls_token) and (\S+) are", r"\2 and \1 are", fault(there))
    ]
    rest = {key: torch.tensor(t) for key, t in tensors.items() if not key.startswith("visual_encoder.")}
    torch.save(rest, there / "instruct_blip.pth")
    same(convert.from_huggingface(there), convert.from_huggingface(folder))
    eva |= {"blocks.3.norm1.weight": np.ones(32, np.float32)}
    torch.save({key: torch.tensor(tensor) for key, tensor in eva.items()}, there / "eva_vit_g.pth")
    assert fault(there).endswith("1 fault(s):\n  blocks.3.norm1.weight: no parameter has this name")


def test_lavis_is_used_to_the_last_tensor(lavis, tmp_path):
    _, folder = lavis["InstructBlip"]
    extra = {"visual_encoder.blocks.0.attn.v_bias": np.zeros(31, np.float32), "Qformer.head": np.zeros(2, np.float32)}
    message = fault(as_lavis(folder, tmp_path / "odd", extra=extra))
    assert "visual_encoder.blocks.0.attn.q_bias: no parameter has this name" in message
    assert "visual_encoder.blocks.0.attn.v_bias: no parameter has this name" in message
    assert "vision_model.encoder.layers.0.self_attn.qkv.bias: missing" in message
    assert "Qformer.head: no parameter has this name" in message
    there = as_lavis(folder, tmp_path / "bare")
    (there / "config.json").unlink()
    assert "put one of the right model_type (instructblip or blip-2 for a checkpoint of LAVIS) beside" in fault(there)


@pytest.fixture
def with_tokenizers(made, tmp_path) -> Path:
    """A model's folder with a real tokenizer of the Q-Former's below it, and something else."""
    folder = copied(made()[1], tmp_path / "model")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(vocab=str(vocabulary))
    tokenizer.save_pretrained(folder / TOKENIZER)
    (folder / TOKENIZER / "vocab.txt").write_text(vocabulary.read_text())
    (folder / TOKENIZER / "code.py").write_text("raise SystemExit")
    (folder / "other").mkdir()
    (folder / "other" / "tokenizer.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def reads(folder: Path) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder / TOKENIZER)("What is she").input_ids


def test_the_second_tokenizer_goes_along(with_tokenizers, tmp_path):
    folder = with_tokenizers
    files = sorted(path.name for path in (folder / TOKENIZER).iterdir() if path.suffix != ".py")
    assert {"vocab.txt", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert reads(folder) == [2, 5, 6, 7, 3]
    ours, config = convert.from_huggingface(folder), convert.open_source(folder).config
    converted = convert.to_orbax(folder, tmp_path / "converted")
    table, target = convert.table_for(config), tmp_path / "saved"
    beside = files_beside(folder)
    for there in (
        converted,
        convert.to_huggingface(converted, tmp_path / "exported"),
        convert.save_huggingface(ours, config, target, table, beside=beside),
        convert.save_huggingface(ours, config, target, table, beside=files_beside(converted), overwrite=True),
    ):
        assert sorted(path.name for path in (there / TOKENIZER).iterdir()) == files
        assert [path.name for path in there.iterdir() if path.is_dir() and path.name != "params"] == [TOKENIZER]
        assert (there / "preprocessor_config.json").exists()
        assert reads(there) == [2, 5, 6, 7, 3]
    convert.to_orbax(folder, converted, overwrite=True)
    assert reads(converted) == [2, 5, 6, 7, 3]


hub = test_source.hub


def test_of_a_hub_id_the_second_tokenizer_is_fetched(hub, with_tokenizers):
    there = [path for path in with_tokenizers.rglob("*") if path.is_file()]
    hub.files = {path.relative_to(with_tokenizers).as_posix(): path.read_bytes() for path in there}
    source = convert.open_source("owner/model")
    left = {"other/tokenizer.json", f"{TOKENIZER}/code.py"}
    assert left < hub.files.keys()
    assert set(hub.fetched) == hub.files.keys() - left
    assert reads(source.path) == [2, 5, 6, 7, 3]
    assert {path.relative_to(source.path).as_posix() for path in files_beside(source.path)} == (
        hub.files.keys() - left - {"config.json", "model.safetensors"}
    )


def test_a_folder_with_more_in_it_is_not_overwritten(with_tokenizers):
    ours, config = convert.from_huggingface(with_tokenizers), convert.open_source(with_tokenizers).config
    with pytest.raises(CheckpointError, match="holds something else"):
        convert.save_huggingface(ours, config, with_tokenizers, convert.table_for(config), overwrite=True)
    (with_tokenizers / "other" / "tokenizer.json").unlink()
    (with_tokenizers / "other").rmdir()
    (with_tokenizers / TOKENIZER / "deeper").mkdir()
    with pytest.raises(CheckpointError, match="holds something else"):
        convert.save_huggingface(ours, config, with_tokenizers, convert.table_for(config), overwrite=True)
    (with_tokenizers / TOKENIZER / "deeper").rmdir()
    convert.save_huggingface(ours, config, with_tokenizers, convert.table_for(config), overwrite=True)
    assert not (with_tokenizers / TOKENIZER).exists()


def shown(description) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(convert.render(description))
    return console.file.getvalue()


def test_inspect(made, lavis, tmp_path):
    model, folder = made(text="tied")
    found = json.loads(json.dumps(convert.describe(folder)))
    assert (found["supported"], found["parameters"]) == ("instructblip", sum(p.numel() for p in model.parameters()))
    assert all(tensor["becomes"] not in (None, "ignored") for tensor in found["tensors"])
    assert "-> query_tokens" in shown(found)
    converted = convert.describe(convert.to_orbax(folder, tmp_path / "converted"))
    assert {t["key"] for t in converted["tensors"]} == {t["becomes"] for t in found["tensors"]}
    assert {t["comes_from"] for t in converted["tensors"]} == {t["key"] for t in found["tensors"]}

    found = convert.describe(as_lavis(lavis["InstructBlip"][1], tmp_path / "lavis"))
    by_key = {tensor["key"]: tensor for tensor in found["tensors"]}
    bias = by_key["vision_model.encoder.layers.1.self_attn.qkv.bias"]
    assert bias["stored_as"] == ["visual_encoder.blocks.1.attn.q_bias", "visual_encoder.blocks.1.attn.v_bias"]
    assert (bias["shape"], bias["becomes"]) == ([96], "vision/blocks/01/attention/qkv/bias")
    assert "stored_as" not in by_key["query_tokens"]
    assert {t["key"] for t in found["tensors"] if t["becomes"] == "ignored"} == {
        "qformer.embeddings.position_ids",
        "Qformer.cls.predictions.bias",
        "itm_head.weight",
        "vision_proj.weight",
        "text_proj.weight",
        "temp",
    }
    opt = convert.describe(made("Blip2", "opt")[1])
    assert {t["becomes"] for t in opt["tensors"] if t["key"].startswith("language_")} == {"ignored"}
    assert all(t["becomes"] for t in opt["tensors"])


def test_needs(made, lavis, tmp_path, succeeds, fails):
    model, folder = made()
    whole = convert.needs(folder)
    assert (whole.architecture, whole.dtype) == ("instructblip", "float32")
    assert whole.parameters == sum(p.numel() for p in model.parameters())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert convert.needs(bare).parameters == convert.needs(bare, dtype="bfloat16").parameters == whole.parameters
    assert convert.needs(as_lavis(lavis["InstructBlip"][1], tmp_path / "lavis")).arrays == whole.arrays
    printed, _ = succeeds("convert", folder, tmp_path / "target", "--dry-run")
    assert "instructblip" in printed
    assert not (tmp_path / "target").exists()
    assert "of type 'opt'" in fails("convert", made("Blip2", "opt")[1], tmp_path / "target", "--dry-run")
    assert "vision" in succeeds("inspect", folder)[0]
