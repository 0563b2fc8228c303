"""AdaCM2's recipes: what the paper's table says, and runs of two of them on tiny data."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longvid_jax import convert
from longvid_jax.data.tokenizer import INSTRUCTION, bert_tokenizer
from longvid_jax.errors import CheckpointError, DataError, OptionError
from longvid_jax.models.instructblip import InstructBlip, InstructBlipConfig
from longvid_jax.models.paths import leaves
from longvid_jax.train import config, optimizer
from longvid_jax.train.parameters import decay_mask
from longvid_jax.train.sources import SOURCES
from longvid_jax.video.synthetic import World, write_video
from tests.train.runs import losses, run

# Frames, learning rate, epochs, batch size (PAPERS: of all four GPUs, and two accumulated steps where there are some).
LONG, SHORT, QA = (100, 1e-4, 20, 64), (80, 1e-5, 10, 128), (20, 1e-4, 5, 128)
LVU = ("relationship", "way_speaking", "scene", "director", "genre", "writer", "year")
TABLE = {
    **{f"lvu_{task}": (*LONG, f"what is the {task} of the movie?") for task in LVU},
    "breakfast": (*LONG, "what type of breakfast is shown in the video?"),
    "coin": (*LONG, "what is the activity in the video?"),
    "msrvtt_cap": (*SHORT, "what does the video describe?"),
    "msvd_cap": (*SHORT, "what does the video describe?"),
    "youcook2_cap": (80, 1e-4, 10, 128, "what does the video describe?"),
    "msrvtt_qa": (*QA, "Question: who? Short answer:"),
    "msvd_qa": (*QA, "Question: who? Short answer:"),
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TRAINED = ("qformer/", "query_tokens", "projection/", "frames/")


# --- what they say ----------------------------------------------------------------------------------------------------


def entry(kind: str) -> dict:
    """An annotation in MA-LMM's layout that all of a kind's recipes take."""
    labels = dict.fromkeys(LVU, "steven") | {"duration": 3, "num_frames": 30, "subset": "train"}
    return {
        "lvu": labels,
        "breakfast": {"class_name": "tea", "frame_length": 30},
        "coin": {"target": "make tea", "subset": "train", "num_frames_actual": 30},
        "captions": {"video": "v", "caption": "a star", "frame_length": 30},
        "questions": {"video": "v", "question": "who?", "answer": "she", "answer_type": "who", "frame_length": 30},
    }[kind]


@pytest.mark.parametrize("variant", TABLE)
def test_a_recipe_is_that_of_the_table(variant, tmp_path):
    frames, lr, epochs, batch, question = TABLE[variant]
    (tmp_path / "a.json").write_text(
        json.dumps({"v": entry(config.load(f"adacm2:{variant}").stages[0].sources[0]["kind"])})
    )
    loaded = config.load(f"adacm2:{variant}", [f"--config.data={tmp_path / 'a.json'}", "--config.videos=folder"])
    assert config.as_json(config.resolve(loaded)) == config.as_json(loaded)
    optim, (stage,) = loaded.optim, loaded.stages
    assert (optim.lr, stage.epochs, stage.steps, stage.batch_size) == (lr, epochs, 0, batch)
    assert (optim.rule, optim.b1, optim.b2, optim.weight_decay, optim.warmup) == ("adamw", 0.9, 0.999, 0.05, 1000)
    assert (optim.schedule, optim.floor, optim.clip, loaded.seed) == ("cosine", 0.0, None, 42)
    assert (stage.task, stage.frames, loaded.remat, loaded.lora.rank) == ("instructed", (frames,), "full", 0)
    assert (loaded.adacm2.alpha, loaded.adacm2.beta) == (0.1, 0.1)
    assert (loaded.frame_positions.count, loaded.frame_positions.initial) == (120, "zeros")
    source = dict(config.plain(loaded.stages)[0]["sources"][0])
    source = SOURCES[source.pop("kind")](**source)
    (example,) = source
    assert example.conversations[0][0][0].lower() == question.lower()
    assert (example.num_frames, example.size) == (frames, (224, 224))
    # Drawn anew in every epoch; LVU's frames are spread evenly all the same.
    assert example.frames.seed is not None
    assert example.frames.pick == ("spread" if variant.startswith("lvu") else "drawn")
    # Words of 50 at two tokens each, 32 queries and a short answer find room.
    assert max(stage.text) >= (64 if frames == 100 else 32 + 2 * 50 + 20)


def test_the_warm_up_is_theirs():
    """Linear from 1e-8 to the learning rate, in MA-LMM; then a cosine to 0."""
    recipe = config.load("adacm2:msvd_qa").optim
    schedule = optimizer.learning_rate(optimizer.OptimizerConfig.of(config.plain(recipe)), 5000)
    for step in (0, 1, 500, 999, 1000):
        assert float(schedule(step)) == pytest.approx(1e-8 + (1e-4 - 1e-8) * step / 1000, abs=1.1e-8)
    for step in (1000, 3000, 4999):
        assert float(schedule(step)) == pytest.approx(5e-5 * (1 + math.cos(math.pi * (step - 1000) / 4000)), rel=1e-5)


def test_what_decays_is_what_is_no_vector(tiny):
    """In MA-LMM (as in LAVIS): neither biases, nor norms, nor anything of fewer than two axes."""
    paths = {path: array for path, array in arrays(tiny).items() if path.startswith(TRAINED)}
    paths["frames/embedding"] = np.zeros((120, 16))
    mask = decay_mask(paths, config.load("adacm2:coin").optim.decay)
    assert mask == {path: array.ndim > 1 for path, array in paths.items()}
    assert mask["query_tokens"] and mask["frames/embedding"] and not mask["qformer/embed_norm/scale"]


# --- runs -------------------------------------------------------------------------------------------------------------


def arrays(folder) -> dict[str, np.ndarray]:
    module = convert.from_huggingface(folder)
    return {leaf.path: np.asarray(leaf.value, np.float32) for leaf in leaves(module)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An InstructBLIP of a few parameters, with a tokenizer of Llama's kind: no chat template, <s> and </s>."""
    folder, beside = (tmp_path_factory.mktemp("tiny") / name for name in ("model", "beside"))
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({piece: n for n, piece in enumerate(alphabet)}, [], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    llama = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    llama.save_pretrained(beside)
    bert_tokenizer().save_pretrained(beside / INSTRUCTION)
    about = {
        "model_type": "instructblip",
        "num_query_tokens": 4,
        "vision_config": SIZES | {"image_size": 28, "patch_size": 14},
        "qformer_config": SIZES
        | {"num_hidden_layers": 2, "vocab_size": len(bert_tokenizer()), "max_position_embeddings": 64},
        "text_config": SIZES
        | {"model_type": "llama", "vocab_size": len(alphabet), "rms_norm_eps": 1e-6, "eos_token_id": 2},
    }
    settings = InstructBlipConfig.from_huggingface(about)
    abstract, rng = jax.eval_shape(lambda: InstructBlip(settings, rngs=nnx.Rngs(0))), np.random.default_rng(0)
    module = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.2, x.shape), x.dtype), abstract)
    files = [file for file in beside.rglob("*") if file.is_file()]
    convert.save_huggingface(module, about, folder, convert.table_for(about), beside=files)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for n in range(2):
        write_video(World(n, seconds=3), folder / f"v{n}.mp4", size=(56, 64), fps=4)
    return folder


