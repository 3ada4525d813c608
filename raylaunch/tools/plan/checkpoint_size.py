"""Checkpoints: their size, the time of a save, and the optimal interval.

The interval is Young's and Daly's: frequent saves cost time, rare saves lose more work at each failure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raylaunch.config.schema import Config
from raylaunch.tools.plan.model_shape import Shape

BANDWIDTH = 2e9
"""Bytes per second that all workers together write to a shared file system; an assumption."""
COPYING = 1e10
"""Bytes per second that a worker copies to host memory for an asynchronous save; an assumption."""
FAILURES = 6.5e-3 / 24
"""Failures per node and hour: 6.50 per thousand node-days, as on Meta's RSC-1 cluster (Kokolis et al., Revisiting
Reliability in Large-Scale Machine Learning Research Clusters, 2025; their RSC-2 had 2.34)."""
RECOVERY = 60.0
"""Seconds from a failure to the next step; an assumption (see benchmarks/README.md for measurements)."""


@dataclass(frozen=True)
class Saving:
    """`size`: bytes of a checkpoint; `save`: seconds of a save; `stall`: seconds that steps wait for it.
    `mtbf`: seconds between failures of the run; `interval`: optimal seconds between two saves; `cost`: the fraction of
    the time for saves and failures at this interval. `own_interval`, `own_cost`: the same for the configured interval;
    `faults`: expected failures of the run. These are None if the throughput is unknown; `faults` also if failures take
    all of the time."""

    size: int
    save: float
    stall: float
    mtbf: float
    interval: float
    cost: float
    own_interval: float | None = None
    own_cost: float | None = None
    faults: float | None = None


def size(config: Config, shape: Shape) -> int:
    """Bytes of a checkpoint: trained parameters, AdamW's two states and the moving average, in float32. Replicas are
    saved once."""
    return shape.parameters["trained"] * 4 * (4 if config.optimizer.ema is not None else 3)


def plan(
    config: Config, shape: Shape, nodes: int, workers: int, bandwidth: float, failures: float,
    step: float | None, training: float | None,
) -> Saving:  # fmt: skip
    """`failures` per node and hour; `step`: seconds per step, `training`: seconds of all steps, None: unknown."""
    bytes_ = size(config, shape)
    save = bytes_ / bandwidth
    stall = min(save, bytes_ / workers / COPYING) if config.checkpoint.async_save else save
    mtbf = 3600 / (failures * nodes)
    best = max(daly(stall, mtbf), save)
    if step is None or training is None:
        return Saving(bytes_, save, stall, mtbf, best, waste(best, stall, mtbf))
    best = min(max(best, step), training)
    own = min(config.step_scheduler.ckpt_every_steps * step, training)  # the last step is always saved
    cost = waste(own, stall, mtbf)
    faults = training / (1 - cost) / mtbf if cost < 1 else None
    return Saving(bytes_, save, stall, mtbf, best, waste(best, stall, mtbf), own, cost, faults)


def young(save: float, mtbf: float) -> float:
    """Optimal seconds between two saves, to first order: sqrt(2 * save * mtbf), all in seconds
    (J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (9), 1974)."""
    return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """The same to higher order, for saves that are not short compared with the time between failures: equation 37 of
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (3), 2006; without
    the time of the save itself."""
    if save >= 2 * mtbf:
        return mtbf
    part = save / (2 * mtbf)
    return max(young(save, mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - save, 0.0)


def waste(interval: float, stall: float, mtbf: float) -> float:
    """The fraction of the time for saves and failures, to first order: one stall per interval; per failure, half an
    interval of work and the recovery."""
    return stall / (interval + stall) + (interval / 2 + RECOVERY) / mtbf
