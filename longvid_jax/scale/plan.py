"""Compiling the steps of a system ahead of time, for a TPU that is not there."""

import dataclasses
import os
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longvid_jax.convert.settings import CLIP_MEAN, CLIP_STD
from longvid_jax.errors import OptionError
from longvid_jax.memory import adacm2
from longvid_jax.models.instructblip import InstructBlip, InstructBlipConfig
from longvid_jax.models.paths import leaves
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
from longvid_jax.models.rewind import Rewind, RewindConfig
from longvid_jax.models.sharding import parameter_sharding
from longvid_jax.ops.kv_cache import KVCache
from longvid_jax.ops.sharding import BATCH, divisible
from longvid_jax.scale.mesh import make_mesh
from longvid_jax.systems import adacm2_steps, rewind_steps, text_steps
from longvid_jax.systems import retake_steps as steps
from longvid_jax.systems.rewind import ReWind

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one compiled step needs of each device."""

    argument_bytes: int  # parameters, caches and inputs
    temporary_bytes: int
    output_bytes: int  # beyond what is updated in place
    collectives: dict[str, int]  # how many of each kind stand in the program (one in a loop's body counts once)


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh over the devices of a described TPU slice such as "v5e:2x4"; needs libtpu (the extra `tpu`), no TPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        raise OptionError(
            f"The TPU topology {topology!r} cannot be described ({error}); give one like v5e:2x4, and install libtpu."
        ) from error
    return make_mesh(**axes, devices=described.devices)


def compile_retake(
    config: Qwen2VLConfig,
    mesh: Mesh,
    *,
    batch: int,
    grid: tuple[int, int],
    capacity: int,
    chunk_patches: int = 16,
    new_tokens: int = 16,
    static: steps.Static | None = None,
    dtype=jnp.bfloat16,
) -> dict[str, jax.stages.Compiled]:
    """ReTaKe's steps compiled for a mesh: "encode" a window, "read" it (the prefill step), "write" an answer (decode).

    grid is (rows, columns) of tokens in a temporal patch, capacity the tokens a row's cache holds.
    """
    static = static or steps.Static(compress=True, dpselect="patch", reforge=True)
    vision, text = config.vision, config.text
    tokens, side = grid[0] * grid[1], vision.patch * vision.merge
    array = partial(_array, mesh)
    with jax.set_mesh(mesh):
        model = abstract_parameters(Qwen2VL, config, mesh, dtype)
        cache = _spread(mesh, jax.eval_shape(lambda: text_steps.new_cache(model.text, batch=batch, capacity=capacity)))
        row = array((batch,))
        pixels = array((batch, chunk_patches * vision.temporal, grid[0] * side, grid[1] * side, 3), jnp.uint8, BATCH)
        features = array((batch, chunk_patches, tokens, text.width), dtype, BATCH)
        peak = array((batch, chunk_patches, tokens), jnp.bool_)
        patches = (grid[0] * vision.merge, grid[1] * vision.merge)
        lowered = {
            "encode": steps.encode_frames.lower(model, pixels, grid=patches, mean=CLIP_MEAN, std=CLIP_STD),
            "read": steps.read_chunk.lower(
                model, cache, features, peak, row, row, row, row, None, grid=grid, static=static
            ),
            "write": _writing(
                partial(steps.write_answer.lower, model, static=static), cache, mesh, batch, text.vocab_size, new_tokens
            ),
        }
        return {name: step.compile() for name, step in lowered.items()}


def compile_adacm2(
    config: InstructBlipConfig,
    mesh: Mesh,
    *,
    batch: int,
    policy: adacm2.Policy,
    carry_queries: bool = False,
    frames: int = 16,
    words: int = 32,
    prompt: int = 64,
    new_tokens: int = 16,
    dtype=jnp.bfloat16,
) -> dict[str, jax.stages.Compiled]:
    """AdaCM2's steps compiled for a mesh: "encode" a window, "watch" it, "read" a prompt and "write" an answer.

    frames are those of a window, words and prompt the tokens of the instruction and of what the decoder reads.
    """
    side = config.vision.image_size
    tokens = config.vision.side**2 + 1
    capacity = max(adacm2.largest(tokens, *shares) for shares in zip(policy.alpha, policy.beta, strict=True))
    array = partial(_array, mesh)
    with jax.set_mesh(mesh):
        model = abstract_parameters(InstructBlip, config, mesh, dtype)
        shapes = jax.eval_shape(lambda: adacm2_steps.new_memory(model, batch=batch, capacity=capacity))
        cache = jax.tree.map(lambda x: array(x.shape, x.dtype, None, BATCH), shapes[0])
        outputs = array(shapes[1].shape, dtype)
        pixels = array((batch, frames, side, side, 3), jnp.uint8, BATCH)
        features = array((batch, frames, tokens, config.vision.width), dtype, BATCH)
        watch = adacm2_steps.watch_window.lower(
            model,
            cache,
            outputs,
            features,
            array((batch,)),
            array((batch, frames), jnp.bool_),
            array((batch, words)) if config.qformer.words else None,
            _key(mesh) if policy.scores == "random" else None,
            policy=policy,
            carry_queries=carry_queries,
        )
        encode = adacm2_steps.encode_frames.lower(model, pixels, mean=CLIP_MEAN, std=CLIP_STD)
        answering = _answering(model.text, mesh, batch, prompt, config.num_queries, new_tokens, dtype)
        lowered = {"encode": encode, "watch": watch, **answering}
        return {name: step.compile() for name, step in lowered.items()}


def compile_rewind(
    config: RewindConfig,
    mesh: Mesh,
    *,
    batch: int,
    capacity: int,
    method: ReWind | None = None,
    frames: int = 16,
    words: int = 32,
    prompt: int = 64,
    new_tokens: int = 16,
    dtype=jnp.bfloat16,
) -> dict[str, jax.stages.Compiled]:
    """ReWind's steps compiled for a mesh: "encode" and "watch" a window, "look" back, "tell", "read" and "write".

    capacity: frames that the memory has room for. frames, words and prompt: as for compile_adacm2, the prompt without
    what is told of the video.
    """
    method, side, tower = method or ReWind(), config.vision.image_size, config.vision
    array = partial(_array, mesh)
    with jax.set_mesh(mesh):
        model = abstract_parameters(Rewind, config, mesh, dtype)
        shapes = jax.eval_shape(lambda: rewind_steps.new_memory(model, batch=batch, capacity=capacity))
        memory = jax.tree.map(lambda x: array(x.shape, x.dtype, BATCH), shapes)
        keys = array(shapes.keys.shape, dtype, BATCH, "tensor")
        memory = dataclasses.replace(memory, keys=keys, values=keys)
        detail = (config.detail_tokens, tower.width)
        pixels = array((batch, frames, side, side, 3), jnp.uint8, BATCH)
        features = array((batch, frames, tower.side**2, tower.width), dtype, BATCH)
        text = array((batch, words))
        watch = rewind_steps.watch_window.lower(
            model,
            memory,
            array((batch, capacity, *detail), rewind_steps.DETAIL, BATCH),
            features,
            array((batch, frames, *detail), rewind_steps.DETAIL, BATCH),
            array(()),
            array((batch, frames), jnp.bool_),
            text,
            clip_frames=method.clip_frames,
        )
        look = rewind_steps.look_back.lower(
            model,
            memory,
            text,
            num_candidates=method.num_candidates,
            num_select=method.num_selected,
            num_neighbors=method.num_neighbors,
        )
        selected = array((batch, method.num_selected, *detail), rewind_steps.DETAIL, BATCH)
        told = capacity * config.perceiver.num_write + 1 + method.num_selected * config.detail_tokens
        lowered = {
            "encode": rewind_steps.encode_frames.lower(model, pixels, mean=CLIP_MEAN, std=CLIP_STD),
            "watch": watch,
            "look": look,
            "tell": rewind_steps.tell.lower(model, memory, selected),
            **_answering(model.text, mesh, batch, told + prompt, told, new_tokens, dtype),
        }
        return {name: step.compile() for name, step in lowered.items()}


def _answering(decoder, mesh: Mesh, batch: int, prompt: int, vectors: int, new_tokens: int, dtype) -> dict:
    """Lowered: "read" a prompt of so many tokens, vectors for some of them, and "write" an answer."""
    array, config = partial(_array, mesh), decoder.config
    cache = _spread(mesh, jax.eval_shape(lambda: decoder.empty_cache(batch, prompt + new_tokens)))
    ids = array((batch, prompt))
    read = text_steps.read_prompt.lower(decoder, cache, ids, ids, array((batch, vectors, config.width), dtype))
    lower = partial(text_steps.write_answer.lower, decoder)
    return {"read": read, "write": _writing(lower, cache, mesh, batch, config.vocab_size, new_tokens)}


def _writing(lower, cache, mesh: Mesh, batch: int, words: int, new_tokens: int):
    """Lowered: greedy decoding of a batch's answers, of a vocabulary of so many words."""
    array = partial(_array, mesh)
    logits, temperature = array((batch, words), jnp.float32), array((), jnp.float32)
    row, end = array((batch,)), array((1,))
    return lower(cache, logits, row, end, _key(mesh), None, temperature, max_new_tokens=new_tokens, keep_logits=False)


