"""What is counted as right: whole answers, by tag, in batches whose answers are known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longvid_jax.data.batches import Batch, Example
from longvid_jax.errors import OptionError
from longvid_jax.models.layers import Linear
from longvid_jax.train import evaluation, tasks
from longvid_jax.train.config import base
from longvid_jax.train.state import init

# Groups of tokens in two rows: what is shared, then conversations; -1 is padding.
GROUPS = [[0, 0, 1, 1, 2, 2, 2, -1], [0, 1, 1, 1, 2, 2, 3, 3]]
WEIGHTS = [[0, 0, 0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1, 0, 0]]  # the third conversation of the second row has no video
RIGHT = [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 1, 1]]
TAGS = ("colour", "count"), ("count", "colour", "colour")


class Known:
    """The same batch each time."""

    def __len__(self):
        return 100

    def __getitem__(self, b):
        arrays = {"groups": np.array(GROUPS), "weights": np.array(WEIGHTS, np.float32), "right": np.array(RIGHT, bool)}
        examples = [
            Example(str(n), ((("q", "a"),),) * len(tags), 2, (28, 28), None, tags) for n, tags in enumerate(TAGS)
        ]
        return Batch(b, arrays, tuple(examples), {})


@pytest.fixture
def evaluate(monkeypatch):
    def tokens(_):
        return lambda module, batch: (2.0 * jnp.ones(batch["weights"].shape), batch["right"])

    monkeypatch.setitem(tasks.TASKS, "known", tasks.Task(lambda *_, **__: Known(), None, tokens))
    config = base()
    config.eval.batches, config.eval.task = 3, "known"
    structure, state = init(Linear(2, 2, bias=False, dtype=jnp.float32, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    made = evaluation.Evaluation(config, None, structure)
    return lambda: made(state)


def test_answers_are_right_to_the_last_token(evaluate):
    result = evaluate()
    # By row: colour right, count with one of two tokens wrong; count right, colour right, colour without a video.
    assert result["answers"] == {"colour": 1.0, "count": 0.5}
    assert result["best"] == 0.75
    assert result["loss"] == pytest.approx(2.0)
    assert result["accuracy"] == pytest.approx(5 / 6)


def test_answers_without_tags(evaluate, monkeypatch):
    plain = Known.__getitem__

    def untagged(self, b):
        batch = plain(self, b)
        return dataclasses.replace(batch, examples=tuple(dataclasses.replace(e, tags=()) for e in batch.examples))

    monkeypatch.setattr(Known, "__getitem__", untagged)
    assert evaluate()["answers"] == {"answers": 0.75}


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ("naming", "config.eval.task is 'naming', which has no answers to judge; name another."),
        ("answer", "the table of tasks has no 'answer', but 'answers'; known are"),
    ],
)
def test_a_task_that_cannot_be_judged(task, fault):
    config = base()
    config.eval.task = task
    with pytest.raises(OptionError, match=fault):
        evaluation.Evaluation(config, None, None)
