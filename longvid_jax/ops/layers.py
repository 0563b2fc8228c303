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


def depth(stack) -> int:
    """The number of layers in a stack or tuple."""
    return len(stack) if isinstance(stack, tuple) else jax.tree.leaves(stack)[0].shape[0]