def abstract_parameters(network, config, mesh: Mesh, dtype):
    """A model's parameters as shapes with their places on the mesh; network: its class, such as Qwen2VL."""
    model = jax.eval_shape(lambda: network(config, dtype=dtype, stacked=True, rngs=nnx.Rngs(0)))
    placed = [
        jax.ShapeDtypeStruct(leaf.value.shape, dtype, sharding=parameter_sharding(mesh, leaf.path, leaf.value.shape))
        for leaf in leaves(model)
    ]
    return jax.tree.unflatten(jax.tree.structure(model), placed)


def _array(mesh: Mesh, shape: tuple[int, ...], dtype=jnp.int32, *axes) -> jax.ShapeDtypeStruct:
    """An array that is not there, with its dimensions on axes of the mesh."""
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, divisible(mesh, PartitionSpec(*axes), shape))
    )


def _spread(mesh: Mesh, shapes: KVCache) -> KVCache:
    """A decoder's cache of stacked layers as it lies on a mesh."""
    cache = jax.tree.map(lambda x: _array(mesh, x.shape, x.dtype), shapes)
    spread = (None, BATCH, "tensor")
    return dataclasses.replace(
        cache,
        keys=_array(mesh, shapes.keys.shape, shapes.keys.dtype, *spread),
        values=_array(mesh, shapes.values.shape, shapes.values.dtype, *spread),
        positions=_array(mesh, shapes.positions.shape, jnp.int32, None, BATCH),
        source=_array(mesh, shapes.source.shape, jnp.int32, None, BATCH),
    )


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A random key."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def summary(compiled: jax.stages.Compiled) -> Plan:
    """What a compiled step needs."""
    memory = compiled.memory_analysis()
    names = re.findall(rf"= \S+ ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
    return Plan(
        argument_bytes=int(memory.argument_size_in_bytes),
        temporary_bytes=int(memory.temp_size_in_bytes),
        output_bytes=int(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        collectives=dict(Counter(names)),
    )
