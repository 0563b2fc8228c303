"""Repeated layers, as one stack that is scanned or as a tuple that is looped over."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


def layers(fn: Callable, stack, carry: Carry) -> Carry:
    """Runs carry = fn(layer, index, carry) over all layers.

    A stack (one module whose leaves have a leading layer axis) is scanned: small programs, one compile of the body. A
    tuple is unrolled, with a Python integer as index: on the CPU separate arrays decode several times as fast.
    """
    if isinstance(stack, tuple):
        for index, layer in enumerate(stack):
            carry = fn(layer, index, carry)
        return carry

    def body(carry, layer_and_index):
        return fn(*layer_and_index, carry), None

    return jax.lax.scan(body, carry, (stack, jnp.arange(depth(stack))))[0]


REMAT = ("none", "dots", "full")


def rematerialised(fn: Callable, remat: bool | str) -> Callable:
    """fn, whose activations are computed anew for its gradient instead of being kept.

    remat: "full" or True for all of them, "dots" for all but the results of matrix products, "none" or False for none.
    """
    if remat in (False, "none"):
        return fn
    return jax.checkpoint(
        fn, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    )


def depth(stack) -> int:
    """The number of layers in a stack or tuple."""
    return len(stack) if isinstance(stack, tuple) else jax.tree.leaves(stack)[0].shape[0]
