"""Reading a checkpoint folder: what is in it, slices of it, and everything that can be wrong with it."""

import io
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from longvid_jax.convert.source import has_weights, open_config, open_source
from longvid_jax.errors import CheckpointError

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_headers_and_slices(checkpoints, shards, dtype):
    tensors = checkpoints.tensors("qwen2_vl", dtype=dtype)
    source = open_source(checkpoints.make("qwen2_vl", dtype=dtype, shards=shards))
    assert source.config == checkpoints.config("qwen2_vl")
    assert {key: info.shape for key, info in source.tensors.items()} == checkpoints.shapes("qwen2_vl")
    assert sum(info.nbytes for info in source.tensors.values()) == sum(t.nbytes for t in tensors.values())
    assert len({info.file for info in source.tensors.values()}) == shards
    for key, tensor in tensors.items():
        whole = source.read(key)
        assert whole.dtype == tensor.dtype
        np.testing.assert_array_equal(whole, tensor)
        np.testing.assert_array_equal(source.read(key, (slice(3, 7),)), tensor[3:7])
    kernel = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(source.read(kernel, (slice(None), slice(8, 16))), tensors[kernel][:, 8:16])


def test_several_files_without_an_index(checkpoints):
    folder = checkpoints.make(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    assert open_source(folder).tensors.keys() == checkpoints.shapes("llama").keys()


def test_files_that_the_index_does_not_name_are_left_alone(checkpoints):
    folder = checkpoints.make(shards=2)
    save_file({"model.norm.weight": np.ones(32, np.float32)}, folder / "consolidated.safetensors")
    assert open_source(folder).tensors.keys() == checkpoints.shapes("llama").keys()


def fault(path, opener=open_source, **how) -> str:
    with pytest.raises(CheckpointError) as caught:
        opener(path, **how)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_no_such_path(tmp_path):
    assert "neither a folder that exists nor a Hugging Face hub id" in fault(tmp_path / "nothing")
    assert "neither a folder that exists" in fault("nothing")


def test_hub_id_without_network():
    message = fault("some-owner/some-model")
    assert "some-owner/some-model is neither a folder nor could it be fetched from the Hugging Face hub (" in message
    assert "give a local folder or check the name, your access and the network" in message


class Hub(ThreadingHTTPServer):
    """As much of the hub as its client needs to fetch one repository, owner/model; counts the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.files: dict[str, bytes] = {}
        self.gated, self.fetched = False, []


class Request(BaseHTTPRequestHandler):
    def do_GET(self):
        path, hub = self.path.split("?")[0], self.server
        if path.startswith(asked := f"/owner/model/resolve/{COMMIT}/"):
            name = path.removeprefix(asked)
            if hub.gated:
                self.answer(403, X_Error_Code="GatedRepo")
            else:
                hub.fetched += [name] * (self.command == "GET")
                self.answer(200, hub.files[name], ETag=f'"{name}"', X_Repo_Commit=COMMIT)
        elif path in ("/api/models/owner/model/revision/main", "/api/models/owner/model/revision/v1"):
            self.answer(200, json.dumps({"id": "owner/model", "sha": COMMIT}).encode())
        elif path.startswith("/api/models/owner/model/revision/"):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif path == f"/api/models/owner/model/tree/{COMMIT}":
            sizes = {name: len(content) for name, content in hub.files.items()}
            listed = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self.answer(200, json.dumps(listed).encode())
        else:
            self.answer(401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(checkpoints, monkeypatch):
    """A hub on this machine, which the hub's own client is sent to; its cache is an empty folder."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(checkpoints.folder / "cache"))
        yield server
        server.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_of_a_hub_id_only_what_is_needed_is_fetched(hub, checkpoints, monkeypatch):
    needed = contents(checkpoints.make(shards=2)) | dict.fromkeys(
        ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE"], b"{}"
    )
    left = ["pytorch_model.bin", "consolidated.safetensors", "model.fp16-00001-of-00001.safetensors"]
    left += ["original/params.json", "modeling_new.py", "README.md"]
    hub.files = needed | dict.fromkeys(left, b"x")
    source = open_source("owner/model", revision="v1")
    assert sorted(hub.fetched) == sorted(needed)
    assert source.name == "owner/model"
    assert source.revision == COMMIT
    assert source.path.parts[-3:] == ("models--owner--model", "snapshots", COMMIT)
    assert source.tensors.keys() == checkpoints.shapes("llama").keys()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = open_source("owner/model", revision="v1")
    assert (again.path, again.revision) == (source.path, COMMIT)
    assert len(hub.fetched) == len(needed)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "adapter.safetensors"], ["pytorch_model.bin"]),
        (["eva.pth", "README.md"], ["eva.pth"]),
    ],
)
def test_a_repository_without_safetensors(hub, there, fetched):
    import torch

    content = io.BytesIO()
    torch.save({"a": torch.ones(2)}, content)
    hub.files = {"config.json": b"{}"} | dict.fromkeys(there, content.getvalue())
    np.testing.assert_array_equal(open_source("owner/model").read("a"), [1, 1])
    assert sorted(hub.fetched) == ["config.json", *fetched]


def test_a_repository_without_weights(hub):
    hub.files = {"config.json": b"{}", "README.md": b"x"}
    assert "the weights are missing" in fault("owner/model")


