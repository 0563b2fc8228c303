"""Fine-tuning of tiny random checkpoints by the variants of configs/finetune.py, on conversations about real files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longvid_jax import convert
from longvid_jax.data.tokenizer import byte_tokenizer, save_tokenizer
from longvid_jax.errors import CheckpointError, DataError, OptionError, TrainError
from longvid_jax.evaluate.tiny import write_checkpoint
from longvid_jax.models import lora
from longvid_jax.models.llama import Decoder, DecoderConfig, forward
from longvid_jax.models.paths import leaves
from longvid_jax.train import config
from longvid_jax.train.export import read_adapters
from longvid_jax.video.synthetic import World, write_video
from tests.train.runs import lines, losses, run

pytestmark = pytest.mark.usefixtures("kept_programs")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return write_checkpoint(folder, width=32, depth=1, heads=2, kv_heads=1, vision_width=32, vision_depth=1)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Conversations about a video that is there and one that is not."""
    folder = tmp_path_factory.mktemp("talks")
    write_video(World(0, seconds=2), folder / "a.mp4", size=(56, 56), fps=4)
    said = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "A star."}]
    entries = [{"id": name, "video": f"{name}.mp4", "conversations": said} for name in ("a", "gone")]
    (folder / "talks.json").write_text(json.dumps(entries))
    return folder


def settings(variant, checkpoint, talks, *overrides):
    given = {"checkpoint": checkpoint, "data": talks / "talks.json", "videos": talks, "compute_dtype": "float32"}
    given |= {"save.dtype": "float32", "optim.warmup": 0, "log_every": 1, "max_undecodable": 1.0}
    given |= {"accumulate": 2 if variant == "lora" else 1, "remat": "full" if variant == "lora" else "none"}
    stage = {"steps": 2, "batch_size": 4, "text": (256, 512), "frames": (4,)}
    source = {"size": (28, 28), "max_frames": 4}
    if variant == "llama":
        source = {}
    given |= {f"stages[0].{name}": value for name, value in stage.items()}
    given |= {f"stages[0].sources[0].{name}": value for name, value in source.items()}
    words = [f"--config.{name}={value}" for name, value in given.items()]
    return config.load(f"finetune:{variant}", [*words, "--config.optim.lr=0.01", *overrides])


def arrays(folder) -> dict[str, np.ndarray]:
    return {leaf.path: np.asarray(leaf.value) for leaf in leaves(convert.from_huggingface(folder))}


@pytest.mark.parametrize("variant", ["full", "vision_frozen", "lora"])
def test_what_is_trained(variant, checkpoint, talks, tmp_path):
    patterns = ["--config.lora.patterns=('text/layers/attention/(q|v)','vision/blocks/mlp/fc1')"]
    result, _ = run(settings(variant, checkpoint, talks, *patterns * (variant == "lora")), tmp_path / "run")
    before, after = arrays(checkpoint), arrays(result["model"])
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    if variant == "full":
        # All but what has no gradient: the biases of keys, and embeddings of which some row is always in use.
        assert {path for path in before if path not in changed} <= {p for p in before if p.endswith("k/bias")}
    elif variant == "vision_frozen":
        assert changed and all(path.startswith("text/") for path in changed)
    else:
        assert {path for path in changed if path.startswith("vision")} == {"vision/blocks/00/mlp/fc1/kernel"}
        attention = {f"text/layers/00/attention/{name}/kernel" for name in "qv"}
        assert {path for path in changed if path.startswith("text")} == attention
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_adapters_alone(checkpoint, talks, tmp_path):
    given = "--config.lora.patterns=('text/layers/attention/(q|v)','vision/blocks/mlp/fc1')"
    result, _ = run(settings("lora", checkpoint, talks, given), tmp_path / "run")
    adapters, alpha = read_adapters(tmp_path / "run" / "adapters")
    assert sum(array.nbytes for array in adapters.values()) < 100_000
    ours = lora.merge(lora.with_adapters(convert.from_huggingface(checkpoint), adapters, alpha))
    for leaf, (path, expected) in zip(leaves(ours), arrays(result["model"]).items(), strict=True):
        assert leaf.path == path
        np.testing.assert_allclose(leaf.value, expected, atol=1e-6, err_msg=path)


def test_videos_that_cannot_be_read(checkpoint, talks, tmp_path):
    result, _ = run(settings("full", checkpoint, talks), tmp_path / "run")
    skipped = lines(tmp_path / "run" / "skipped.jsonl")
    assert {line["id"] for line in skipped} == {"gone"} and "gone.mp4 does not exist" in skipped[0]["why"]
    assert result["skipped"] == len(skipped) > 0
    with pytest.raises(TrainError, match=r"gone.mp4 does not exist.*more than the share 0 of config.max_undecodable"):
        run(settings("full", checkpoint, talks, "--config.max_undecodable=0.0"), tmp_path / "strict")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a random decoder, and conversations without videos."""
    folder = tmp_path_factory.mktemp("llama")
    module = Decoder(DecoderConfig.from_huggingface(LLAMA), rngs=nnx.Rngs(0))
    convert.save_huggingface(module, LLAMA, folder / "model", convert.table_for(LLAMA))
    save_tokenizer(byte_tokenizer(), folder / "model", max_length=512)
    about = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": TEMPLATE}))
    turns = ["Who?", "Me.", "And then?", "Nobody else."]
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    (folder / "talks.json").write_text(json.dumps([{"id": "1", "conversations": said}]))
    return folder


def test_llama(llama, tmp_path):
    result, _ = run(settings("llama", llama / "model", llama), tmp_path / "run")
    text = "Q: Who?\nA: Me.\nQ: And then?\nA: Nobody else.\n"
    ids = np.array(byte_tokenizer().encode(text).ids)
    assert len(ids) == len(text)  # a token a character
    logits = np.asarray(forward(convert.from_huggingface(llama / "model"), jnp.array(ids[None])))[0]
    losses_of = np.asarray(jax.nn.logsumexp(logits, -1))[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
    spans = [(text.index(answer), len(answer)) for answer in ("Me.", "Nobody else.")]
    told = [i for start, length in spans for i in range(start, start + length)]
    assert losses(tmp_path / "run")[1] == pytest.approx(losses_of[np.array(told) - 1].mean(), rel=1e-5)
    assert losses(tmp_path / "run")[2] < losses(tmp_path / "run")[1]
    before, after = arrays(llama / "model"), arrays(result["model"])
    assert all((before[path] != after[path]).any() for path in before)


def test_what_does_not_fit(checkpoint, talks, llama, tmp_path):
    small = settings("full", checkpoint, talks)
    small.stages[0].text = (16,)
    with pytest.raises(OptionError, match=r"takes \d+ tokens of text, but the largest bucket has 16"):
        run(small, tmp_path / "a")
    with pytest.raises(OptionError, match="needs file; give it"):
        run(settings("full", checkpoint, talks, "--config.data="), tmp_path / "b")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        (tmp_path / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "bare" / name).write_bytes((checkpoint / name).read_bytes())
        run(settings("full", tmp_path / "bare", talks), tmp_path / "c")
    (talks / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="the data set is empty"):
        run(settings("full", checkpoint, talks, f"--config.data={talks / 'empty.json'}"), tmp_path / "d")
    file = tmp_path / "bare" / "tokenizer.json"
    file.write_text((checkpoint / "tokenizer.json").read_text().replace("<|video_pad|>", "<|film_pad|>"))
    with pytest.raises(OptionError, match=r"the tokenizer has no token <\|video_pad\|>"):
        run(settings("full", tmp_path / "bare", talks), tmp_path / "e")
