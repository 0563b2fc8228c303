"""Ways to do a thing, timed in turns, so that what else the machine does hits all of them."""

import statistics
import time
from collections.abc import Callable


def turns(ways: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Seconds of each way, the median of turns; the first, which compiles, does not count."""
    for way in ways.values():
        way()
    took = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    return {name: statistics.median(turn[name] for turn in took) for name in ways}


def seconds(way: Callable) -> float:
    """That one run takes."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start
