"""What a step computes, counted from its program, beside what the devices could do."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

# The most bfloat16 products and sums a second of one device, by the beginning of its device_kind, as its maker says.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
}


def count(jaxpr) -> float:
    """Floating-point operations of all matrix products of a jaxpr, a scan's body as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * inner * np.prod(equation.outvars[0].aval.shape)
            continue
        inside = [count(sub) for value in equation.params.values() for sub in _jaxprs(value)]
        if equation.primitive.name == "cond":
            total += max(inside)
        else:
            total += sum(inside) * equation.params.get("length", 1)
    return total


def _jaxprs(value):
    for one in value if isinstance(value, tuple | list) else (value,):
        one = getattr(one, "jaxpr", one)
        if hasattr(one, "eqns"):
            yield one


@functools.cache
def peak(dtype: str = "float32") -> float | None:
    """Of all devices together, a second; on CPUs what a large product of this dtype reaches; None if not known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured(dtype)  # virtual devices of one CPU share it
    fitting = [kind for kind in PEAKS if device.device_kind.startswith(kind)]
    return PEAKS[max(fitting, key=len)] * jax.device_count() if fitting else None


def _measured(dtype: str, size: int = 1024, turns: int = 3) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    seconds = []
    for _ in range(turns + 1):  # the first compiles
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
