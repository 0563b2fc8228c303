"""What a conversion will take, said before it: of the configs that are published, and of checkpoints of their size."""

import dataclasses
import json
import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from longvid_jax import cli, convert
from longvid_jax.convert import pickled, write
from longvid_jax.convert.modules import abstract
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models.paths import leaves

QWEN2_VL_7B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
SHORT = {**LLAMA_2_7B, "num_hidden_layers": 1}
SHORT_VL = {**QWEN2_VL_7B, "num_hidden_layers": 1, "vision_config": {**QWEN2_VL_7B["vision_config"], "depth": 1}}
COLAB = 12e9  # bytes that a free machine there has


def decoder(width: int, hidden: int, layers: int, vocab: int, kv: int, biases: bool) -> int:
    """Parameters of an untied Llama or Qwen2."""
    attention = 2 * width**2 + 2 * width * kv + (width + 2 * kv if biases else 0)
    return 2 * vocab * width + layers * (attention + 3 * width * hidden + 2 * width) + width


def tower(width: int, out: int, depth: int) -> int:
    """Parameters of Qwen2-VL's vision tower: patches of 3 x 2 x 14 x 14 numbers, MLP ratio 4, four tokens are one."""
    block = (3 * width**2 + 3 * width) + (width**2 + width) + (8 * width**2 + 5 * width) + 4 * width
    merger = 2 * width + (4 * width) ** 2 + 4 * width + 4 * width * out + out
    return 3 * 2 * 14**2 * width + depth * block + merger


QWEN2_VL_PARAMETERS = decoder(3584, 18944, 28, 152064, 512, biases=True) + tower(1280, 3584, 32)
LLAMA_PARAMETERS = decoder(4096, 11008, 32, 32000, 4096, biases=False)


def folder_of(path: Path, config: dict) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "parameters", "published", "dtype", "largest"),
    [
        (QWEN2_VL_7B, QWEN2_VL_PARAMETERS, 8_291_375_616, "bfloat16", ("text/embed/embedding", 152064 * 3584)),
        (LLAMA_2_7B, LLAMA_PARAMETERS, 6_738_415_616, "float16", ("embed/embedding", 32000 * 4096)),
    ],
    ids=["Qwen2-VL-7B-Instruct", "Llama-2-7b"],
)
@pytest.mark.parametrize("wanted", [None, "float32"])
def test_published_models(tmp_path, config, parameters, published, dtype, largest, wanted):
    """From the config alone; a free Colab machine can convert them to any type."""
    assert parameters == published
    needs = convert.needs(folder_of(tmp_path, config), dtype=wanted)
    itemsize = 4 if wanted == "float32" else 2
    assert needs.architecture == config["model_type"]
    assert needs.dtype == (wanted or dtype)
    assert needs.parameters == parameters
    assert needs.source_bytes is None
    assert needs.target_bytes == itemsize * parameters
    assert (needs.largest_array, needs.largest_bytes) == (largest[0], itemsize * largest[1])
    assert 2 * needs.largest_bytes < needs.peak_bytes < min(COLAB, 3.2 * needs.largest_bytes)


def test_the_newer_layout_of_the_config(tmp_path):
    """transformers 5 writes the text half below text_config, and `dtype` for `torch_dtype`."""
    outside = ("architectures", "model_type", "tie_word_embeddings", "vision_config")
    text = {key: value for key, value in SHORT_VL.items() if key not in (*outside, "torch_dtype")}
    nested = {key: SHORT_VL[key] for key in outside} | {"text_config": {**text, "dtype": "bfloat16"}}
    needs = convert.needs(folder_of(tmp_path / "nested", nested))
    assert needs == convert.needs(folder_of(tmp_path / "flat", SHORT_VL))
    assert needs.dtype == "bfloat16"


def test_tied_weights_are_one_array(tmp_path):
    folder_of(tmp_path, {**SHORT_VL, "tie_word_embeddings": True})
    expected = decoder(3584, 18944, 1, 152064, 512, biases=True) + tower(1280, 3584, 1) - 152064 * 3584
    assert convert.needs(tmp_path).parameters == expected


@pytest.mark.parametrize("nonsense", ["float12", "int8", "torch.float16x", 16, {"a": 1}, ["float32"]])
def test_a_dtype_that_is_none(tmp_path, nonsense):
    folder = folder_of(tmp_path, {**SHORT, "torch_dtype": nonsense})
    with pytest.raises(CheckpointError) as error:
        convert.needs(folder)
    assert str(error.value).startswith(f"{folder}: dtype in config.json is {nonsense!r}, but must be one of float32")
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert convert.needs(folder, dtype="float16").dtype == "float16"
    with pytest.raises(OptionError, match="dtype is 'int8'"):
        convert.needs(folder, dtype="int8")


@pytest.mark.parametrize("value", [None, "", [1]])
def test_a_text_config_that_is_none(tmp_path, value):
    with pytest.raises(CheckpointError, match="config.json has a value of the wrong kind"):
        convert.needs(folder_of(tmp_path, {**SHORT, "text_config": value}))


