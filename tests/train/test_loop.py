"""Whole runs of a tiny model on the made-up world: what they write, how they end, and how they go on."""

import os
import signal

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from longvid_jax import convert
from longvid_jax.checkpoint import Series
from longvid_jax.errors import LongvidError, TrainError
from longvid_jax.models.paths import leaves
from longvid_jax.train import loop
from tests.train.runs import lines, losses, run, smallest

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture(scope="module")
def whole(kept_programs, tmp_path_factory):
    """The folder of a run that was never stopped, and what it gave."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result, said = run(smallest(), folder)
    assert result["stopped"] is None and len(said) == 2, said
    return folder, result


def parameters(folder, step: int) -> dict[str, np.ndarray]:
    series = Series(folder / "checkpoints", keep_last=9, keep_best=9)
    return {name: np.asarray(value) for name, value in series.restore(step).items()}


def assert_same_run(folder, other, step=6):
    one, two = parameters(folder, step), parameters(other, step)
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert losses(folder) == losses(other)
    assert (folder / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()


def test_what_a_run_leaves(whole):
    folder, result = whole
    assert (result["step"], result["steps"], result["skipped"]) == (6, 6, 0)
    assert sorted(os.listdir(folder)) == sorted(
        ["checkpoints", "config.json", "metrics.jsonl", "model", *(file.name for file in folder.glob("events*"))]
    )
    # The last two, and the best of those that were judged: steps 3 and 6.
    assert {int(name) for name in os.listdir(folder / "checkpoints")} == {4, 6} | {result["best"]["step"]}
    for line in lines(folder / "metrics.jsonl"):
        if "eval" in line:
            assert line["step"] in (3, 6) and set(line["eval"]) == {"loss", "accuracy", "answers", "best"}
        else:
            assert line["steps"] == 1 and 0 <= line["data_wait"] <= 1
            assert all(line[f"{what}_per_s"] > 0 for what in ("examples", "tokens", "frames"))
            assert line["mfu"] > 0 and line["memory_bytes"] > 0 and line["grad_norm"] > 0
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]


def test_tensorboard_has_the_same(whole):
    folder, _ = whole
    (file,) = folder.glob("events*")
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):  # records: length 8, its checksum 4, the event, its checksum 4
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += 16 + length
    for step, loss in losses(folder).items():
        assert found[step, "loss"] == pytest.approx(loss)
    assert (6, "eval/best") in found


def test_the_model_is_that_of_the_best_checkpoint(whole):
    from transformers import AutoTokenizer

    folder, result = whole
    model = convert.from_huggingface(folder / "model", stacked=True)
    expected = parameters(folder, result["best"]["step"])
    for leaf in leaves(model):
        np.testing.assert_array_equal(leaf.value, expected[f"trainable/{leaf.path}"], err_msg=leaf.path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert (
        tokenizer.convert_tokens_to_ids("<|video_pad|>")
        == convert.open_source(folder / "model").config["video_token_id"]
    )
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": []}], tokenize=False)


def test_a_finished_run_stays_as_it_is(whole):
    folder, result = whole
    before = {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")}
    again, said = run(smallest(), folder)
    assert said == [] and again["model"] == result["model"] and again["best"] == result["best"]
    assert {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")} == before


def press_once(at: int | None = None):
    """A progress that presses Ctrl-C after a step, by default the first that it hears of."""
    pressed = []

    def progress(step, *_):
        if not pressed and at in (None, step):
            pressed.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def test_stopped_after_any_step_and_taken_up_again(whole, tmp_path):
    """Each part of the run is told to stop once its first step is done: at saves, at evaluations and between them."""
    before = signal.getsignal(signal.SIGINT)
    steps, result = [], {"stopped": "SIGINT"}
    while result["stopped"]:
        result, _ = run(smallest(), tmp_path / "run", progress=press_once())
        assert signal.getsignal(signal.SIGINT) is before
        steps.append(result["step"])
        assert steps == sorted(set(steps)), steps
    assert steps == [2, 3, 4, 6]
    assert_same_run(tmp_path / "run", whole[0])


def test_a_second_ctrl_c_acts_at_once(tmp_path):
    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(smallest(), tmp_path / "run", progress=press)


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path):
    result, _ = run(smallest(), tmp_path / "run", progress=press_once(at=4))
    last = tmp_path / "run" / "checkpoints" / str(result["step"])
    for file in last.rglob("*.ocdbt"):
        file.write_bytes(b"damaged")
    _, said = run(smallest(), tmp_path / "run")
    assert f"the checkpoint of step {result['step']} cannot be read" in said[0] and len(said) == 2
    assert sorted(os.listdir(last.parent)) == sorted(os.listdir(whole[0] / "checkpoints"))
    assert_same_run(tmp_path / "run", whole[0])


def test_a_loss_that_is_not_finite(tmp_path):
    config = smallest("--config.optim.lr=1e30", "--config.save.every=1", "--config.optim.clip=1e30")
    with pytest.raises(TrainError, match=r"step \d has the loss .*clear/train/\d+, .*last good checkpoint is .* step"):
        run(config, tmp_path / "run")
    step = max(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
    assert all(np.isfinite(value).all() for value in parameters(tmp_path / "run", step).values())
    assert not parameters(tmp_path / "run", step)["halted"]


def test_a_trace_of_some_steps(whole, tmp_path):
    run(smallest("--config.profile_steps=1:3"), tmp_path / "run")
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert b"optimizer" in trace.read_bytes()
    assert_same_run(tmp_path / "run", whole[0])


def test_spread_over_a_mesh(whole, tmp_path):
    from longvid_jax.scale.mesh import make_mesh

    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    config = smallest("--config.eval.every=0")
    run(config, tmp_path / "run", mesh=mesh, progress=press_once())
    result, _ = run(config, tmp_path / "run", mesh=mesh)
    assert result["model"]
    assert losses(tmp_path / "run") == pytest.approx(losses(whole[0]), rel=1e-4)


def test_memory_that_is_not_enough():
    with pytest.raises(TrainError, match="memory is not enough; lower batch_size"), loop._memory():
        jax.numpy.zeros(1 << 60)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["--config.optim.lr=0.5"], "another config, which differs in optim.lr; give another"),
        (
            ["--config.stages[0].sources[0].count=5", "--config.seed=1"],
            r"differs in seed, stages\[0\].sources\[0\].count",
        ),
    ],
)
def test_a_folder_of_another_config(whole, overrides, fault):
    with pytest.raises(TrainError, match=fault):
        run(smallest(*overrides), whole[0])


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(TrainError, match="is not empty and no training's folder"):
        run(smallest(), tmp_path)
    with pytest.raises(LongvidError, match=r"letter.txt .*another"):
        run(smallest(), tmp_path / "letter.txt")
    with pytest.raises(LongvidError, match=r"cannot be written .*give another"):
        run(smallest(), tmp_path / "letter.txt" / "run")
