"""The one helper that states how an intermediate array lies on the mesh (axes: data, fsdp, context, tensor)."""

import jax
from jax.sharding import PartitionSpec

BATCH = ("data", "fsdp")


def constrain(x: jax.Array, *axes) -> jax.Array:
    """x with its dimensions spread over the named mesh axes, where a mesh is set (jax.set_mesh); else x itself.

    An axis that does not divide its dimension is left out: that dimension is then replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, divisible(mesh, PartitionSpec(*axes), x.shape))


def divisible(mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """spec without the mesh axes that the mesh lacks or that do not divide their dimension of shape."""
    kept = []
    for size, names in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        chosen, ways = [], 1
        for name in (names,) if isinstance(names, str) else names or ():
            if name in mesh.shape and size % (ways * mesh.shape[name]) == 0:
                chosen.append(name)
                ways *= mesh.shape[name]
        kept.append(tuple(chosen) if len(chosen) > 1 else (chosen[0] if chosen else None))
    return PartitionSpec(*kept)
