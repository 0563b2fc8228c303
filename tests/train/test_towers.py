"""Both of AdaCM2's steps on the made-up world, in little: the towers, and then what is built on them, frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longvid_jax as lv
from longvid_jax import convert
from longvid_jax.data.facts import FACT_WIDTH
from longvid_jax.data.packing import Turns, pack
from longvid_jax.errors import OptionError
from longvid_jax.models.bert import Bert
from longvid_jax.models.eva_vit import EvaViT
from longvid_jax.models.llama import Decoder
from longvid_jax.models.paths import leaves
from longvid_jax.train import config, losses, models, tasks
from tests.train.runs import lines, run
from tests.train.test_loop import assert_same_run, press_once

pytestmark = pytest.mark.usefixtures("kept_programs")
NEW = ("/cross", "/query_mlp", "/layers/01/")  # what the towers' BERT, of one layer, does not have


def arrays(module) -> dict[str, np.ndarray]:
    return {leaf.path: np.asarray(leaf.value) for leaf in leaves(module)}


@pytest.fixture(scope="module")
def towers(kept_programs, tmp_path_factory):
    """The folder of a run of the towers, and what it gave."""
    wanted = config.load(
        "world_towers:smoke",
        ["--config.stages[0].sources[1].seconds=(8.0,)", "--config.stages[0].sources[0].moments=4"],
    )
    folder = tmp_path_factory.mktemp("towers") / "run"
    return folder, run(wanted, folder)[0]


def built_on(towers):
    """The config of a run on them."""
    quick = ["--config.optim.rule=adamw", "--config.eval.every=0"]  # less to compile
    wanted = config.load("adacm2:smoke", [f"--config.towers={towers / 'model'}", *quick])
    with wanted.unlocked():
        del wanted.model["vision_config"], wanted.model["text_config"]
    wanted.model.qformer_config.num_hidden_layers = 2
    parts = [{"to": name, "source": str(towers / "model"), "part": name} for name in ("vision", "text")]
    wanted.parts = (*parts, {"to": "qformer", "source": str(towers / "model"), "part": "bert", "new": NEW})
    wanted.stages[0].sources[0]["size"] = (56, 56)
    return wanted


@pytest.fixture(scope="module")
def adacm2(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adacm2") / "run"
    return folder, run(built_on(towers[0]), folder)[0]


def test_the_towers_learn(towers):
    folder, result = towers
    assert (result["step"], result["stopped"], result["skipped"]) == (4, None, 0)
    told = [line for line in lines(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in told] == [1, 2, 3, 4]
    for line in told:
        assert all(0 <= line[name] <= 1 for name in ("named", "told", "guessed")) and "accuracy" not in line
        assert line["tokens_per_s"] > 0 and line["grad_norm"] > 0
    assert told[-1]["loss"] < told[0]["loss"]
    assert set(result["evaluation"]) == {"loss", "accuracy", "answers", "best"} and result["evaluation"]["answers"]


def test_losses_as_by_hand(towers):
    """Of hidden words, and of a packed conversation about facts, which is as if it stood alone behind them."""
    module = convert.from_huggingface(towers[0] / "model")
    rng = np.random.default_rng(0)
    ids, hidden = rng.integers(5, 90, (2, 3, 7)).astype(np.int32), rng.random((2, 3, 7)) < 0.4
    ids[0, 1, 4:], hidden[0, 1, 4:], ids[1, 2], hidden[1, 2] = -1, False, -1, False  # padding, and no question at all
    total, count, right = jax.jit(losses.hidden_words, static_argnums=3)(module.bert, ids, hidden, 4)
    shown = np.where(hidden, 4, np.maximum(ids, 0)).reshape(6, 7)
    outputs, _ = jax.jit(lambda bert, *given: bert(*given))(module.bert, shown, ids.reshape(6, 7) >= 0)
    logits = np.asarray(outputs, np.float64) @ np.asarray(module.bert.words.embedding[...], np.float64).T
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.maximum(ids, 0).reshape(6, 7, 1), -1)[..., 0]
    hidden = hidden.reshape(6, 7)
    assert (float(count), float(right)) == (hidden.sum(), (logits.argmax(-1) == ids.reshape(6, 7))[hidden].sum())
    assert float(total) == pytest.approx(each[hidden].sum(), rel=1e-5)

    turns = [Turns((), (7, 8, 9, 10), (False, False, True, True)), Turns((), (11, 12, 13), (False, True, True))]
    packed = pack(turns, (5, 1, 1), 16, video_token=3)
    facts = rng.normal(size=(1, 5, FACT_WIDTH)).astype(np.float32)
    batch = {name: array[None] for name, array in packed.items()} | {"facts": facts}
    batch["positions"] = batch["positions"][..., :1]
    ours = np.asarray(jax.jit(losses.fact_tokens)(module, batch)[0])[0]

    @jax.jit
    def alone(module, ids):
        x = jnp.concatenate([module.told(facts), module.text.embed(ids[None])], axis=1)
        positions = jnp.arange(x.shape[1])[None, :, None]
        return module.text.logits(module.text(x, positions, jnp.ones(x.shape[:2], bool))[0])[0]

    for n, turn in enumerate(turns, 1):
        logits = np.asarray(alone(module, np.array(turn.ids)), np.float64)[5:-1]
        expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), turn.ids[1:]]
        np.testing.assert_allclose(ours[packed["groups"] == n][:-1], expected, atol=1e-4)


def test_the_towers_load_by_part(towers):
    folder = towers[0] / "model"
    whole = arrays(convert.from_huggingface(folder))
    for part, kind in (("vision", EvaViT), ("bert", Bert), ("text", Decoder)):
        module = convert.from_huggingface(folder, part=part)
        assert isinstance(module, kind)
        for path, array in arrays(module).items():
            np.testing.assert_array_equal(array, whole[f"{part}/{path}"])
    assert {file.name for file in folder.iterdir()} >= {"tokenizer.json", "qformer_tokenizer", "config.json"}


def test_what_is_built_on_them(towers, adacm2):
    """The towers stay to the bit; the Q-Former, which began as their BERT, its queries and all else learn."""
    have = arrays(convert.from_huggingface(towers[0] / "model"))
    after = arrays(convert.from_huggingface(adacm2[0] / "model"))
    for path, array in after.items():
        if path.startswith(("vision/", "text/")):
            np.testing.assert_array_equal(array, have[path], err_msg=path)
    began = arrays(models.build(built_on(towers[0]))[1])
    np.testing.assert_array_equal(began["qformer/words/embedding"], have["bert/words/embedding"])
    learned = {path for path in began if path.startswith(("qformer/", "query_tokens", "projection/", "frames/"))}
    still = {path for path in learned if np.array_equal(began[path], after[path])}
    # The last layer's words, which no query sees any more, and at most biases of keys, which no softmax feels.
    assert all(path.startswith("qformer/layers/01/mlp") or path.endswith("k/bias") for path in still), still


def test_the_model_loads(adacm2):
    model = lv.load(adacm2[0] / "model", lv.AdaCM2(alpha=0.5, beta=0.5))
    assert model.model.config.num_frames == 64 and not model.carry_queries
    video, stop = (model.tokenizer.convert_tokens_to_ids(token) for token in ("<|video_pad|>", "<|im_end|>"))
    assert (model.settings.video_token, model.settings.stop_tokens) == (video, (stop,))
    assert model.settings.size == (56, 56) and model.words("Which?")["input_ids"][0] == model.words.cls_token_id
    memory = model.begin("Which shape is red?")
    assert memory.places[0].tolist()[:5] == [0, 1, 2, 3, -1]  # the queries before all words, as they were trained


def test_stopped_and_taken_up_again(towers, adacm2, tmp_path):
    result, _ = run(built_on(towers[0]), tmp_path / "run", progress=press_once(at=1))
    assert result["stopped"] == "SIGINT" and result["step"] in (2, 3)
    result, _ = run(built_on(towers[0]), tmp_path / "run")
    assert result["stopped"] is None
    assert_same_run(tmp_path / "run", adacm2[0], step=4)


def known(folder) -> models.Model:
    """What is known of a model in a folder, as far as tasks look before they take batches."""
    source = convert.open_source(folder / "model")
    settings = convert.network_config(source)
    return models.Model(source.config, settings.text, settings.vision, None, (), settings=settings)


def test_tasks_that_do_not_fit_the_model(towers, adacm2):
    on_towers, blip = known(towers[0]), known(adacm2[0])
    wanted = config.load("adacm2:smoke")
    with pytest.raises(OptionError, match="the task 'instructed' needs an InstructBLIP; change the stage"):
        tasks.Curriculum(wanted, on_towers)
    for task in ("facts", "towers"):
        with pytest.raises(OptionError, match="'facts' and 'towers' need a model of type world_towers; change"):
            tasks.Curriculum(config.load("world_towers:smoke", [f"--config.stages[0].task={task}"]), blip)
    alone = config.load("world_towers:smoke")
    alone.stages[0].sources = alone.stages[0].sources[:1]
    with pytest.raises(OptionError, match="task 'towers' needs a source of moments and one of facts; change the stage"):
        tasks.Curriculum(alone, on_towers)
    how = config.plain(wanted.adacm2) | {"alpha": (0.5, 0.5)}
    with pytest.raises(OptionError, match="config.adacm2.alpha has 2 values, but 1 layers look at frames"):
        tasks.TASKS["instructed"].tokens(dataclasses.replace(blip, adacm2=how))
