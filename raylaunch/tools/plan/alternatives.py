"""Find changes of settings that make a plan fit, the cheapest first.

Candidates are the plan with activation checkpointing, a smaller local batch, more sharding, tensor and pipeline parallel
and offloading, alone and combined. They are tried in the order of `COSTS`, which are rough estimates. A candidate that
changes the same settings as one that fits, and possibly others, is skipped. The global batch does not change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError
from raylaunch.tools.plan import memory
from raylaunch.tools.plan import sharding as shards
from raylaunch.tools.plan.model_shape import Shape
from raylaunch.tools.plan.sharding import PlannedWorld

ROOM = 0.92
"""Fraction of the GPU memory above which a plan is tight, because the allocator fragments memory."""
COSTS = {"selective": 1.05, "full": 4 / 3, "fsdp": 1.02, "hsdp": 1.01, "halved": 1.03, "tp": 1.10, "pp": 1.03,
         "cpu_offload": 1.8, "change": 1.005}  # fmt: skip
"""Rough factors on the time of a step for each change: for tp per doubling, for pp in addition to its bubbles."""
MOST = 3
SEVERAL = (2, 4, 8, 16)
"""Multiples of the nodes to try if no plan fits on the given ones."""


@dataclass(frozen=True)
class Fit:
    """A plan that fits: `changes` by dotted key, `total` bytes per GPU, `slower`: estimated slowdown (0.1: 10%)."""

    changes: dict[str, Any]
    total: int
    slower: float
    nodes: int


def fits(total: int, available: int) -> bool:
    return total <= ROOM * available


def search(
    config: Config, shape: Shape, where: PlannedWorld, available: int, *, on_gpu: bool, masked: bool = False
) -> list[Fit]:
    """Up to MOST plans that fit, the cheapest first; if none fits, one on more nodes, if any."""

    def tried(nodes: int, most: int) -> list[Fit]:
        found: list[Fit] = []
        tried_already: list[set[str]] = []
        for slower, changes in sorted(_candidates(config, where, on_gpu), key=lambda one: one[0]):
            if any(kinds <= changes.keys() for kinds in tried_already):
                continue
            total = _total(_changed(config, changes, where.batch), nodes)
            if total is not None and fits(total, available):
                pinned = config.step_scheduler.global_batch_size is None and changes
                more = {"step_scheduler.global_batch_size": where.batch} if pinned else {}
                found.append(Fit(changes | more, total, slower - 1, nodes))
                tried_already.append(set(changes))
                if len(found) == most:
                    break
        return found

    def _total(changed: Config | None, nodes: int) -> int | None:
        if changed is None:
            return None
        try:
            there = shards.place(changed, nodes, where.workers_per_node)
        except RaylaunchError:
            return None
        return memory.peak(changed, shape, there, on_gpu=on_gpu, masked=masked).total

    found = tried(where.nodes, MOST)
    if found or not tried(where.nodes * SEVERAL[-1], 1):
        return found
    return next(more for times in SEVERAL if (more := tried(where.nodes * times, 1)))


def _candidates(config: Config, where: PlannedWorld, on_gpu: bool) -> Iterator[tuple[float, dict[str, Any]]]:
    """(relative time of a step, changes)."""
    plan, local = config.distributed, config.step_scheduler.local_batch_size
    ours = config.model.hf is None
    order = ["none", "selective", "full"]
    recompute = order[order.index(plan.activation_checkpointing) :]
    if plan.ep_size > 1 and recompute[0] == "none":  # torch 2.13: `selective` fails around units of FSDP's in a block
        recompute.remove("selective")
    if not ours:  # transformers only supports full recomputation
        recompute = ["none", "full"] if recompute[0] == "none" else recompute[:1]
    sharding = ["ddp", "hsdp", "fsdp"][["ddp", "hsdp", "fsdp"].index(plan.strategy) :]
    halvings = sorted({0, 1, 2, local.bit_length() - 1} & set(range(local.bit_length())))
    tp = [size for size in (1, 2, 4, 8) if size == 1 or (ours and plan.tp_size * size <= where.workers_per_node)]
    pp = [size for size in (1, 2, 4, 8) if size == 1 or (ours and plan.pp_size * size <= where.nodes)]
    offload = [False, True] if on_gpu and not plan.cpu_offload else [False]
    for how, strategy, halved, t, p, off in itertools.product(recompute, sharding, halvings, tp, pp, offload):
        changes: dict[str, Any] = {}
        cost = 1.0
        if how != plan.activation_checkpointing:
            changes["distributed.activation_checkpointing"] = how
            cost *= COSTS[how]
        if strategy != plan.strategy:
            changes["distributed.strategy"] = strategy
            cost *= COSTS[strategy]
        if halved:
            changes["step_scheduler.local_batch_size"] = max(1, local >> halved)
            cost *= COSTS["halved"] ** halved
        if t > 1:
            changes["distributed.tp_size"] = plan.tp_size * t
            cost *= COSTS["tp"] ** math.log2(t)
        if p > 1:
            changes["distributed.pp_size"] = plan.pp_size * p
            cost *= COSTS["pp"] * (1 + (plan.pp_size * p - 1) / max(1, where.passes * p << halved))
        if off:
            changes["distributed.cpu_offload"] = True
            cost *= COSTS["cpu_offload"]
        if changes:
            yield cost * COSTS["change"] ** len(changes), changes


def _changed(config: Config, changes: dict[str, Any], batch: int) -> Config | None:
    """The configuration with these changes and the same global batch; None if the combination is invalid."""
    values = config.model_dump()
    values["step_scheduler"] |= {"global_batch_size": batch, "grad_acc_steps": None}
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    try:
        return Config.model_validate(values)
    except ValidationError:
        return None
