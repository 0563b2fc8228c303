"""Compiling the steps of a system ahead of time, for a TPU that is not there."""

import dataclasses
import os
import re
from collections import Counter

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longvid_jax.convert.settings import CLIP_MEAN, CLIP_STD
from longvid_jax.errors import OptionError
from longvid_jax.models.paths import leaves
from longvid_jax.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
from longvid_jax.models.sharding import parameter_sharding
from longvid_jax.ops.kv_cache import KVCache
from longvid_jax.ops.sharding import BATCH, divisible
from longvid_jax.scale.mesh import make_mesh
from longvid_jax.systems import retake_steps as steps

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

    def array(shape, dtype=jnp.int32, *axes):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, divisible(mesh, PartitionSpec(*axes), shape))
        )

    with jax.set_mesh(mesh):
        model = abstract_parameters(config, mesh, dtype)
        shapes = jax.eval_shape(lambda: steps.new_cache(model, batch=batch, capacity=capacity))
        cache: KVCache = jax.tree.map(lambda x: array(x.shape, x.dtype), shapes)
        spread = (None, BATCH, "tensor")
        cache = dataclasses.replace(
            cache,
            keys=array(shapes.keys.shape, shapes.keys.dtype, *spread),
            values=array(shapes.values.shape, shapes.values.dtype, *spread),
            positions=array(shapes.positions.shape, jnp.int32, None, BATCH),
            source=array(shapes.source.shape, jnp.int32, None, BATCH),
        )
        row = array((batch,))
        pixels = array((batch, chunk_patches * vision.temporal, grid[0] * side, grid[1] * side, 3), jnp.uint8, BATCH)
        features = array((batch, chunk_patches, tokens, text.width), dtype, BATCH)
        peak = array((batch, chunk_patches, tokens), jnp.bool_)
        key = jax.eval_shape(lambda: jax.random.key(0))
        patches = (grid[0] * vision.merge, grid[1] * vision.merge)
        lowered = {
            "encode": steps.encode_frames.lower(model, pixels, grid=patches, mean=CLIP_MEAN, std=CLIP_STD),
            "read": steps.read_chunk.lower(
                model, cache, features, peak, row, row, row, row, None, grid=grid, static=static
            ),
            "write": steps.write_answer.lower(
                model,
                cache,
                array((batch, text.vocab_size), jnp.float32),
                row,
                array((1,)),
                jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
                None,
                array((), jnp.float32),
                static=static,
                max_new_tokens=new_tokens,
                keep_logits=False,
            ),
        }
        return {name: step.compile() for name, step in lowered.items()}


def abstract_parameters(config: Qwen2VLConfig, mesh: Mesh, dtype) -> Qwen2VL:
    """The model's parameters as shapes with their places on the mesh."""
    model = jax.eval_shape(lambda: Qwen2VL(config, dtype=dtype, stacked=True, rngs=nnx.Rngs(0)))
    placed = [
        jax.ShapeDtypeStruct(leaf.value.shape, dtype, sharding=parameter_sharding(mesh, leaf.path, leaf.value.shape))
        for leaf in leaves(model)
    ]
    return jax.tree.unflatten(jax.tree.structure(model), placed)


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