def test_dtypes(tmp_path):
    """What the config says, float32 if it says nothing as transformers has it, or what is asked for."""
    silent = {key: value for key, value in SHORT.items() if key != "torch_dtype"}
    assert convert.needs(folder_of(tmp_path, silent)).dtype == "float32"
    for said in ("float32", "bfloat16", "float16"):
        folder_of(tmp_path, {**silent, "dtype": said})
        assert convert.needs(tmp_path).dtype == said
        assert convert.needs(tmp_path, dtype=ml_dtypes.bfloat16).dtype == "bfloat16"


def faulty(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.mlp.up_proj.weights"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)


@pytest.mark.parametrize("model", ["llama", "qwen2_vl"])
def test_faults_are_those_of_the_conversion(checkpoints, tmp_path, model):
    folder, reports = checkpoints.make(model, change=faulty), []
    for call in (convert.needs, lambda folder: convert.to_orbax(folder, tmp_path / "target")):
        with pytest.raises(CheckpointError) as error:
            call(folder)
        reports.append(str(error.value))
    assert reports[0] == reports[1]
    assert reports[0].splitlines()[0].endswith("does not fit its config.json, 4 fault(s):")
    assert not (tmp_path / "target").exists()


def sparse(folder: Path, config: dict, files: int) -> int:
    """A checkpoint of the config's size whose headers alone were written; returns what it takes on the disk."""
    folder_of(folder, config)
    table, index = convert.table_for(config), {}
    keys = {}
    for leaf in leaves(abstract(config, convert.network_config(write._Bare("sparse", config)))):
        key, op = table.source(leaf.path)
        keys[key] = op.source_shape(leaf.value.shape)
    for n in range(files):
        name, header, end = f"model-{n + 1:05d}-of-{files:05d}.safetensors", {}, 0
        for key in list(keys)[n::files]:
            start, end = end, end + 2 * int(np.prod(keys[key]))
            header[key] = {"dtype": "BF16", "shape": keys[key], "data_offsets": [start, end]}
            index[key] = name
        encoded = json.dumps(header).encode()
        with open(folder / name, "wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(512 * file.stat().st_blocks for file in folder.iterdir())


def taken_in() -> int:
    """Bytes that have come to this process so far, at most: by touching a page that it had not, or by reading."""
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt + resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    io = Path("/proc/self/io")
    return pages * resource.getpagesize() + (int(io.read_text().split()[1]) if io.exists() else 0)


def test_only_headers_are_read(tmp_path, capsys):
    """Of a checkpoint of 16.6 GB, of which next to nothing is on the disk: hardly a page comes to memory."""
    assert sparse(tmp_path / "7B", QWEN2_VL_7B, files=5) < 1e6
    bare, before = convert.needs(folder_of(tmp_path / "bare", QWEN2_VL_7B)), sorted(tmp_path.rglob("*"))
    start = taken_in()
    assert cli.main(["convert", str(tmp_path / "7B"), "--dry-run", "--json"]) == 0
    assert taken_in() - start < 100e6
    found = json.loads(capsys.readouterr().out)
    assert found == dataclasses.asdict(bare) | {"source_bytes": 2 * QWEN2_VL_PARAMETERS}
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run(tmp_path, monkeypatch, capsys):
    """As text and as JSON, of a config alone; nothing is left behind."""
    monkeypatch.chdir(folder_of(tmp_path, SHORT))
    assert cli.main(["convert", ".", "--dry-run", "--dtype", "float32"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["model"] == "llama, 464,531,456 parameters in 12 arrays"
    assert lines["source"] == "not there, only its config"
    assert lines["target"] == "1.9 GB in float32; as much space is needed on its disk"
    assert lines["largest"] == "array   524.3 MB, embed/embedding"
    assert lines["peak"].endswith("above the interpreter with its imports")
    assert cli.main(["convert", ".", "target", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(convert.needs("."))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parity
def test_what_torch_holds_is_counted(checkpoints, monkeypatch):
    """The pages of a mapped file up to a limit; a file that is too old to be mapped is in memory whole."""
    import torch

    monkeypatch.setattr(pickled, "HELD_BYTES", 50_000)
    folder = checkpoints.make("llama")
    tensors = {key: torch.from_numpy(array) for key, array in checkpoints.tensors("llama").items()}
    peaks = [convert.needs(folder).peak_bytes]
    (folder / "model.safetensors").unlink()
    for new in (True, False):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        peaks.append(convert.needs(folder).peak_bytes)
    size = (folder / "pytorch_model.bin").stat().st_size
    assert peaks[1] == peaks[0] + 50_000 < peaks[2] == peaks[0] + size


@pytest.mark.parametrize(
    ("shape", "dtype", "copied"),
    [
        ((4096,), np.float32, 0),
        ((3552 * 8, 1792), ml_dtypes.bfloat16, 0),  # runs of 3552 rows
        ((1792, 3552 * 8), ml_dtypes.bfloat16, 1),  # of 3552 columns
        ((4096, 4096), ml_dtypes.bfloat16, 0),
        ((4096, 4096), np.float32, 1),
        ((), np.float32, 0),
    ],
)
def test_chunks(shape, dtype, copied):
    """TensorStore writes runs of whole rows from where they are; others it copies first."""
    spec = write.jax.ShapeDtypeStruct(shape, dtype)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert write._chunk_bytes(spec) // size == copied if size > 1 << 20 else write._chunk_bytes(spec) < 1 << 20
