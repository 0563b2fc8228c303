"""The device mesh that everything is sharded over."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from longvid_jax.errors import OptionError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    *, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes (data, fsdp, context, tensor); one of them may be -1: whatever devices are left.

    The batch is split over data and fsdp, parameters over fsdp and tensor, heads and kv caches over tensor.
    """
    shape = [data, fsdp, context, tensor]
    devices = jax.devices() if devices is None else list(devices)
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
        raise OptionError(
            f"The mesh {dict(zip(AXES, shape, strict=True))} needs positive sizes, at most one of them -1."
        )
    shape = [len(devices) // known if size == -1 else size for size in shape]
    if int(np.prod(shape)) != len(devices):
        raise OptionError(
            f"The mesh {dict(zip(AXES, shape, strict=True))} has {int(np.prod(shape))} places for "
            f"{len(devices)} devices."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