def test_of_a_hub_id_only_the_config_is_fetched(hub, checkpoints, monkeypatch):
    hub.files = contents(checkpoints.make())
    folder, config = open_config("owner/model")
    assert config == checkpoints.config("llama")
    assert hub.fetched == ["config.json"]
    assert not has_weights(folder)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "check the name, your access and the network" in fault("owner/model")
    assert has_weights(open_source("owner/model").path)


def test_what_the_hub_refuses(hub, checkpoints):
    hub.files = contents(checkpoints.make())
    for opened in (fault, partial(fault, opener=open_config)):
        assert "owner/other is neither a folder nor a repository of the Hugging Face hub" in opened("owner/other")
        assert "owner/model has no revision 'v9'; give a branch" in opened("owner/model", revision="v9")
    hub.gated = True
    terms = f"accept its terms at {constants.ENDPOINT}/owner/model and log in with `hf auth login`."
    assert fault("owner/model") == f"owner/model is gated: {terms}"


def test_a_cache_without_network(checkpoints, monkeypatch):
    """As a client leaves it that keeps no list of the repository's files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(checkpoints.folder / "cache"))
    repository = checkpoints.folder / "cache" / "models--owner--model"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    checkpoints.make(shards=2).rename(repository / "snapshots" / COMMIT)
    source = open_source("owner/model")
    assert source.revision == COMMIT
    assert source.tensors.keys() == checkpoints.shapes("llama").keys()
    assert open_source(source.path).revision == COMMIT
    (source.path / "model-00001-of-00002.safetensors").unlink()
    assert "files that are absent: model-00001-of-00002.safetensors" in fault("owner/model")


def test_of_a_folder_only_the_config(checkpoints):
    folder = checkpoints.make()
    assert open_source(folder).revision is None
    assert has_weights(folder)
    (folder / "model.safetensors").unlink()
    assert open_config(folder) == (folder, checkpoints.config("llama"))
    assert not has_weights(folder)
    assert "the weights are missing" in fault(folder)
    assert "revision 'main'" in fault(folder, opener=open_config, revision="main")
    (folder / "config.json").unlink()
    assert f"{folder} holds no config.json" in fault(folder, opener=open_config)


def test_revision_of_a_folder(checkpoints):
    assert "revision 'main'" in fault(checkpoints.make(), revision="main")


def test_a_file_instead_of_its_folder(checkpoints):
    assert "is a file" in fault(checkpoints.make() / "model.safetensors")


def test_no_config(checkpoints):
    folder = checkpoints.make()
    (folder / "config.json").unlink()
    assert f"{folder} holds no config.json" in fault(folder)


@pytest.mark.parametrize(("text", "says"), [("{", "cannot be read as JSON"), ("[1]", "holds a JSON list")])
def test_config_that_is_no_object(checkpoints, text, says):
    folder = checkpoints.make()
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'} {says}" in fault(folder)


def test_no_weights(checkpoints):
    folder = checkpoints.make()
    (folder / "model.safetensors").unlink()
    message = f"{folder} holds config.json but no *.safetensors, nor *.bin, *.pth, *.pt; the weights are missing."
    assert fault(folder) == message
    (folder / "model.safetensors").symlink_to(folder / "pruned")
    assert fault(folder) == message


def test_index_names_absent_files(checkpoints):
    folder = checkpoints.make(shards=3)
    for n in (1, 3):
        (folder / f"model-0000{n}-of-00003.safetensors").unlink()
    message = fault(folder)
    assert "files that are absent: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in message


@pytest.mark.parametrize("key", ["model.extra.weight", "lm_head.weight"])  # the second one is in the first file
def test_index_places_a_tensor_where_it_is_not(checkpoints, key):
    folder = checkpoints.make(shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][key] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert f"model-00002-of-00002.safetensors does not hold {key}" in fault(folder)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        (None, "no usable weight_map"),
        ({}, "no usable weight_map"),
        ({"a": 1}, "no usable weight_map"),
        ({"a": "../b.safetensors"}, "its own folder"),
    ],
)
def test_index_of_another_form(checkpoints, weight_map, says):
    folder = checkpoints.make(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert says in fault(folder)


def test_truncated_body_names_file_and_tensor(checkpoints):
    folder = checkpoints.make(shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    message = fault(folder)
    assert message.startswith(f"{file}: truncated at byte {len(whole) - 10:,} of {len(whole):,}")
    assert f"within the tensor {last}" in message


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:20], lambda b: b[:8] + b"\xff" * 64 + b[72:], lambda b: b"\xff" * 8 + b[8:]]
)
def test_damaged_header_names_the_file(checkpoints, damage):
    folder = checkpoints.make()
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = fault(folder)
    assert message.startswith(f"{file}: ")
    assert message.endswith("; fetch this file again.")


def test_one_tensor_in_two_files(checkpoints):
    folder = checkpoints.make(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": np.ones(32, np.float32)}, folder / "more.safetensors")
    message = fault(folder)
    assert "more.safetensors: the tensor model.norm.weight is also in model-0000" in message


@pytest.mark.parametrize("shards", [1, 2])
def test_one_tensor_twice_in_a_header(checkpoints, shards):
    folder = checkpoints.make(shards=shards)
    file = sorted(folder.glob("*.safetensors"))[-1]
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    key = "model.norm.weight" if shards == 1 else sorted(set(header) - {"__metadata__"})[0]
    entries = [f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in [*header.items(), (key, header[key])]]
    twice = f"{{{','.join(entries)}}}".encode()
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + whole[end:])
    assert json.loads(twice) == header
    assert fault(folder) == f"{file}: its header has the key {key} twice; save the model anew."
