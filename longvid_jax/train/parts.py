"""A model put together: parts of it come from other checkpoints, the rest is new."""

from collections.abc import Mapping

import jax

from longvid_jax import convert
from longvid_jax.errors import CheckpointError, OptionError
from longvid_jax.models.paths import leaves
from longvid_jax.train.parameters import split

PART = {"to": "", "source": "", "part": "", "new": ()}


def checked(part: Mapping) -> dict:
    """An entry of config.parts with all its keys; OptionError where it lacks one, or has another."""
    for name in part:
        if name not in PART:
            raise OptionError(f"config.parts has the key {name!r}; known are {', '.join(PART)}.")
    part = {**PART, **part}
    if not part["to"]:
        raise OptionError("config.parts has an entry without `to`; give the part of the model that it is for.")
    if not part["source"]:
        raise OptionError(f"config.parts has no source for {part['to']}; give the checkpoint, as --config.towers=PATH.")
    return part


def take(module, part: Mapping, stacked: bool):
    """The module with its part `to` filled from the part `part` of the checkpoint `source`.

    Parameters of the same path within both parts are taken over, and must have the same shape. Of those that `to` has
    and the source has not, each must have one of `new` in its path within the part, as "/layers/04/"; biases among
    them become zeros (they add nothing), all else stays as it is. Raises CheckpointError and OptionError.
    """
    part = checked(part)
    weights, which = convert.open_weights(part["source"]), part["part"] or None
    kind = bool(stacked and part["to"].split("/")[0] != "qformer")
    source = convert.build(weights, convert.network_config(weights, which), stacked=kind, part=which)
    have = {leaf.path: leaf.value for leaf in leaves(source)}
    structure, params, _ = split(module)
    within = part["to"] + "/"
    mine = [path for path in params if path.startswith(within)]
    if not mine:
        names = dict.fromkeys(path.partition("/")[0] for path in params)
        raise OptionError(f"config.parts has the part {part['to']!r}, but this model has {', '.join(names)}.")
    for path in mine:
        name = path.removeprefix(within)
        if name in have:
            if have[name].shape != params[path].shape:
                raise CheckpointError(
                    f"{part['source']}: {name} has the shape {list(have[name].shape)}, but {path} of this model has "
                    f"{list(params[path].shape)}; take parts of one size."
                )
            # A copy: a part may be taken twice, and a training step deletes what it was given.
            params[path] = have[name].astype(params[path].dtype).copy()
        elif not any(piece in f"/{name}" for piece in part["new"]):
            raise CheckpointError(
                f"{part['source']} has no {name}, which this model needs as {path}; see config.parts."
            )
        elif name.endswith("/bias"):
            params[path] = jax.numpy.zeros_like(params[path])
    return structure.module(params)