def settings(variant: str, tiny, videos, *overrides):
    """The recipe with as little data as a run of two steps needs."""
    kind = config.load(f"adacm2:{variant}").stages[0].sources[0]["kind"]
    entries = {f"v{n}": entry(kind) | ({"video": f"v{n}"} if kind == "questions" else {}) for n in range(2)}
    (videos / f"{variant}.json").write_text(json.dumps(entries))
    given = {"checkpoint": tiny, "data": videos / f"{variant}.json", "videos": videos}
    given |= {
        "stages[0].epochs": 2,
        "stages[0].batch_size": 2,
        "stages[0].frames": (4,),
    }  # the warm-up is cut to an epoch
    given |= {"stages[0].sources[0].num_frames": 4, "optim.lr": 0.02, "log_every": 1}
    words = [f"--config.{name}={value}" for name, value in given.items()]
    wanted = config.load(f"adacm2:{variant}", [*words, *overrides])
    wanted.stages[0].sources[0]["size"] = (28, 28)
    return wanted


@pytest.mark.parametrize("variant", ["lvu_director", "msvd_qa"])
def test_a_run(variant, tiny, videos, tmp_path, kept_programs):
    result, _ = run(settings(variant, tiny, videos), tmp_path / "run")
    assert (result["steps"], result["step"], result["skipped"]) == (2, 2, 0)  # two epochs of two examples, by twos
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run").values())
    before, after = arrays(tiny), arrays(result["model"])
    rounded = {path: np.asarray(jax.numpy.asarray(array, "bfloat16"), np.float32) for path, array in before.items()}
    assert after.keys() - before.keys() == {"frames/embedding"}
    changed = {path for path in before if not np.array_equal(after[path], rounded[path])}
    assert changed and all(path.startswith(TRAINED) for path in changed)
    still = {path for path in before if path.startswith(TRAINED)} - changed
    # The last layer's words, which no query sees any more, and at most biases of keys, which no softmax feels.
    assert all(path.startswith("qformer/layers/01/mlp") or path.endswith("k/bias") for path in still), still
    assert after["frames/embedding"].shape == (120, 16)
    # The last frame's position learns, and those of frames that are there and not forgotten.
    assert after["frames/embedding"][3].any() and not after["frames/embedding"][4:].any()
    about = convert.open_source(result["model"]).config
    assert about["num_frame_positions"] == 120
    for name in ("tokenizer.json", f"{INSTRUCTION}/tokenizer.json"):
        assert (tmp_path / "run" / "model" / name).read_bytes() == (tiny / name).read_bytes()


