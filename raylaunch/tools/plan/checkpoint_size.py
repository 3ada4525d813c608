"""Checkpoints: how large, how long a save takes, and how often to save.

The interval is Young's and Daly's: saving more often costs saves, less often the work that a fault takes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raylaunch.config.schema import Config
from raylaunch.tools.plan.model_shape import Shape

BANDWIDTH = 2e9
"""Bytes per second that a shared file system takes from all workers together; an assumption."""
COPYING = 1e10
"""Bytes per second that a worker copies to the host's memory, for a save in the background; an assumption."""
FAILURES = 6.5e-3 / 24
"""Failures per node and hour: 6.50 per thousand node-days, as Meta's RSC-1 cluster had (Kokolis et al., Revisiting
Reliability in Large-Scale Machine Learning Research Clusters, 2025; their RSC-2 had 2.34)."""
RECOVERY = 60.0
"""Seconds from a fault to the next step; an assumption (see benchmarks/README.md for what was measured)."""


@dataclass(frozen=True)
class Saving:
    """`size` in bytes, of one checkpoint; `save` seconds until it counts; `stall` seconds that steps wait for it.
    `interval` seconds between two saves that lose the least, `mtbf` seconds between two faults of the whole run;
    `cost`: the share of the time that saves and faults take at that interval. The same at the config's own, and the
    `faults` to be expected while it trains; None where no pace is known, or faults leave no time to train."""

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
    """Bytes of a checkpoint: what is trained and AdamW's two states, float32, and the moving average. Once, however
    many workers have it."""
    return shape.parameters["trained"] * 4 * (4 if config.optimizer.ema is not None else 3)


def plan(
    config: Config, shape: Shape, nodes: int, workers: int, bandwidth: float, failures: float,
    step: float | None, training: float | None,
) -> Saving:  # fmt: skip
    """`failures` per node and hour; `step` seconds of a step, `training` of all, None: unknown."""
    bytes_ = size(config, shape)
    save = bytes_ / bandwidth
    stall = min(save, bytes_ / workers / COPYING) if config.checkpoint.async_save else save
    mtbf = 3600 / (failures * nodes)
    best = max(daly(stall, mtbf), save)
    if step is None or training is None:
        return Saving(bytes_, save, stall, mtbf, best, waste(best, stall, mtbf))
    best = min(max(best, step), training)
    own = min(config.step_scheduler.ckpt_every_steps * step, training)  # there is one at the end in any case
    cost = waste(own, stall, mtbf)
    faults = training / (1 - cost) / mtbf if cost < 1 else None
    return Saving(bytes_, save, stall, mtbf, best, waste(best, stall, mtbf), own, cost, faults)


def young(save: float, mtbf: float) -> float:
    """Seconds between two saves that lose the least, to first order: sqrt(2 * save * mtbf), all in seconds
    (J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (9), 1974)."""
    return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """The same to higher order, for saves that are not short beside the time between faults: equation 37 of
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (3), 2006; without
    the time of the save itself."""
    if save >= 2 * mtbf:
        return mtbf
    part = save / (2 * mtbf)
    return max(young(save, mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - save, 0.0)


def waste(interval: float, stall: float, mtbf: float) -> float:
    """The share of the time that saves and faults take, to first order: a stall each interval; with each fault half an
    interval's work and the recovery."""
    return stall / (interval + stall) + (interval / 2 + RECOVERY) / mtbf
