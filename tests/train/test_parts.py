"""Models put together: what is taken from where, and what does not fit."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from longvid_jax import convert
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models.instructblip import InstructBlip, InstructBlipConfig
from longvid_jax.models.paths import leaves
from longvid_jax.models.towers import Towers, TowersConfig
from longvid_jax.train import config, models
from longvid_jax.train.parts import take

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 28, "patch_size": 14}
READER = SIZES | {"num_hidden_layers": 1, "vocab_size": 9, "max_position_embeddings": 8}
TEXT = SIZES | {"model_type": "llama", "vocab_size": 20, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
TOWERS = {
    "model_type": "world_towers",
    "vision_config": VISION,
    "bert_config": READER | {"model_type": "bert"},
    "text_config": TEXT,
    "fact_width": 5,
}
MODEL = {
    "model_type": "instructblip",
    "num_query_tokens": 3,
    "vision_config": VISION,
    "qformer_config": READER | {"num_hidden_layers": 2},
    "text_config": TEXT,
}
NEW = ("/cross", "/query_mlp", "/layers/01/")  # what a BERT of one layer does not have


def made(network, settings, seed: int, stacked: bool = True):
    """Random, its biases too."""
    abstract = jax.eval_shape(lambda: network(settings, stacked=stacked, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 1, x.shape), x.dtype), abstract)


def arrays(module) -> dict[str, np.ndarray]:
    """By canonical path."""
    found = {}
    for leaf in leaves(module):
        parts = leaf.value if leaf.stacked else [leaf.value]
        found |= {path: np.asarray(part) for path, part in zip(leaf.part_paths, parts, strict=True)}
    return found


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers") / "model"
    module = made(Towers, TowersConfig.from_huggingface(TOWERS), 1)
    convert.save_huggingface(module, TOWERS, folder, convert.table_for(TOWERS))
    return folder, arrays(module)


def blip(stacked: bool = True, changes=None):
    return made(InstructBlip, InstructBlipConfig.from_huggingface(MODEL | (changes or {})), 2, stacked)


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stack"])
def test_what_is_taken(towers, stacked):
    folder, have = towers
    before = blip(stacked)
    module = before
    for to, part, new in (("vision", "vision", ()), ("text", "text", ()), ("qformer", "bert", NEW)):
        module = take(module, {"to": to, "source": str(folder), "part": part, "new": new}, stacked)
    assert jax.tree.structure(module) == jax.tree.structure(before)
    before, after, taken = arrays(before), arrays(module), 0
    for path, array in after.items():
        theirs = path.replace("qformer/", "bert/")
        if theirs in have:
            np.testing.assert_array_equal(array, have[theirs], err_msg=path)
            taken += 1
        elif path.startswith("qformer/") and path.endswith("/bias"):
            assert not array.any(), path
        else:
            np.testing.assert_array_equal(array, before[path], err_msg=path)
            assert path.startswith(("qformer/", "query_tokens", "projection/")), path
    assert taken == sum(not path.startswith(("facts", "bert/types", "bert/pooler")) for path in have)


def test_of_a_checkpoint_that_is_the_part(towers, tmp_path):
    """part: "" is all of it; and of a checkpoint with another language model a part does."""
    folder, have = towers
    bert = TOWERS["bert_config"]
    module = convert.from_huggingface(folder, part="bert")
    convert.save_huggingface(module, bert, tmp_path / "bert", convert.table_for(bert))
    after = arrays(take(blip(), {"to": "qformer", "source": str(tmp_path / "bert"), "new": NEW}, True))
    np.testing.assert_array_equal(after["qformer/words/embedding"], have["bert/words/embedding"])

    convert.save_huggingface(blip(), MODEL, tmp_path / "blip", convert.table_for(MODEL))
    file = tmp_path / "blip" / "config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"text_config": {"model_type": "opt"}}))
    part = {"to": "vision", "source": str(tmp_path / "blip"), "part": "vision"}
    after = arrays(take(made(Towers, TowersConfig.from_huggingface(TOWERS), 3), part, True))
    np.testing.assert_array_equal(after["vision/class_embedding"], arrays(blip())["vision/class_embedding"])


def test_no_two_parameters_share_a_buffer(towers):
    """A training step deletes the arrays that it was given."""
    module, part = blip(), {"to": "vision", "source": str(towers[0]), "part": "vision"}
    once = take(module, part, True)
    twice = take(once, part, True)
    pointers = [leaf.value.unsafe_buffer_pointer() for leaf in leaves(twice)]
    assert len(set(pointers)) == len(pointers)
    for leaf in leaves(twice):
        if leaf.path.startswith("vision"):
            leaf.value.delete()
    assert all(np.isfinite(array).all() for array in arrays(once).values())


@pytest.mark.parametrize(
    ("part", "error", "fault"),
    [
        ({"form": "vision"}, OptionError, "config.parts has the key 'form'; known are to, source, part, new"),
        ({"to": ""}, OptionError, "config.parts has an entry without `to`"),
        (
            {"source": ""},
            OptionError,
            "config.parts has no source for vision; give the checkpoint, as --config.towers=",
        ),
        ({"to": "visoin"}, OptionError, "has the part 'visoin', but this model has projection, qformer, "),
        ({"part": "eyes"}, CheckpointError, "has no part 'eyes'"),
        ({"source": "/nowhere"}, CheckpointError, "/nowhere is neither a folder that exists nor"),
        (
            {"to": "qformer", "part": "bert", "new": NEW[1:]},
            CheckpointError,
            "has no layers/00/cross.* needs as qformer/",
        ),
        ({"to": "qformer", "part": "bert"}, CheckpointError, "has no layers/00/.*; see config.parts"),
        ({"part": "bert"}, CheckpointError, "has no blocks/.*, which this model needs as vision/blocks/"),
    ],
)
def test_what_does_not_fit(towers, part, error, fault):
    part = {"to": "vision", "source": str(towers[0]), "part": "vision"} | part
    with pytest.raises(error, match=fault) as caught:
        take(blip(), part, True)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_shapes_that_do_not_fit(towers):
    wide = blip(changes={"vision_config": VISION | {"intermediate_size": 32}})
    part = {"to": "vision", "source": str(towers[0]), "part": "vision"}
    with pytest.raises(CheckpointError, match=r"mlp/fc1/.* has the shape \[2, 24\].* has \[2, 32\]; take parts of one"):
        take(wide, part, True)


def settings(towers, **changes):
    values = {name: MODEL[name] for name in ("model_type", "num_query_tokens", "qformer_config")}
    values["qformer_config"] = {name: v for name, v in values["qformer_config"].items() if name != "vocab_size"}
    parts = [{"to": name, "source": str(towers), "part": name} for name in ("vision", "text")]
    parts += [{"to": "qformer", "source": str(towers), "part": "bert", "new": NEW}]
    stage = {"steps": 1, "task": "instructed"}
    return config.resolve({"model": values, "parts": tuple(parts), "stages": (stage,), **changes})


@pytest.fixture(scope="module")
def world_towers(tmp_path_factory):
    """Towers with the vocabularies of the world's tokenizers."""
    from longvid_jax.data.tokenizer import bert_tokenizer, world_tokenizer

    folder = tmp_path_factory.mktemp("world") / "model"
    about = TOWERS | {
        "bert_config": TOWERS["bert_config"] | {"vocab_size": len(bert_tokenizer())},
        "text_config": TEXT | {"vocab_size": len(world_tokenizer())},
    }
    module = made(Towers, TowersConfig.from_huggingface(about), 4)
    convert.save_huggingface(module, about, folder, convert.table_for(about))
    return folder, about, arrays(module)