def test_data_that_is_not_there(tiny, videos, tmp_path):
    """Whose size says how many steps there are."""
    faults = (
        ([], OptionError, "a source of kind 'lvu' needs file; give it in its stage"),
        (
            ["--config.data=/nowhere.json", "--config.videos=/no"],
            DataError,
            "/nowhere.json cannot be read .No such file",
        ),
        ([f"--config.data={videos / 'v0.mp4'}", "--config.videos=/no"], DataError, "v0.mp4 is no JSON"),
    )
    for n, (given, error, fault) in enumerate(faults):
        with pytest.raises(error, match=fault) as caught:
            run(config.load("adacm2:lvu_director", [f"--config.checkpoint={tiny}", *given]), tmp_path / str(n))
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_checkpoint_without_the_q_formers_tokenizer(tiny, videos, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny.iterdir():
        if file.is_file():
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="has no qformer_tokenizer/ with its tokenizer; put it there"):
        run(settings("msvd_qa", bare, videos), tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"stages": ({"steps": 1, "epochs": 1},)}, r"config.stages\[0\] has both steps and epochs; give one of them"),
        ({"stages": ({"steps": -1},)}, r"config.stages\[0\].steps is -1, but must be at least 1"),
        ({"stages": ({"epochs": -2},)}, r"config.stages\[0\].epochs is -2, but must be at least 1"),
        ({"adacm2": {"scores": "loudest"}}, "config.adacm2.scores is 'loudest', but must be attention or shared or"),
        ({"adacm2": {"alpha": (0.1, 1.5)}}, "config.adacm2.alpha is 1.5, but must be above 0 and at most 1"),
        ({"adacm2": {"beta": 0.0}}, "config.adacm2.beta is 0.0, but must be above 0 and at most 1"),
        ({"frame_positions": {"count": -1}}, "config.frame_positions.count is -1, but must be at least 0"),
        ({"frame_positions": {"initial": "ones"}}, "config.frame_positions.initial is 'ones', but must be zeros or w"),
    ],
)
def test_values_that_are_refused(values, fault):
    with pytest.raises(OptionError, match=fault):
        config.resolve({"stages": ({"steps": 1},), **values})
