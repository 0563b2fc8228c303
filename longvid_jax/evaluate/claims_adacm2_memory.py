"""AdaCM2's first claim (arXiv 2411.12593, fig. 6): how much memory it takes to watch ever more frames."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from longvid_jax.evaluate.claims_adacm2 import GENERIC_PROMPT, Plan, cache_bytes
from longvid_jax.evaluate.compare import FAILS, HOLDS
from longvid_jax.evaluate.results import Results
from longvid_jax.memory.state import AdaCM2Memory
from longvid_jax.systems import adacm2_steps as steps
from longvid_jax.systems.adacm2 import AdaCM2, AdaCM2Model
from longvid_jax.video import Frames

FLAT_FROM, FLAT = 64, 0.02  # from so many frames on no more than this share of growth


def run(model: AdaCM2Model, plan: Plan, results: Results, progress: Callable[[str, int], None]) -> dict:
    """Bytes by frames watched, with and without eviction, of one video; plain values, ready for JSON.

    cache: keys and values. live: all arrays of the memory on the device. program: what the compiled step needs,
    arguments (weights of the Q-Former among them), outputs and temporaries, by its own account. peak: the device's,
    where it tells. With eviction all frames are watched; without, only the window that ends at each number, in a cache
    with room for what came before, until this exceeds the limit.
    """
    key = {
        "benchmark": "claims adacm2 memory",
        "frames": list(plan.frames),
        "limit": plan.limit,
        "alpha": plan.alpha,
        "beta": plan.beta,
    }
    have = results.get(key)
    if have is None:
        with_eviction = _with_method(model, AdaCM2(alpha=plan.alpha, beta=plan.beta, carry_queries=False))
        rows = [*_bounded(with_eviction, plan, progress), *_growing(_with_method(model, None), plan, progress)]
        have = results.put(key, {"device": jax.devices()[0].device_kind, "limit": plan.limit, "rows": rows})
    return {**have, **_claims(have["rows"])}


def _bounded(model: AdaCM2Model, plan: Plan, progress) -> list[dict]:
    rows, memory, window, start = [], model.begin(GENERIC_PROMPT), model.window, time.perf_counter()
    for frames in range(window, max(plan.frames) + 1, window):
        memory = model.watch(memory, _noise(plan, window))
        if frames in plan.frames:
            jax.block_until_ready(memory.outputs)
            seconds = time.perf_counter() - start
            rows.append({"evicting": True, "frames": frames, **_measured(model, memory), "seconds": seconds})
            progress(f"{frames} frames, evicting", 0)
            start = time.perf_counter()
    return rows


def _growing(model: AdaCM2Model, plan: Plan, progress) -> list[dict]:
    rows, window = [], model.window
    for frames in sorted(plan.frames):
        if cache_bytes(model, frames, plan.setup.size) > plan.limit:
            break
        before = np.array([frames - window])
        memory = dataclasses.replace(model.begin(GENERIC_PROMPT), frames=before, read=before)
        memory = model.watch(memory, _noise(plan, window))
        rows.append({"evicting": False, "frames": frames, **_measured(model, memory), "seconds": None})
        progress(f"{frames} frames, nothing evicted", 0)
    return rows


def _noise(plan: Plan, count: int) -> Frames:
    pixels = np.random.default_rng(0).integers(0, 256, (1, count, *plan.setup.size, 3), np.uint8)
    return Frames(pixels, np.zeros((1, count), np.float32), np.ones((1, count), bool))


def _measured(model: AdaCM2Model, memory: AdaCM2Memory) -> dict:
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "cache": memory.cache.keys.nbytes + memory.cache.values.nbytes,
        "live": sum(leaf.nbytes for leaf in jax.tree.leaves(memory) if isinstance(leaf, jax.Array)),
        "program": program_bytes(model, memory),
        "peak": stats.get("peak_bytes_in_use"),
    }


def program_bytes(model: AdaCM2Model, memory: AdaCM2Memory) -> int | None:
    """What the compiled step takes that brings a window of frames into this memory; None where it does not tell."""

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))

    batch, dtype = len(memory.read), model.model.query_tokens.dtype
    features = (batch, model.window, int(memory.grid.prod()) + 1, model.model.config.vision.width)
    compiled = steps.watch_window.lower(
        model.model,
        *jax.tree.map(like, (memory.cache, memory.outputs)),
        jax.ShapeDtypeStruct(features, dtype),
        like(memory.read),
        jax.ShapeDtypeStruct(features[:2], jnp.bool_),
        like(memory.instruction),
        None,
        policy=model.policy,
        carry_queries=model.carry_queries,
    ).compile()
    used = compiled.memory_analysis()
    if used is None:
        return None
    held = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return int(held + used.temp_size_in_bytes)


def _with_method(model: AdaCM2Model, method: AdaCM2 | None) -> AdaCM2Model:
    return type(model)(model.model, model.settings, method=method, tokenizer=model.tokenizer, words=model.words)


def _claims(rows: list[dict]) -> dict:
    """Whether memory stays as it is, and the share that it saves at the most frames that both could be measured at."""
    kinds = [name for name in ("cache", "live", "program") if all(row[name] is not None for row in rows)]
    here = [row for row in rows if row["evicting"] and row["frames"] >= FLAT_FROM]
    growth = {name: max(row[name] for row in here) / min(row[name] for row in here) - 1 for name in kinds if here}
    flat = None if not here else HOLDS if all(value <= FLAT for value in growth.values()) else FAILS
    saved = {}
    by_frames = {(row["evicting"], row["frames"]): row for row in rows}
    both = [frames for evicting, frames in by_frames if not evicting and (True, frames) in by_frames]
    if both:
        saved = {name: 1 - by_frames[True, both[-1]][name] / by_frames[False, both[-1]][name] for name in kinds}
    return {"growth": growth, "flat": flat, "saved": saved, "saved_at": both[-1] if both else None}