@pytest.fixture(scope="module")
def built(world_towers):
    """What models.build makes of them."""
    return models.build(settings(world_towers[0], frame_positions={"count": 6, "initial": "waves"}))


def test_sizes_are_those_of_the_source(world_towers, built):
    _, about, have = world_towers
    model, module = built
    for name in ("vision_config", "text_config"):
        assert about[name].items() <= model.config[name].items()
    assert (model.vision.image_size, model.text.width, model.settings.num_frames) == (28, 16, 6)
    assert model.config["num_frame_positions"] == 6 and model.config["carry_queries"] is False
    after = arrays(module)
    for path in ("vision/blocks/01/mlp/fc1/kernel", "text/embed/embedding"):
        np.testing.assert_array_equal(after[path], have[path])
    np.testing.assert_array_equal(after["qformer/words/embedding"], have["bert/words/embedding"])
    angle = 2 * np.pi * np.arange(6) / 4  # the shortest period is four frames
    np.testing.assert_allclose(after["frames/embedding"][:, 0], np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(after["frames/embedding"][:, 8], np.cos(angle), atol=1e-6)


def test_sizes_that_are_nowhere(world_towers):
    with pytest.raises(OptionError, match="config.model has no text_config; give it, or take the part 'text'"):
        models.build(settings(world_towers[0], parts=()))
    with pytest.raises(
        OptionError, match="config.parts has no source for vision; give the checkpoint, as --config.tow"
    ):
        models.build(config.load("adacm2:tiny"))
    with pytest.raises(CheckpointError, match="/nowhere is neither"):
        models.build(config.load("adacm2:tiny", ["--config.towers=/nowhere"]))


def test_spread_over_a_mesh(world_towers, built):
    from longvid_jax.scale.mesh import make_mesh

    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    _, spread = models.build(settings(world_towers[0], frame_positions={"count": 6, "initial": "waves"}), mesh)
    assert all(len(leaf.value.sharding.device_set) == 2 for leaf in leaves(spread))
    after = arrays(spread)
    for path, array in arrays(built[1]).items():
        np.testing.assert_allclose(after[path], array, atol=1e-6, err_msg=path)
